"""Reports for people: tables, a page, a curve; and `results.json` for machines.

Everything here is a function of the stages' results; nothing is measured here.
"""
