"""The block "audit" of results.json as tables and lines for people."""

import math
from typing import Any

from qmx.grid import percent
from qmx.report.answer import interval
from qmx.report.audit import limits_of
from qmx.report.reach import column_of, reach_of
from qmx.report.tables import Table, budget_label, label, marked, spread, values

WORST = 10  # classes that are shown


def strongest_table(results: dict) -> Table | None:
    """Fidelity and accuracy of the strongest attack, budget by budget; None if there is none."""
    attack = results["audit"]["answer"]["attack"]
    if not attack:
        return None
    column = column_of(attack)
    rows = []
    for budget in results["pool"]["budgets"]:
        queries = budget["queries"]
        each = [spread(values(results, column, queries, m)) for m in ("fidelity_top1", "top1")]
        named = marked(results, column, queries, budget_label(results, budget))
        rows.append([named, *each])
    title = f"Strongest attack: {label(column, results)}"
    return Table(title, ["queries", "fidelity, %", "accuracy, %"], rows)


def effort_table(results: dict) -> Table:
    """Queries, hours and money for each measure and share."""
    rows = []
    for row in results["audit"]["time_to_extract"]:
        attack = row["attack"]
        found = attack and reach_of(results, column_of(attack), row["measure"], row["share"])
        rows.append(
            [
                f"{percent(row['share'])} {'of the accuracy' if row['measure'] == 'accuracy' else 'fidelity'}",
                f"{math.ceil(row['queries'])} ({interval(found)})" if found else "not reached",
                label(column_of(attack), results) if attack else "",
                hours(row["hours_alone"]),
                hours(row["hours_pooled"]),
                "" if row["money"] is None else f"{row['money']:.4g}",
            ]
        )
    principals = results["audit"]["limits"]["principals"]
    header = ["a copy with", "queries", "by", "one principal"]
    header += [f"{principals} principals", "price"]
    return Table("Queries, time and price of the cheapest attack tried", header, rows)


def limits_note(results: dict) -> str:
    """The limits that the times are of, in words."""
    limits, keys = limits_of(results["config"]), results["audit"]["limits"]
    if limits.none:
        return "No limit is stated (audit.per_second, per_day, per_month), so there are no times."
    told = [
        f"{getattr(limits, key):g} a {key.removeprefix('per_')}"
        for key in limits._fields
        if not math.isinf(getattr(limits, key))
    ]
    return (
        f"Limits of one principal: {', '.join(told)} (a month has 30 days); an attacker has"
        f" {keys['principals']}. A quota may be used up at once, so that its first queries take no"
        " time."
    )


def hours(number: float | None) -> str:
    """Hours in words; "" if there are none."""
    if number is None:
        return ""
    if number < 1:
        return f"{60 * number:.0f} minutes" if number else "no time"
    return f"{number:.1f} hours" if number < 72 else f"{number / 24:.1f} days"


def largest_table(results: dict) -> Table:
    """The limits that keep every attack tried below the config's share for a month."""
    share, rows = percent(results["config"]["audit"]["below"]), []
    principals = results["audit"]["limits"]["principals"]
    for row in results["audit"]["largest_limits"]:
        for who, key in (("one", "alone"), (str(principals), "pooled")):
            if key == "pooled" and principals == 1:
                continue
            limits = row[key]
            cells = (
                [str(limits["per_month"]), str(limits["per_day"]), f"{limits['per_second']:.2g}"]
                if limits
                else [row["why"], "", ""]
            )
            rows.append([row["measure"], who, *cells])
    return Table(
        f"Largest limit of one principal, each alone, that keeps a copy below {share} for a month",
        ["measure", "principals", "in a month", "in a day", "in a second"],
        rows,
    )


def access_table(results: dict) -> Table | None:
    """Honest users' figures and the attacker's queries at each level; None before any answer."""
    rows = [
        [
            row["access"],
            f"{row['top1']:.1f}",
            f"{row['top5']:.1f}",
            f"{row['calibration_error']:.1f}",
            "not reached" if row["queries"] is None else str(math.ceil(row["queries"])),
        ]
        for row in results["audit"]["access"]
    ]
    header = ["answers", "top-1, %", "top-5, %", "calibration error, %", "queries for a copy"]
    title = "Honest users' accuracy by such answers, and queries for 95 % fidelity"
    return Table(title, header, rows) if rows else None


def class_table(results: dict) -> Table | None:
    """The classes in which the strongest attack's copies agree least; None if there are none."""
    found = results["audit"]["by_class"]
    if not found:
        return None
    rows = [
        [one["name"], str(one["images"]), f"{one['fidelity']:.1f}"]
        for one in found["classes"][:WORST]
    ]
    title = (
        f"Fidelity by the model's class, {label(column_of(found), results)}, {found['queries']}"
        f" queries, {len(rows)} of {len(found['classes'])} classes"
    )
    return Table(title, ["class", "images", "fidelity, %"], rows)


def seeds_table(results: dict) -> Table | None:
    """Agreement between students of several seeds; None with one seed."""
    found = results["audit"]["agreement_between_seeds"]
    budgets = list(dict.fromkeys(row["queries"] for row in found))
    cells: dict[str, dict[int, str]] = {}
    for row in found:
        name = label(column_of(row), results)
        cells.setdefault(name, {})[row["queries"]] = f"{row['agreement']:.1f}"
    rows = [[name, *(one.get(queries, "") for queries in budgets)] for name, one in cells.items()]
    title = "Images on which the copies of two seeds name the same class, in per cent"
    return Table(title, ["attack", *map(str, budgets)], rows) if rows else None


def standards_table(results: dict) -> Table:
    """Ids with their versions."""
    rows = [
        [one["standard"], one["version"], one["id"], one["title"]]
        for one in results["audit"]["standards"]
    ]
    return Table("Standards", ["standard", "version", "id", "of"], rows)


def scope(results: dict) -> list[tuple[str, str | None]]:
    """Scope and authorisation, as the config tells them."""
    told, audit = results["audit"]["scope"], results["audit"]
    return [
        ("Authorised by", told["authorised_by"]),
        ("Model", told["model"]),
        ("Environment", told["environment"]),
        ("Scope", told["scope"]),
        ("Attacker", audit["attacker"]["text"]),
        ("Residual risk", audit["residual_risk"]),
    ]


def origin(results: dict) -> list[tuple[str, str]]:
    """Provenance, line by line."""
    found: dict[str, Any] = results["provenance"]
    machine, seconds, sha256 = found["machine"], found["seconds"], found["sha256"]
    return [
        ("Date", found["date"]),
        ("Command", found["command"] or "a call of the library"),
        ("Version", f"qmx {found['qmx']}, jax {results['versions']['jax']}"),
        (
            "Machine",
            f"{machine['devices']}, {machine['cores']} cores, {machine['system']}, Python"
            f" {machine['python']}",
        ),
        (
            "Time",
            f"{seconds['encoders']:.0f} s for the encoders, {seconds['students']:.0f} s for the"
            " students",
        ),
        ("Seeds", ", ".join(map(str, found["seeds"]))),
        *((f"SHA-256 of the {name}", digest or "none") for name, digest in sha256.items()),
    ]
