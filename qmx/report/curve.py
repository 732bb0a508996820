"""Picture of accuracy and fidelity against queries."""

import io
import json
from functools import lru_cache
from statistics import mean, stdev
from typing import Any

from qmx.grid import columns, percent
from qmx.report.reach import COPY
from qmx.report.seen import seen
from qmx.report.tables import label, labelled, values

MARKERS = "osD^vP"


def curve(results: dict) -> bytes:
    """Plot accuracy, where there are labels, and fidelity as a PNG; bars are one standard deviation
    over the seeds. Students that did not learn what they were given are crosses beside the line."""
    return _curve(seen(results))


@lru_cache(maxsize=8)
def _curve(read: str) -> bytes:
    from matplotlib.figure import Figure

    results = json.loads(read)
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    kinds = [("top1", "accuracy"), ("fidelity_top1", "fidelity")]
    kinds = kinds if labelled(results) else kinds[1:]
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    budgets = [budget["queries"] for budget in results["pool"]["budgets"]]
    for panel, (metric, title) in zip(panels, kinds, strict=True):
        shown = columns(results["config"])
        for place, column in enumerate(shown):
            aside = 1.03 ** (place - len(shown) / 2)  # so that the bars do not hide each other
            points = [
                (queries * aside, values(results, column, queries, metric, True))
                for queries in budgets
            ]
            points = [(x, ys) for x, ys in points if ys]
            line = panel.errorbar(
                [x for x, _ in points],
                [mean(ys) for _, ys in points],
                [stdev(ys) if len(ys) > 1 else 0 for _, ys in points],
                marker=MARKERS[place % len(MARKERS)],
                capsize=3,
                label=label(column, results),
            )
            for queries in budgets:
                weak = values(results, column, queries, metric, False)
                colour = line[0].get_color()
                panel.plot([queries * aside] * len(weak), weak, "x", color=colour)
        if metric == "top1" and results["target"]["top1"] is not None:
            panel.axhline(
                results["target"]["top1"], color="grey", linestyle="--", label="the target"
            )
        if metric == "fidelity_top1":
            panel.axhline(
                100 * COPY, color="grey", linestyle=":", label=f"{percent(COPY)} of images: a copy"
            )
        panel.set(
            xscale="log",
            xlabel="queries",
            ylabel=f"{title}, top-1 (%)",
            title=f"{title} against queries",
        )
        panel.set_xticks(budgets, [str(queries) for queries in budgets])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    entries: dict[str, Any] = {}  # of both panels
    for panel in panels:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    below: Any = "outside lower center"  # a string that matplotlib's types lack with handles
    figure.legend([*entries.values()], [*entries], loc=below, ncols=3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
