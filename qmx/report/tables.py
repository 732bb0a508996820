"""Tables of text from the rows of results."""

import math
from statistics import mean, stdev
from typing import NamedTuple

from qmx.grid import Column, columns, percent

# In per cent. A student that has learned agrees with nearly all answers that it was given; a small
# network given a million of them does not learn them by heart, and stays above this.
LEARNED = 80.0

NOT_RUN, NO_LABELS = "not run yet", "no labels"  # in the place of a figure


class Table(NamedTuple):
    """A titled table of strings."""

    title: str
    header: list[str]
    rows: list[list[str]]


def label(column: Column, results: dict) -> str:
    """A column's name: the init, and each other axis with several values in the grid.

    An axis is also named if the column's value is not the grid's first.
    """
    axes = {"select": "selects", "access": "accesses", "use": "uses"}
    config, chosen = results["config"], column._asdict()
    more = [
        chosen[axis]
        for axis, key in axes.items()
        if len(config[key]) > 1 or chosen[axis] != config[key][0]
    ]
    return " + ".join([column.init, *more])


def budget_label(results: dict, budget: dict) -> str:
    """A row's name: "14 (1 %)" for a share in the config, "20 (1.4 %)" for a number, rounded."""
    share = budget["fraction"]
    exact = share in results["config"]["fractions"]
    return f"{budget['queries']} ({percent(share if exact else float(f'{share:.2g}'))})"


def spent(row: dict) -> int:
    """Number of images that a row's student took from the budget, those for choosing included."""
    return row["queries"]["train"] + row["queries"]["select"]


def rows_of(results: dict, column: Column, queries: int) -> list[dict]:
    """Rows of a column at a budget, one for each seed that was run."""
    return [
        row
        for row in results["rows"]
        if Column(*(row[axis] for axis in Column._fields)) == column and spent(row) == queries
    ]


def values(
    results: dict, column: Column, queries: int, metric: str, learned: bool | None = None
) -> list[float]:
    """Values of a metric in one cell, one for each seed that was run; none of an accuracy that is
    unknown. `learned` takes the students that learned what they were given alone, or the others."""
    return [
        row[metric]
        for row in rows_of(results, column, queries)
        if row[metric] is not None and learned in (None, not row["undertrained"])
    ]


def complete(results: dict, column: Column) -> bool:
    """True if every budget of a column was run with some seed."""
    return all(rows_of(results, column, b["queries"]) for b in results["pool"]["budgets"])


def marked(results: dict, column: Column, queries: int, text: str) -> str:
    """A cell's text, with a star if one of its students did not learn what it was given."""
    undertrained = any(row["undertrained"] for row in rows_of(results, column, queries))
    return f"{text} *" if undertrained else text


def labelled(results: dict) -> bool:
    """True if the evaluation images have labels, as they must have before there was this key."""
    return results["pool"].get("labelled", True)


def figure(results: dict, column: Column, queries: int, metric: str, digits: int = 1) -> str:
    """The text of one metric in one cell."""
    if metric in ("top1", "top5") and not labelled(results):
        return NO_LABELS
    return spread(values(results, column, queries, metric), digits)


def spread(numbers: list[float], digits: int = 1) -> str:
    """Mean, and with several seeds the sample standard deviation."""
    if not numbers:
        return NOT_RUN
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f}"
    return f"{mean(numbers):.{digits}f} ± {stdev(numbers):.{digits}f}"


def result_tables(results: dict) -> list[Table]:
    """Accuracy, fidelity, divergence and the encoders' monitor."""
    seeds = len(results["config"]["seeds"])
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    metrics_shown = [
        (f"Accuracy, top-1 / top-5, in per cent ({over})", ("top1", "top5"), 1),
        (
            f"Fidelity to the target, top-1 / top-5, in per cent ({over})",
            ("fidelity_top1", "fidelity_top5"),
            1,
        ),
        (f"KL(target || student), in nats ({over})", ("kl_target_student",), 3),
    ]
    shown = columns(results["config"])
    names = [label(column, results) for column in shown]
    tables = []
    for title, metrics, digits in metrics_shown:
        rows = []
        for budget in results["pool"]["budgets"]:
            cells = []
            for column in shown:
                each = [
                    figure(results, column, budget["queries"], metric, digits) for metric in metrics
                ]
                cell = each[0] if each[0] in (NOT_RUN, NO_LABELS) else " / ".join(each)
                cells.append(marked(results, column, budget["queries"], cell))
            rows.append([budget_label(results, budget), *cells])
        tables.append(Table(title, ["queries", *names], rows))
    tables += [*reach_tables(results), *access_tables(results, over), *zero_tables(results)]
    monitors = [m for m in results["monitors"] if "knn_top1" in m]  # with labels alone
    if monitors:
        first = monitors[0]
        looks = {"knn_top1": "pretrained", "knn_top1_random": "the same network, random"}
        if any("linear_top1" in m for m in monitors):
            looks["linear_top1"] = "linear probe"
        tables.append(
            Table(
                f"Features: accuracy of {first['knn_k']} weighted nearest neighbours (temperature"
                f" {first['knn_temperature']:g})"
                f" {'and of a linear probe ' if len(looks) > 2 else ''}within the pool, in per cent"
                f" ({over})",
                ["encoder", *looks.values()],
                [
                    [init, *(looked_at(monitors, init, key) for key in looks)]
                    for init in dict.fromkeys(m["init"] for m in monitors)
                ],
            )
        )
    return tables


def looked_at(monitors: list[dict], init: str, key: str) -> str:
    """The text of one measure of an encoder's features: "-" where there is none of its kind, and
    one number for all seeds of an encoder that was brought along."""
    some = [monitor for monitor in monitors if monitor["init"] == init]
    found = [monitor[key] for monitor in some if key in monitor]
    one = "source" in some[0] and key != "knn_top1_random"
    return spread(found[:1] if one else found) if found else "-"


def reach_tables(results: dict) -> list[Table]:
    """Queries that reach a share of the target's accuracy and of full agreement, with their price
    if it is set."""
    shares, price = results["config"]["reach"], results["config"]["price"]

    def cell(column: Column, measure: str, share: float) -> str:
        found = [
            row
            for row in results["reach"]
            if (row["measure"], row["share"]) == (measure, share)
            and Column(*(row[axis] for axis in Column._fields)) == column
        ]
        if not found:
            return NOT_RUN
        number, largest = found[0]["queries"], found[0]["largest"]
        if number is None:
            return "not trained" if largest is None else f"not by {largest}"
        paid = "" if price is None else f" ({price * number / 1000:.2f})"
        few = "at most " if "queries" in found[0]["bounds"] else ""
        return f"{few}{math.ceil(number)}{paid}"

    shown = columns(results["config"])
    titles = {
        "accuracy": "Queries that reach a share of the target's top-1 accuracy",
        "fidelity": "Queries for fidelity on a share of the images",
    }
    paid = "" if price is None else f" (price at {price:g} per 1,000)"
    return [
        Table(
            f"{title}, interpolated between budgets{paid}",
            ["share", *(label(column, results) for column in shown)],
            [
                [percent(share), *(cell(column, measure, share) for column in shown)]
                for share in shares
            ],
        )
        for measure, title in titles.items()
        if shares and (measure != "accuracy" or labelled(results))
    ]


def zero_tables(results: dict) -> list[Table]:
    """Copies that ask nothing: one class for every image, and the user's function."""
    found = results["zero_queries"]
    if not found:
        return []
    told = {"one class for every image": found}
    if function := found.get("function"):
        told[function["name"]] = function
    rows = [
        [
            name,
            *(
                NO_LABELS if row[metric] is None else f"{row[metric]:.1f}"
                for metric in ("top1", "fidelity_top1")
            ),
        ]
        for name, row in told.items()
    ]
    title = "Without a query, top-1, in per cent"
    return [Table(title, ["copy", "accuracy", "fidelity"], rows)]


def access_tables(results: dict, over: str) -> list[Table]:
    """Access levels against budgets, a table for columns that differ in nothing else."""
    groups: dict[Column, list[Column]] = {}
    for column in columns(results["config"]):
        groups.setdefault(column._replace(access=""), []).append(column)
    budgets = results["pool"]["budgets"]
    return [
        Table(
            f"Access to the answers, {group.init} + {group.select} + {group.use}: accuracy /"
            f" fidelity, top-1, in per cent ({over})",
            ["access", *(budget_label(results, budget) for budget in budgets)],
            [
                [
                    column.access,
                    *(
                        " / ".join(
                            figure(results, column, budget["queries"], metric)
                            for metric in ("top1", "fidelity_top1")
                        )
                        for budget in budgets
                    ),
                ]
                for column in group_columns
            ],
        )
        for group, group_columns in groups.items()
        if len(group_columns) > 1
    ]


def aligned(table: Table) -> str:
    """A Markdown table whose columns line up."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    text = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
