"""Signs of copying in a report: detectors over the ledger's traffic, and watermarks in students."""

from statistics import mean
from typing import Any

from qmx.grid import Column, columns, is_control
from qmx.report.reach import column_of
from qmx.report.tables import Table, label, marked, rows_of, spread

STATISTIC = {"PRADA": "W", "MMD": "p"}


def detection_table(found: dict[str, Any] | None) -> Table | None:
    """First alarm of each detector, on the traffic as it was asked, shuffled, and honest; None if
    this was not measured."""
    if not found:
        return None
    rows = []
    for one in found["detectors"]:
        asked = one["asked"]
        told = f"after query {asked['alarm_at']}" if asked["alarm_at"] else "no alarm"
        rows.append(
            [
                f"{one['name']}, {STATISTIC[one['name']]} below {one['bound']:g}",
                told if asked["looks"] else f"too few queries ({asked['queries']})",
                *(_of_orders(one[key]) for key in ("shuffled", "honest")),
            ]
        )
    header = ["detector", "as asked", "the same, shuffled", "honest traffic"]
    return Table("Detection: alarms over the ledger's traffic", header, rows)


def _of_orders(found: dict[str, Any]) -> str:
    first = min((at for at in found["alarm_at"] if at), default=None)
    text = f"{found['alarmed']} of {found['orders']} orders of {found['queries']} queries"
    return f"{text}, the first after {first}" if first else text


def detection_note(found: dict[str, Any]) -> str:
    """Traffic and features behind the table of detection, in words."""
    traffic, honest = found["traffic"], found["honest"]
    lacking = (
        f"; {traffic['left_out']} more are left out, beyond the first or no longer in the pool"
        if traffic["left_out"]
        else ""
    )
    return (
        f"Traffic: the first {traffic['queries']} images that all attacks together asked about, in"
        f" the order of the ledger{lacking}. Honest traffic: {honest['images']} images of"
        f" {honest['source']}, in random orders; an alarm there is a false one. Features:"
        f" {found['features']}."
    )


def learn_labels(config: dict[str, Any]) -> set[str]:
    """Names of the recipes whose students learn from true labels, and not from answers."""
    recipes = {"distill": config["distill"], **config["recipes"]}
    return {name for name, keys in recipes.items() if keys["learn_from"] == "labels"}


def watermarks(results: dict[str, Any]) -> dict[str, Any] | None:
    """Share of trigger images that students answer as marked: {"triggers", "sha256", "chance",
    "students", "note"}; None without such images.

    A student is {the column's axes, "queries", "seeds", "answered", "control"}: the mean over seeds
    in per cent, and true if it learned from labels.
    """
    rows = [row for row in results["rows"] if "watermark" in row]
    if not rows:
        return None
    by_labels, students = learn_labels(results["config"]), []
    for column in columns(results["config"]):
        for budget in results["pool"]["budgets"]:
            some = _marked_rows(results, column, budget["queries"])
            if some:
                students.append(
                    {
                        **column._asdict(),
                        "queries": budget["queries"],
                        "seeds": len(some),
                        "answered": mean(row["watermark"]["answered"] for row in some),
                        "control": is_control(column)
                        or all(row["recipe"] in by_labels for row in some),
                    }
                )
    mark = rows[0]["watermark"]
    chance = 100 / max(results["pool"]["classes"], 1)
    note = (
        f"{mark['triggers']} trigger images, of which one is {100 / mark['triggers']:.2g} %; who"
        f" guesses answers {chance:.2g} % of them as marked. "
    )
    if any(one["control"] for one in students):
        note += (
            "Controls learned the same images from labels. A copy carries the watermark where it"
            " answers more trigger images as marked than they do."
        )
    else:
        note += (
            "There is no control, for no student learned from labels (accesses with true_labels, or"
            " a recipe with learn_from='labels'): a student that starts from none is not one, as it"
            " learned from the model's answers too."
        )
    facts = {"triggers": mark["triggers"], "sha256": mark["sha256"], "chance": chance}
    return {**facts, "students": students, "note": note}


def _marked_rows(results: dict[str, Any], column: Column, queries: int) -> list[dict[str, Any]]:
    return [row for row in rows_of(results, column, queries) if "watermark" in row]


def watermark_table(results: dict[str, Any]) -> Table | None:
    """Share of trigger images that each student answers as marked; None without such images."""
    found = results["audit"]["watermarks"]
    if not found:
        return None
    budgets = [budget["queries"] for budget in results["pool"]["budgets"]]
    cells: dict[tuple[str, bool], dict[int, str]] = {}
    for one in found["students"]:
        column, queries = column_of(one), one["queries"]
        shares = [row["watermark"]["answered"] for row in _marked_rows(results, column, queries)]
        key, text = (label(column, results), one["control"]), spread(shares)
        # A control disagrees with the answers because it learned others.
        text = text if one["control"] else marked(results, column, queries, text)
        cells.setdefault(key, {})[queries] = text
    rows = [
        [f"{name} (control)" if control else name, *(of.get(n, "") for n in budgets)]
        for (name, control), of in cells.items()
    ]
    title = "Watermark: trigger images that a student answers as marked, in per cent"
    return Table(title, ["student", *map(str, budgets)], rows)
