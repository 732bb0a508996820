"""Asking the target: query functions, access levels, the ledger, and what to ask.

A query function is `images uint8[b, H, W, C] -> scores f32[b, N]`. Training code never holds one:
it reads the ledger.
"""

from qmx.oracle.access import ACCESS
from qmx.oracle.ledger import Account, BudgetSpent, Ledger, Unavailable
from qmx.oracle.query import network_query

__all__ = ["ACCESS", "Account", "BudgetSpent", "Ledger", "Unavailable", "network_query"]
