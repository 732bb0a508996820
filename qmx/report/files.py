"""The files of a report, and the text for standard out."""

from collections.abc import Sequence
from pathlib import Path

from qmx.files import write_bytes, write_json, write_sums, write_text
from qmx.report import safe
from qmx.report.curve import curve
from qmx.report.notes import account_notes
from qmx.report.page import page
from qmx.report.pictures import Picture
from qmx.report.tables import result_tables
from qmx.report.text import markdown, terminal

NAMES = ["results.json", "report.md", "report.html", "curve.png"]
SUMS = "report.sha256"  # of these, for `sha256sum -c`: the one file to sign


def write(directory: Path, results: dict, pictures: Sequence[Picture] = ()) -> str:
    """Write results.json, report.md, report.html, curve.png and their sums; returns the text for
    standard out.

    Args:
      results: as in `results.json`; "rows" holds only the rows that were run.
      pictures: some of the images that the strongest attack asked about.
    """
    shown = safe.texts(results, safe.plain)
    write_json(directory / "results.json", results)
    write_bytes(directory / "curve.png", curve(shown))
    named = [picture._replace(name=safe.plain(picture.name)) for picture in pictures]
    html = page(shown, result_tables(shown), account_notes(shown), named)
    write_text(directory / "report.html", html)
    write_text(directory / "report.md", markdown(safe.texts(results, safe.markdown)))
    write_sums(directory, NAMES, SUMS)
    return terminal(shown)
