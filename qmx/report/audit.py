"""The block "audit" of results.json: what an auditor files."""

import math
from typing import Any

from qmx.grid import Column, attacks, columns, is_control
from qmx.report.answer import answer, attacks_not_tried, next_steps
from qmx.report.beyond import beyond
from qmx.report.evidence import learn_labels, watermarks
from qmx.report.limits import Limits, largest_limits, time_to_extract
from qmx.report.reach import COPY, MEASURES, best, column_of, fewest, full, reach_of
from qmx.report.standards import STANDARDS
from qmx.report.tables import rows_of, spent


def audit(
    results: dict, by_class: dict[str, Any] | None, detection: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that follows from the other parts of `results.json`, and from the config's texts.

    Args:
      results: as in `results.json`, without "audit".
      by_class: of the strongest attack, see `qmx.stages.measured.by_class`.
      detection: as `python -m qmx.detect` wrote it; None if it was not run.
    """
    keys = results["config"]["audit"]
    return {
        "standards": [*STANDARDS],
        "scope": {
            key: keys[key] or None for key in ("authorised_by", "model", "environment", "scope")
        },
        "attacker": attacker(results),
        "answer": answer(results),
        "limits": {
            **{key: keys[key] or None for key in Limits._fields},
            "principals": keys["principals"],
            "price_per_1000": results["config"]["price"],
        },
        "time_to_extract": [
            row
            for measure in MEASURES
            for share in results["config"]["reach"]
            if (row := effort(results, measure, share))
        ],
        "largest_limits": [inverse(results, measure, keys["below"]) for measure in MEASURES],
        "access": access_levels(results),
        "controls": controls(results),
        "detection": detection,
        "traffic": {
            "how": "python -m qmx.ledger replay WORKDIR/ledger.sqlite traffic.jsonl",
            "images": results["account"]["images"],
            "calls": results["account"]["calls"],
        },
        "watermarks": watermarks(results),
        "by_class": by_class,
        "agreement_between_seeds": results["agreement"],
        "not_tried": attacks_not_tried(results),
        "residual_risk": keys["residual_risk"] or None,
        "next_steps": next_steps(results),
        "retest": {
            "command": results["provenance"]["command"],
            "compare": "qmx compare BEFORE/results.json AFTER/results.json",
        },
    }


def attacker(results: dict) -> dict[str, Any]:
    """The attacker that the figures are of: images, starts, answers, accounts; and the text of the
    config."""
    config, pool = results["config"], results["pool"]
    return {
        "text": config["audit"]["attacker"] or None,
        "images": f"{pool['size']} unlabelled images of {pool['name']}",
        "starts": sorted({column.init for column in attacks(config)}),
        "selections": sorted({column.select for column in attacks(config)}),
        "access": sorted({column.access for column in attacks(config)}),
        "student": config["student"]["arch"],
        "principals": config["audit"]["principals"],
        "training_seconds": results["provenance"]["seconds"]["encoders"]
        + results["provenance"]["seconds"]["students"],
    }


def limits_of(config: dict) -> Limits:
    """The limits of `config.audit`, where 0 is none."""
    return Limits(*(config["audit"][key] or math.inf for key in Limits._fields))


def effort(results: dict, measure: str, share: float) -> dict[str, Any] | None:
    """Queries, hours and money of the cheapest attack that reaches a share; None where the full
    share is not known.

    {"measure", "share", "attack", "queries", "low", "high", "money", "hours_alone",
    "hours_pooled"}: the last three of the number of queries, None where there is no price, no limit
    or no attack that reaches the share.
    """
    if full(results, measure) is None:
        return None
    found, config = fewest(results, measure, share), results["config"]
    limits, price = limits_of(config), config["price"]
    row: dict[str, Any] = {"measure": measure, "share": share}
    row |= {key: found[key] if found else None for key in ("queries", "low", "high")}
    row["attack"] = column_of(found)._asdict() if found else None
    queries = math.ceil(found["queries"]) if found else 0
    row["money"] = price * queries / 1000 if queries and price is not None else None
    for key, principals in (("alone", 1), ("pooled", config["audit"]["principals"])):
        known = queries and not limits.none
        row[f"hours_{key}"] = time_to_extract(queries, limits, principals) if known else None
    return row


def inverse(results: dict, measure: str, share: float) -> dict[str, Any]:
    """The largest limits, each alone, that keep every attack tried below a share for a month.

    Of the fewest queries that any seed needed, as an attacker may be as lucky. {"measure", "share",
    "queries", "alone", "pooled", "why"}: the limits of one principal where there is one, and where
    there are `config.audit.principals`; None where the measured budgets cannot say, and "why" then
    says why.
    """
    row: dict[str, Any] = {"measure": measure, "share": share, "queries": None}
    row |= {"alone": None, "pooled": None, "why": None}
    found, is_bound = fewest_of_any_seed(results, measure, share)
    if full(results, measure) is None:
        return row | {"why": "no limit is known, for the target's accuracy was not measured"}
    if found is None:
        learned = (
            row
            for row in results["rows"]
            if not (row["undertrained"] or is_control(column_of(row)))
        )
        most = max(map(spent, learned), default=0)
        each = most // results["config"]["audit"]["principals"]
        reason = (
            f"no attack tried reaches it by {most} queries; a limit of {each} a month for each"
            " account stops these, and a stronger one may need fewer"
        )
        return row | {"why": reason if most else "no limit is known, for no student has learned"}
    if is_bound:
        smallest = results["pool"]["budgets"][0]["queries"]
        which = "the smallest budget" + " of an attack whose students learned" * (found > smallest)
        why = f"no limit is known, for {math.ceil(found):,} queries, {which}, reach it already"
        return row | {"why": why}
    principals = results["config"]["audit"]["principals"]
    return row | {
        "queries": found,
        "alone": largest_limits(found)._asdict(),
        "pooled": largest_limits(found, principals)._asdict(),
    }


def fewest_of_any_seed(results: dict, measure: str, share: float) -> tuple[float | None, bool]:
    """(the fewest queries by which some seed of some attack reaches a share, None if none does;
    True if fewer may do, as some attack reaches it at the smallest budget whose students learned,
    which is then the number that is told)."""
    lows = [
        ("low" not in row["bounds"], row["low"])
        for column in attacks(results["config"])
        if (row := reach_of(results, column, measure, share)) and row["low"] is not None
    ]
    measured, found = min(lows, default=(True, None))  # bounds first
    return found, not measured


def access_levels(results: dict) -> list[dict[str, Any]]:
    """Accuracy of honest users at each level of access, beside the queries that a copy takes.

    Rows of {"access", "top1", "top5", "calibration_error", "queries", "at_most"}: the target's
    accuracy by such answers and their expected calibration error in per cent; the queries of the
    strongest attack tried at this level for fidelity on 95 % of images, None where none gets there,
    and whether fewer may do.
    """

    def fewest_at(access: str) -> dict[str, Any]:
        found = [
            (row["queries"], "queries" in row["bounds"])
            for column in columns(results["config"])
            if column.access == access
            and (row := reach_of(results, column, "fidelity", COPY))
            and row["queries"] is not None
        ]
        queries, is_bound = min(found, default=(None, False))
        return {"queries": queries, "at_most": is_bound}

    return [{**row, **fewest_at(row["access"])} for row in results["access"]]


def controls(results: dict) -> dict[str, Any]:
    """Controls without the answers: nothing asked at all, and true labels in their place; and the
    fidelity beyond the latter."""
    config = results["config"]
    by_labels = learn_labels(config)
    cells = [
        {**column._asdict(), "queries": budget["queries"], "top1": row["top1"]}
        for column in columns(config)
        for budget in results["pool"]["budgets"]
        for row in rows_of(results, column, budget["queries"])
        if is_control(column) or row["recipe"] in by_labels
    ]
    return {
        "zero_queries": results["zero_queries"],
        "labels": cells or None,
        "beyond_labels": beyond(results),
    }


def strongest(results: dict) -> tuple[Column, int] | None:
    """The attack of the answer, and the smallest budget at which it gets there, else the best's."""
    found = fewest(results, "fidelity", COPY)
    if not found:
        most = best(results, "fidelity")
        return (column_of(most), most["queries"]) if most else None
    column = column_of(found)
    enough = [
        budget["queries"]
        for budget in results["pool"]["budgets"]
        if budget["queries"] >= found["queries"]
        and any(not row["undertrained"] for row in rows_of(results, column, budget["queries"]))
    ]
    return column, min(enough)
