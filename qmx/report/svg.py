"""The page's curves: SVG whose colours are the page's, for light and dark."""

import io
import json
import re
from functools import lru_cache
from statistics import mean
from typing import Any

from qmx.grid import Column, percent
from qmx.report.reach import COPY, MEASURES, full, learned, ranked
from qmx.report.seen import seen
from qmx.report.tables import label, labelled, rows_of

# Colours that matplotlib writes, and the page's variables that take their place.
INK, MUTED, LINE = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0{place}0a0a" for place in range(1, 7))
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line"} | {
    colour: f"series{place}" for place, colour in enumerate(SERIES, 1)
}
MARKERS = "osD^vP"
SIZE = (5.4, 4.0)  # inches of 72 units: as wide as a telephone's page, where text is 14 pixels high
FONT = 16  # units
APART = 0.13  # of the axis, between two numbers below it


def drawn(results: dict) -> dict[str, str]:
    """An SVG for each measure, on shared axes, with the seeds' range and the 95 % line; without
    labels of fidelity alone."""
    return _drawn(seen(results))


@lru_cache(maxsize=8)
def _drawn(read: str) -> dict[str, str]:
    results = json.loads(read)
    shown = ranked(results)
    known = [m for m in MEASURES if m != "accuracy" or labelled(results)]
    return {measure: _draw(results, measure, shown) for measure in known}


def _draw(results: dict, measure: str, shown: list[Column]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        **{"svg.fonttype": "none", "svg.hashsalt": measure, "font.size": FONT},
        **{"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE},
        **{"xtick.color": INK, "ytick.color": INK, "text.parse_math": False},
    }
    with rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        panel = figure.subplots()
        for place, column in reversed([*enumerate(shown)]):  # the strongest lies on top
            _line(panel, results, measure, column, place, len(shown))
        if whole := full(results, measure):
            panel.axhline(COPY * whole, color=MUTED, linestyle="--", linewidth=1.5)
            panel.text(
                0.01,
                COPY * whole,
                percent(COPY) if measure == "fidelity" else f"{COPY * whole:.1f} %",
                color=MUTED,
                va="bottom",
                transform=panel.get_yaxis_transform(),
            )
        _axes(panel, results)
        handles, labels = panel.get_legend_handles_labels()
        legend = panel.legend(
            handles[::-1],
            labels[::-1],
            loc="lower right",
            frameon=False,
            labelcolor="linecolor",
            handlelength=1.0,
            labelspacing=0.1,
            borderpad=0.0,
            handletextpad=0.4,
        )
        legend.set_zorder(10)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _inlined(stream.getvalue())


def _line(panel, results: dict, measure: str, column: Column, place: int, number: int) -> None:
    """A column's mean over the seeds that learned, and their range."""
    curves = learned(results, column, measure)
    middle = curves.pop(None)
    strongest, labelled = place == 0, place < len(SERIES)
    colour = SERIES[place] if labelled else LINE
    aside = 1.02 ** (place - number / 2)  # so that the ranges do not hide each other
    xs = [queries * aside for queries in middle]
    each = [[curve[queries] for curve in curves.values() if queries in curve] for queries in middle]
    low, high = [min(values) for values in each], [max(values) for values in each]
    if strongest:
        panel.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
    else:
        panel.vlines(xs, low, high, color=colour, linewidth=1)
    panel.plot(
        xs,
        [*middle.values()],
        color=colour,
        marker=MARKERS[place] if labelled else "",
        markersize=6,
        linewidth=3 if strongest else 1.5,
        label=label(column, results) if labelled else "_",
    )
    for budget in results["pool"]["budgets"]:
        weak = [r for r in rows_of(results, column, budget["queries"]) if r["undertrained"]]
        if weak:
            y = mean(row[MEASURES[measure]] for row in weak)
            panel.plot(budget["queries"] * aside, y, color=colour, marker="x", markersize=8)


def _axes(panel, results: dict) -> None:
    """Queries on a logarithmic axis, and per cent from the lowest figure, of any measure."""
    budgets = [budget["queries"] for budget in results["pool"]["budgets"]]
    every = [row[key] for row in results["rows"] for key in MEASURES.values()]
    figures = [figure for figure in every if figure is not None]
    floor = 10 * int(min(figures, default=0) // 10)
    panel.set_ylim(min(floor, 90), 101)
    panel.set_xscale("log")
    left, right = budgets[0] / 1.25, budgets[-1] * 1.25
    panel.set_xlim(left, right)
    panel.minorticks_off()
    span = panel.transData.transform
    ticks: list[tuple[float, int]] = []
    width = span((right, 0))[0] - span((left, 0))[0]
    for queries in reversed(budgets):
        place = (span((queries, 0))[0] - span((left, 0))[0]) / width
        if not ticks or ticks[-1][0] - place > APART:
            ticks.append((place, queries))
    panel.set_xticks([q for _, q in ticks], [f"{q}" for _, q in ticks])
    panel.set_xlabel("queries", loc="right")
    panel.grid(color=LINE, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _inlined(svg: str) -> str:
    """An SVG file as a part of a page: its own elements, without ids that another has too."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)[ >].*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r' height="[\d.]+pt"', "", svg, count=1)
    )
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # matplotlib's own fonts are not the reader's.
    svg = re.sub(r'font-family: [^;"]*', "font-family: system-ui, sans-serif", svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
