"""The report as text: report.md, and the lines for a terminal."""

from qmx.report.audit_tables import (
    access_table,
    class_table,
    effort_table,
    largest_table,
    limits_note,
    origin,
    scope,
    seeds_table,
    standards_table,
    unknown_limits,
)
from qmx.report.beyond import beyond_table
from qmx.report.evidence import detection_note, detection_table, watermark_table
from qmx.report.notes import account_notes
from qmx.report.tables import LEARNED, aligned, result_tables

STAR = (
    f"* marks students that agree with fewer than {LEARNED:g} % of the answers that they were given"
    ": they did not learn, and count for no statement."
)


def terminal(results: dict) -> str:
    """Text for standard out: the answer first, the result table last; `results` of plain text."""
    audit, tables = results["audit"], result_tables(results)
    tables += filter(None, [beyond_table(results)])
    parts = [
        "\n".join([audit["answer"]["text"], *star(results)]),
        "\n".join(["What to do next:", *(f"- {step}" for step in audit["next_steps"])]),
        "\n".join(account_notes(results)),
    ]
    if any(row["hours_alone"] is not None for row in audit["time_to_extract"]):
        parts.append("\n".join([limits_note(results), *unknown_limits(results)]))
        tables += [t for t in (largest_table(results), effort_table(results)) if t]
    parts += signs(results, "")
    parts += [f"{table.title}\n\n{aligned(table)}" for table in reversed(tables)]
    return "\n\n".join(parts)


def markdown(results: dict) -> str:
    """Text of report.md; the texts of `results` are Markdown, see `qmx.report.safe`."""
    audit = results["audit"]
    parts = ["# How many queries copy this model?", audit["answer"]["text"], *star(results)]
    parts += [
        "![Accuracy and fidelity against queries](curve.png)",
        "\n".join(f"- {note}" for note in account_notes(results)),
    ]
    tables = [*filter(None, [beyond_table(results)]), *result_tables(results)]
    parts += [f"## {table.title}\n\n{aligned(table)}" for table in tables]
    parts += ["## What to do next\n\n" + "\n".join(f"- {step}" for step in audit["next_steps"])]
    parts += ["## What it takes at your limits", limits_note(results)]
    parts += unknown_limits(results)
    more = [effort_table, largest_table, access_table, class_table, seeds_table, standards_table]
    parts += [f"### {table.title}\n\n{aligned(table)}" for make in more if (table := make(results))]
    if found := signs(results, "### "):
        parts += ["## Signs of copying", *found]
    told = [f"- {name}: {words}" for name, words in scope(results)]
    parts += ["## What was tested\n\n" + "\n".join(told)]
    parts += ["## What was not tried\n\n" + "\n".join(f"- {one}" for one in audit["not_tried"])]
    lines = [f"- {name}: {words}" for name, words in origin(results)]
    parts += ["## Where this comes from\n\n" + "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def signs(results: dict, heading: str) -> list[str]:
    """Tables and notes on detectors and watermarks, of those that there are."""
    detection, watermark = results["audit"]["detection"], results["audit"]["watermarks"]
    pairs = [
        (detection_table(detection), detection and detection_note(detection)),
        (watermark_table(results), watermark and watermark["note"]),
    ]
    return [f"{heading}{t.title}\n\n{aligned(t)}\n\n{note}" for t, note in pairs if t]


def star(results: dict) -> list[str]:
    """The line on marked rows, if there are any."""
    return [STAR] if any(row["undertrained"] for row in results["rows"]) else []
