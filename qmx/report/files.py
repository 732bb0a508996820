"""The files of a report, and the text for standard out."""

from pathlib import Path

from qmx.files import write_bytes, write_json, write_text
from qmx.report.curve import curve
from qmx.report.notes import account_notes
from qmx.report.page import markdown, page
from qmx.report.tables import aligned, result_tables


def write(directory: Path, results: dict) -> str:
    """Write results.json, report.md, report.html and curve.png; returns the text for standard out.

    Args:
      results: as in `results.json`; "rows" holds only the rows that were run.
    """
    tables, notes = result_tables(results), account_notes(results)
    picture = curve(results)
    write_json(directory / "results.json", results)
    write_bytes(directory / "curve.png", picture)
    write_text(directory / "report.md", markdown(tables, notes))
    write_text(directory / "report.html", page(tables, notes, picture))
    return "\n\n".join(
        ["\n".join(notes), *(f"{t.title}\n\n{aligned(t)}" for t in reversed(tables))]
    )
