"""Number of queries that reach a share of the target's accuracy, or an agreement with it.

It is read off the measured curve, never beyond its ends. Students that did not learn what they were
given count for nothing.
"""

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from qmx.grid import Column, attacks, columns, is_control
from qmx.report.tables import complete, rows_of

# The measure of a row that each stands for, and what a full share of it is.
MEASURES = {"accuracy": "top1", "fidelity": "fidelity_top1"}

COPY = 0.95  # of the images, on which what agrees counts as a copy


def first_reached(queries: Sequence[int], accuracy: Sequence[float], level: float) -> float | None:
    """Number of queries at which a curve first reaches `level`; None if it never does.

    Between two measured budgets, accuracy counts as linear in the logarithm of the queries, which
    is nearly true of learning curves. If the smallest budget reaches the level already, the result
    is that budget, an upper bound.

    Args:
      queries: measured budgets, ascending.
      accuracy: of each.
      level: in the unit of `accuracy`.
    """
    if accuracy and accuracy[0] >= level:
        return float(queries[0])
    for place in range(1, len(queries)):
        if accuracy[place] >= level:  # and the one before it is below
            low, high = accuracy[place - 1 : place + 1]
            few, many = math.log(queries[place - 1]), math.log(queries[place])
            found = math.exp(few + (many - few) * (level - low) / (high - low))
            return min(found, float(queries[place]))  # rounding may go beyond it
    return None


def full(results: dict, measure: str) -> float | None:
    """Value of a share of 1, in per cent: the target's accuracy, or agreement on all images; None
    if it is not known."""
    return results["target"]["top1"] if measure == "accuracy" else 100.0


def learned(
    results: dict, column: Column, measure: str, marked: bool = False
) -> dict[int | None, dict[int, float]]:
    """Curves of a column, {seed: {queries: per cent}}; the mean over the seeds stands under None.

    Students that did not learn what they were given are left out unless `marked`, and so is what is
    not known.
    """
    curves: dict[int | None, dict[int, float]] = {None: {}}
    for budget in results["pool"]["budgets"]:
        queries = budget["queries"]
        rows = [
            row
            for row in rows_of(results, column, queries)
            if (marked or not row["undertrained"]) and row[MEASURES[measure]] is not None
        ]
        for row in rows:
            curves.setdefault(row["seed"], {})[queries] = row[MEASURES[measure]]
        if rows:
            curves[None][queries] = mean(row[MEASURES[measure]] for row in rows)
    return curves


def reach_of(results: dict, column: Column, measure: str, share: float) -> dict[str, Any] | None:
    """Queries of a column for a share of a measure, on the mean curve over the seeds.

    None if the full share is not known, or if no budget reaches it and some were not run yet. Else
    {the column's axes, "measure", "share", "queries", "low", "high", "seeds", "seeds_reached",
    "first", "largest", "bounds"}. "queries" is a float, or None if no measured budget reaches the
    share; "low" and "high" are the fewest and the most that one seed's own curve needs, "high" None
    if a seed's never gets there; "first" and "largest" are the smallest and the largest budget
    whose students learned, None if none did; "bounds" names those of "queries" and "low" that are
    the first of their curve, so that fewer may do.
    """
    whole = full(results, measure)
    if whole is None:
        return None
    curves = learned(results, column, measure)
    middle = curves.pop(None)
    queries = first_reached([*middle], [*middle.values()], share * whole)
    if queries is None and not complete(results, column):
        return None
    each = [first_reached([*c], [*c.values()], share * whole) for c in curves.values()]
    some = [few for few in each if few is not None]
    low, first = min(some, default=None), min(middle, default=None)
    lowest = [min(c) for c, few in zip(curves.values(), each, strict=True) if few == low]
    bounds = {"queries": queries == first, "low": low is not None and low in lowest}
    return {
        **column._asdict(),
        "measure": measure,
        "share": share,
        "queries": queries,
        "low": low,
        "high": max(some) if some and len(some) == len(each) else None,
        "seeds": len(each),
        "seeds_reached": len(some),
        "first": first,
        "largest": max(middle, default=None),
        "bounds": [name for name, is_one in bounds.items() if is_one],
    }


def reached(results: dict) -> list[dict[str, Any]]:
    """`reach_of` each column, measure and share of `config.reach` for which it is known; `results`
    as in `results.json`."""
    rows = (
        reach_of(results, column, measure, share)
        for column in columns(results["config"])
        for measure in MEASURES
        for share in results["config"]["reach"]
    )
    return [row for row in rows if row]


def fewest(results: dict, measure: str, share: float) -> dict[str, Any] | None:
    """`reach_of` the attack that needs the fewest queries for a share; None if none reaches it.

    Of attacks that need as few, the one with the best figure at the budget there or below it.
    """

    def rank(row: dict[str, Any]) -> tuple[float, float]:
        curve = learned(results, column_of(row), measure)[None]
        few = min(curve)
        return row["queries"], -max(
            value for queries, value in curve.items() if queries <= max(few, row["queries"])
        )

    rows = [reach_of(results, column, measure, share) for column in attacks(results["config"])]
    return min((row for row in rows if row and row["queries"] is not None), key=rank, default=None)


def best(results: dict, measure: str, marked: bool = False) -> dict[str, Any] | None:
    """The attack and budget of the highest mean of a measure, {axes, "queries", "value"}; of equal
    ones the one with the fewest queries. None if no student learned; `marked` as in `learned`."""
    found = [
        {**column._asdict(), "queries": queries, "value": value}
        for column in attacks(results["config"])
        for queries, value in learned(results, column, measure, marked)[None].items()
    ]
    return min(found, key=lambda row: (-row["value"], row["queries"]), default=None)


def ranked(results: dict) -> list[Column]:
    """The columns, the strongest attack first, the others by their fidelity at the smallest budget
    at which they have one, and the controls last."""
    attack = fewest(results, "fidelity", COPY) or best(results, "fidelity")
    first = column_of(attack) if attack else None

    def rank(column: Column) -> tuple[bool, bool, float]:
        curve = learned(results, column, "fidelity")[None]
        return is_control(column), column != first, -next(iter(curve.values()), 0.0)

    return sorted(columns(results["config"]), key=rank)


def column_of(row: dict[str, Any]) -> Column:
    """The column that a row of the results, or of `reached`, belongs to."""
    return Column(*(row[axis] for axis in Column._fields))
