"""The ledger: every answer is paid for once, kept for good, and never asked for again.

One SQLite file. `python -m qmx.oracle.ledger` looks into it, checks it, and exports its answers.
"""

from qmx.oracle.ledger.accounts import PURPOSES, Account, BudgetSpent
from qmx.oracle.ledger.content import keys_of, keys_of_digests, pixel_digests
from qmx.oracle.ledger.file import Damaged
from qmx.oracle.ledger.ledger import Ledger, Unavailable

__all__ = ["PURPOSES", "Account", "BudgetSpent", "Damaged", "Ledger", "Unavailable", "keys_of",
           "keys_of_digests", "pixel_digests"]
