"""Targets that can be asked: a network of ours, a Python function, a server, a table of answers.

A query function is `images uint8[b, H, W, C] -> scores f32[b, N]`. Training code never holds one;
it reads the ledger.
"""
