"""Figures from which the pictures of a report are drawn."""

import json

from qmx.report.tables import labelled

GRID = ("inits", "selects", "accesses", "uses", "also", "pretrain")


def seen(results: dict) -> str:
    """JSON of all that the pictures read of `results`. Where it is the same, so are they, and a
    process draws them once: that takes most of the time of a call that finds its stages done."""
    return json.dumps(
        {
            "config": {key: results["config"][key] for key in GRID},
            "pool": {"budgets": results["pool"]["budgets"], "labelled": labelled(results)},
            "target": {"top1": results["target"]["top1"]},
            "rows": [
                {key: value for key, value in row.items() if key != "seconds"}
                for row in results["rows"]
            ],
        }
    )
