"""The tables and the curve as report.md and report.html."""

import base64
import html

from qmx.report.tables import Table, aligned


def markdown(tables: list[Table], notes: list[str]) -> str:
    """Text of report.md."""
    parts = [
        "# How many queries copy this model?",
        "\n".join(f"- {note}" for note in notes),
        "![Accuracy and fidelity against queries](curve.png)",
    ]
    parts += [f"## {table.title}\n\n{aligned(table)}" for table in tables]
    return "\n\n".join(parts) + "\n"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left;
  white-space: nowrap; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } img { max-width: 100%; }
div { overflow-x: auto; }
"""


def page(tables: list[Table], notes: list[str], picture: bytes) -> str:
    """Text of report.html, with the picture inside."""
    body = [
        "<h1>How many queries copy this model?</h1>",
        "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>",
        (
            '<img alt="Accuracy and fidelity against queries" '
            f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        ),
    ]
    for table in tables:
        lines = [("th", table.header), *(("td", cells) for cells in table.rows)]
        rows = "".join(
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
            for tag, cells in lines
        )
        body.append(f"<h2>{html.escape(table.title)}</h2><div><table>{rows}</table></div>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>qmx report</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
