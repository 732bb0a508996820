"""From rows to what people read: tables, a page, a curve; and `results.json` for machines.

Everything here is a function of what the stages wrote down; nothing is computed anew.
"""
