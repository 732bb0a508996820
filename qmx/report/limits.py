"""Limits on queries as time and money, and back.

A quota of a day or of a month may be used up at any time of it, so that its first queries cost an
attacker no time. OWASP's AI Exchange, *Rate limit*: "10,000 interactions at 1 per minute takes
approximately 167 hours".
"""

import math
from typing import NamedTuple

DAY = 24 * 3600.0  # seconds
DAYS = 30  # of a month
MONTH = DAYS * DAY


class Limits(NamedTuple):
    """Queries that one principal may make, at most; infinity is no limit."""

    per_second: float = math.inf  # evenly spaced: below 1 it is a pause between two
    per_day: float = math.inf
    per_month: float = math.inf  # of 30 days

    @property
    def none(self) -> bool:
        """True if nothing is limited."""
        return all(math.isinf(limit) for limit in self)


class Largest(NamedTuple):
    """The largest limits of one principal under which a month brings too few queries."""

    per_second: float
    per_day: int
    per_month: int


def seconds_to_send(queries: int, limits: Limits) -> float:
    """Seconds from the first query of one principal to its last, under all limits together.

    Raises:
      ValueError: `queries` is below 1, or a limit is not above 0.
    """
    if queries < 1 or min(limits) <= 0:
        raise ValueError(f"queries {queries} and all of {limits} must be above 0")
    a_day = min(limits.per_day, DAY * limits.per_second)
    a_month = min(limits.per_month, DAYS * a_day)
    months, rest = divmod(queries - 1, a_month)  # those before the last one
    days, rest = divmod(rest, a_day)
    return months * MONTH + days * DAY + rest / limits.per_second


def time_to_extract(queries: float, limits: Limits, principals: int = 1) -> float:
    """Hours to make so many queries, shared evenly between so many principals."""
    return seconds_to_send(math.ceil(math.ceil(queries) / principals), limits) / 3600


def largest_limits(queries: float, principals: int = 1) -> Largest:
    """The largest limits, each alone, under which so many principals together make fewer than
    `queries` in a month.

    A limit of 0 says that none holds: every principal's first query is one too many.
    """
    allowed = (math.ceil(queries) - 1) // principals  # of each
    # The k-th query comes (k - 1) / rate seconds after the first: the one too many, after a month.
    return Largest(allowed / MONTH, allowed // DAYS, allowed)
