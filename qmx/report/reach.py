"""Number of queries that reach a share of the target's accuracy.

It is read off the measured curve, never beyond its ends.
"""

import math
from collections.abc import Sequence
from statistics import mean

from qmx.grid import columns
from qmx.report.tables import values


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
            return math.exp(few + (many - few) * (level - low) / (high - low))
    return None


def reached(results: dict) -> list[dict]:
    """Queries for each column and each share of `config.reach`, on the mean curve over the seeds.

    Rows of {the column's axes, "share", "queries"}; "queries" is a float, or None if no measured
    budget reaches the share. A column is left out until all of its budgets were run. `results` is
    as in `results.json`.
    """
    target, rows = results["target"]["top1"], []
    queries = [budget["queries"] for budget in results["pool"]["budgets"]]
    for column in columns(results["config"]) if target is not None else ():
        each = [values(results, column, number, "top1") for number in queries]
        if all(each):
            curve = [mean(accuracies) for accuracies in each]
            rows += [
                {
                    **column._asdict(),
                    "share": share,
                    "queries": first_reached(queries, curve, share * target),
                }
                for share in results["config"]["reach"]
            ]
    return rows
