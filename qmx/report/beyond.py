"""Fidelity beyond the label control: the part of an agreement that the model's answers gave, and
that true labels of the same images do not give."""

from statistics import mean, stdev
from typing import Any

from qmx.grid import TRUE_LABELS, Column, attacks, columns, of_control
from qmx.report.reach import COPY, column_of, ranked
from qmx.report.tables import NOT_RUN, Table, budget_label, label, rows_of

WITHOUT = "not trained"  # in the place of a figure: a student of the pair did not learn


def controlled(results: dict) -> list[Column]:
    """The columns that have a control, which learned true labels of the same images."""
    grid = columns(results["config"])
    return [
        column
        for column in attacks(results["config"])
        if any(of_control(control, [column]) for control in grid)
    ]


def beyond_of(results: dict, column: Column, queries: int) -> dict[str, Any] | None:
    """Fidelity of a column at a budget less that of its control, seed by seed; None where no seed
    has both, or one of them did not learn.

    {the column's axes, "queries", "seeds", "fidelity", "labels", "beyond", "deviation"}: the means
    over the seeds that have both of the fidelity, of the control's, and of their difference, in per
    cent; and the difference's sample standard deviation, None with one seed.
    """
    each = [
        {row["seed"]: row["fidelity_top1"] for row in rows if not row["undertrained"]}
        for of in (column, column._replace(access=TRUE_LABELS))
        for rows in [rows_of(results, of, queries)]
    ]
    seeds = sorted(each[0].keys() & each[1].keys())
    if not seeds:
        return None
    more = [each[0][seed] - each[1][seed] for seed in seeds]
    return {
        **column._asdict(),
        "queries": queries,
        "seeds": len(seeds),
        "fidelity": mean(each[0][seed] for seed in seeds),
        "labels": mean(each[1][seed] for seed in seeds),
        "beyond": mean(more),
        "deviation": stdev(more) if len(more) > 1 else None,
    }


def beyond(results: dict) -> list[dict[str, Any]] | None:
    """`beyond_of` each column and budget for which it is known; None without a control."""
    found = [
        row
        for column in controlled(results)
        for budget in results["pool"]["budgets"]
        if (row := beyond_of(results, column, budget["queries"]))
    ]
    return found or None


def first_figure(results: dict) -> dict[str, Any] | None:
    """The row of `beyond` that a report begins with: of the strongest attack that has a control, at
    the smallest budget that copies the model, else at its largest; None without a control."""
    rows = beyond(results) or []
    for column in ranked(results):
        own = [row for row in rows if column_of(row) == column]
        if own:
            copies = [row for row in own if row["fidelity"] >= 100 * COPY]
            return (copies or own[::-1])[0]
    return None


def beyond_text(results: dict) -> str:
    """The first figure in a sentence; "" without a control."""
    row = first_figure(results)
    if row is None:
        return ""
    return (
        f"The model's answers to {row['queries']} images gave a copy {signed(row['beyond'])} points"
        f" of fidelity beyond true labels of the same images ({label(column_of(row), results)}:"
        f" {row['fidelity']:.1f} against {row['labels']:.1f} %{fewer_seeds(results, row)})."
    )


def beyond_table(results: dict) -> Table | None:
    """Fidelity beyond the control, a column for each that has one; None without a control."""
    shown = controlled(results)
    if not shown:
        return None
    known = {(column_of(row), row["queries"]): row for row in beyond(results) or []}
    rows = []
    for budget in results["pool"]["budgets"]:
        cells = [
            cell(results, column, budget["queries"], known.get((column, budget["queries"])))
            for column in shown
        ]
        rows.append([budget_label(results, budget), *cells])
    seeds = len(results["config"]["seeds"])
    over = f"mean ± standard deviation of the difference over {seeds} seeds" if seeds > 1 else ""
    title = (
        "Fidelity beyond true labels of the same images, in percentage points"
        f" ({over or 'one seed'})"
    )
    return Table(title, ["queries", *(label(column, results) for column in shown)], rows)


def cell(results: dict, column: Column, queries: int, row: dict[str, Any] | None) -> str:
    """A figure of the table."""
    if row is None:
        control = column._replace(access=TRUE_LABELS)
        ran = rows_of(results, column, queries) and rows_of(results, control, queries)
        return WITHOUT if ran else NOT_RUN
    spread = "" if row["deviation"] is None else f" ± {row['deviation']:.1f}"
    text = f"{signed(row['beyond'])}{spread} ({row['fidelity']:.1f} - {row['labels']:.1f})"
    return text + fewer_seeds(results, row)


def fewer_seeds(results: dict, row: dict[str, Any]) -> str:
    """Words on the seeds of a figure, where some have none: not run, or a student did not learn."""
    every = len(results["config"]["seeds"])
    return f", {row['seeds']} of {every} seeds" if row["seeds"] < every else ""


def signed(points: float) -> str:
    """A difference with its sign."""
    return f"{points:+.1f}"
