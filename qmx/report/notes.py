"""Lines above the tables: target, pool, and account of the queries."""

from statistics import mean

from qmx.grid import HEADS, attacks, columns, teacher
from qmx.report.tables import budget_label, label, labelled, spent, values

METRIC = "fidelity_top1"  # by which columns are compared


def account_notes(results: dict) -> list[str]:
    """One line each on the target, the images and the account of the queries."""
    target, pool, account = results["target"], results["pool"], results["account"]
    measured = (
        ("accuracy not measured yet" if labelled(results) else "accuracy not known without labels")
        if target["top1"] is None
        else (f"top-1 / top-5 {target['top1']:.1f} / {target['top5']:.1f} on the evaluation images")
    )
    used = ", ".join(f"{count} for {purpose}" for purpose, count in account["purposes"].items())
    price, calls = results["config"]["price"], account["calls"] + account["lost"]
    paid = (
        ""
        if price is None
        else f" At {price:g} per 1,000 calls that is {price * calls / 1000:.2f}."
    )
    lost = (
        f" {account['lost']} of the calls are no longer in the ledger." if account["lost"] else ""
    )
    # Results of an older version have no such number.
    refused = (
        f" {account['refused']} images were refused, or answered with numbers that are not finite,"
        " and are left out."
        if account.get("refused")
        else ""
    )
    return [
        f"Target: {target['name']}, {measured}, sha256 {target['sha256'][:16]}.",
        f"Pool: {pool['size']} images of {pool['name']}; evaluated on {pool['evaluation']} others.",
        (
            f"Asked: {account['images']} distinct images ({used}), {account['views']} views,"
            f" {calls} calls, {account['failed']} sent in requests that failed"
            f" ({account['retried']} sent again), {account['unanswered']} without an answer.{lost}"
            f"{refused}{paid}"
        ),
        *encoder_notes(results),
        *pool_notes(results),
        recipes_note(results) + " Figures are those of the last step.",
    ] + ([f"Warning: {target['warning']}."] if target["warning"] else [])


def encoder_notes(results: dict) -> list[str]:
    """A line on each encoder that was brought along and stays as it is, with its licence."""
    lines = {}
    for found in results["monitors"]:
        if "kind" not in found:
            if "licence" in found:  # a vision transformer
                lines[found["init"]] = (
                    f"Encoder {found['init']}: {found['arch']} from {found['source']}, positions"
                    f" {found['positions']}, sha256 {found['sha256'][:16]}, licence"
                    f" {found['licence'] or 'not told'}; its students train whole."
                )
            continue
        made_of = {
            "weights": f"{found.get('arch')} from {found['source']}",
            "callable": f"the function in {found['source']}",
            "table": f"features in {found['source']}",
        }[found["kind"]]
        how = (
            f", shown at {found['size'] or 'their own'} pixels, features {found['features']},"
            f" positions {found['positions'] or 'none'}"
            if found["kind"] == "weights"
            else ""
        )
        init, licence = found["init"], found["licence"] or "not told"
        lines[init] = (
            f"Encoder {init}: {made_of}{how}, sha256 {found['sha256'][:16]}, licence {licence}; it"
            f" stays as it is{_learners(results, init)}."
        )
    return [*lines.values()]


def pool_notes(results: dict) -> list[str]:
    """A line on each column that learns from the whole pool and somewhere agrees less with the
    target than the same column that learns from what was asked about alone."""
    lines, shown = [], attacks(results["config"])
    for column in shown:
        plain = column._replace(use="head" if column.use in HEADS.values() else "asked")
        if column == plain or plain not in shown:
            continue
        lost = []
        for queries in (budget["queries"] for budget in results["pool"]["budgets"]):
            ours, others = (values(results, one, queries, METRIC, True) for one in (column, plain))
            if ours and others and mean(ours) < mean(others):
                lost.append(str(queries))
        if lost:
            lines.append(
                f"{label(column, results)} has less fidelity than {label(plain, results)} with"
                f" {', '.join(lost)} queries: what it learns from the other images does harm there."
            )
    return lines


def _learners(results: dict, init: str) -> str:
    """Words on what learns from the features of an encoder that stays as it is."""
    config = results["config"]
    starts = dict.fromkeys(column.init for column in columns(config))
    heads = ", and its students are heads" if init in starts else ""
    return heads + "".join(
        f"; {name} learns its features" for name in starts if teacher(config, name) == init
    )


def recipes_note(results: dict) -> str:
    """Settings that the columns of one row have in common."""
    config = results["config"]
    used = {
        budget_label(results, budget): {
            row["recipe"] for row in results["rows"] if spent(row) == budget["queries"]
        }
        for budget in results["pool"]["budgets"]
    }
    named = "; ".join(f"{budget} {', '.join(sorted(recipes))}" for budget, recipes in used.items())
    one_recipe = all(len(recipes) < 2 for recipes in used.values())
    one_choice = len({column.select for column in columns(config)}) == 1
    shared = {
        (True, True): "recipe, seeds and images",
        (False, True): "seeds and images",
        (True, False): "recipe and seeds",
        (False, False): "seeds",
    }[one_recipe, one_choice]
    note = f"At each budget all attacks share {shared}"
    if not one_choice:
        note += "; those that do not say how their images were chosen share these too"
    if not one_recipe:
        note += (
            "; students that start from nothing and those that start from an encoder train by"
            f" recipes of their own: {named}"
        )
    return note + "."
