"""The ledger: every answer is paid for once, kept for good, and never asked for again.

One SQLite file. `python -m qmx.ledger` looks into it, checks it, and exports its answers.
"""

from qmx.ledger.accounts import PURPOSES, Account, BudgetSpent
from qmx.ledger.content import keys_of, keys_of_digests, pixel_digests
from qmx.ledger.file import Damaged
from qmx.ledger.ledger import Ledger
from qmx.ledger.refused import TooManyRefused
from qmx.ledger.sending import Refused, Unavailable, Unwritten

__all__ = [
    "PURPOSES",
    "Account",
    "BudgetSpent",
    "Damaged",
    "Ledger",
    "Refused",
    "TooManyRefused",
    "Unavailable",
    "Unwritten",
    "keys_of",
    "keys_of_digests",
    "pixel_digests",
]
