"""The block "audit" of results.json as tables and lines for people."""

import math
from typing import Any

from qmx.grid import percent
from qmx.report.answer import interval
from qmx.report.audit import limits_of
from qmx.report.reach import column_of, ranked, reach_of
from qmx.report.tables import NO_LABELS, Table, budget_label, figure, label, marked

WORST = 10  # classes that are shown
SAID = {"accuracy": "of the accuracy", "fidelity": "fidelity"}


def strongest_table(results: dict) -> Table | None:
    """Fidelity and accuracy of the strongest attack, budget by budget; None if there is none."""
    attack = results["audit"]["answer"]["attack"]
    if not attack:
        return None
    column = column_of(attack)
    rows = []
    for budget in results["pool"]["budgets"]:
        queries = budget["queries"]
        each = [figure(results, column, queries, m) for m in ("fidelity_top1", "top1")]
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
        few = "at most " if found and "queries" in found["bounds"] else ""
        over = f" ({interval(found)})" if found and not few else ""
        rows.append(
            [
                f"{percent(row['share'])} {SAID[row['measure']]}",
                f"{few}{math.ceil(row['queries'])}{over}, by {label(column_of(attack), results)}"
                if found
                else not_reached(results),
                hours(row["hours_alone"]),
                hours(row["hours_pooled"]),
                "" if row["money"] is None else f"{row['money']:,.2f}",
            ]
        )
    principals = results["audit"]["limits"]["principals"]
    header = ["a copy with", "queries", "alone", f"pooled ({principals})", "price"]
    return Table("Queries, time and price of the cheapest attack tried", header, rows)


def not_reached(results: dict) -> str:
    """Words in the place of a number of queries that no attack has."""
    return "not reached" if results["finished"] else "not reached yet"


def limits_note(results: dict) -> str:
    """The limits that the times are of, in words."""
    limits, keys = limits_of(results["config"]), results["audit"]["limits"]
    if limits.none:
        return "No limit is stated (audit.per_second, per_day, per_month), so there are no times."
    told = [
        f"{getattr(limits, key):,.10g} a {key.removeprefix('per_')}"
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
        if 0 < 60 * number < 0.5:
            return "less than a minute"
        return f"{60 * number:.0f} minutes" if number else "no time"
    if number < 72:
        return f"{number:.3g} hours"
    return f"{number / 24:.3g} days" if number < 2400 else f"{number / 24:,.0f} days"


def largest_table(results: dict) -> Table | None:
    """The limits that keep every attack tried below the config's share for a month; None where no
    measured budget says."""
    share, principals = (
        results["config"]["audit"]["below"],
        results["config"]["audit"]["principals"],
    )
    rows = []
    for row in results["audit"]["largest_limits"]:
        for who, key in dict([(1, "alone"), (principals, "pooled")]).items():
            if limits := row[key]:
                rate = rounded_down(limits["per_second"])
                rows.append([row["measure"], str(who), f"{limits['per_month']}"])
                rows[-1] += [f"{limits['per_day']}", rate]
    title = (
        "Largest limit of one principal, each alone, that keeps a copy below"
        f" {percent(share)} for a month"
    )
    header = ["measure", "principals", "in a month", "in a day", "in a second"]
    return Table(title, header, rows) if rows else None


def rounded_down(number: float) -> str:
    """A number with two digits, not above it: a larger limit would let the attack by."""
    if not number:
        return "0"
    size = 10.0 ** (math.floor(math.log10(number)) - 1)
    return f"{math.floor(number / size * (1 + 1e-12)) * size:.2g}"


def unknown_limits(results: dict) -> list[str]:
    """A line for each measure of which no limit can be said, and why."""
    share = percent(results["config"]["audit"]["below"])
    return [
        f"{share} {SAID[row['measure']]}: {row['why']}."
        for row in results["audit"]["largest_limits"]
        if row["why"]
    ]


def access_table(results: dict) -> Table | None:
    """Honest users' figures and the attacker's queries at each level; None before any answer."""
    rows = [
        [
            row["access"],
            *(
                NO_LABELS if row[key] is None else f"{row[key]:.1f}"
                for key in ("top1", "top5", "calibration_error")
            ),
            not_reached(results)
            if row["queries"] is None
            else "at most " * row["at_most"] + str(math.ceil(row["queries"])),
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
    order = [label(column, results) for column in ranked(results)]
    rows = [
        [name, *(cells[name].get(queries, "") for queries in budgets)]
        for name in order
        if name in cells
    ]
    title = "Images on which the copies of two seeds name the same class, in per cent"
    return Table(title, ["attack", *map(str, budgets)], rows) if rows else None


def standards_table(results: dict) -> Table:
    """Ids with their versions, and whether this report has anything for them."""

    def has(fields: list[str]) -> str:
        there = [results["audit"].get(field) or results.get(field) for field in fields]
        return "yes" if any(there) else "not measured"

    rows = [
        [f"{one['standard']} {one['version']}", one["id"], one["title"], has(one["fields"])]
        for one in results["audit"]["standards"]
    ]
    return Table("Standards", ["standard", "id", "of", "in this report"], rows)


def scope(results: dict) -> list[tuple[str, str]]:
    """Scope and authorisation, as the config tells them; a last line names what it does not."""
    told, audit = results["audit"]["scope"], results["audit"]
    texts = {
        "Authorised by": told["authorised_by"],
        "Model": told["model"],
        "Environment": told["environment"],
        "Scope": told["scope"],
        "Attacker": audit["attacker"]["text"],
        "Residual risk": audit["residual_risk"],
    }
    lacking = ", ".join(name.lower() for name, text in texts.items() if not text)
    stated = [(name, text) for name, text in texts.items() if text]
    return [*stated, ("Not stated (config.audit)", lacking)] if lacking else stated


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
        ("Floating-point operations", operations(found["operations"])),
        ("Seeds", ", ".join(map(str, found["seeds"]))),
        *((f"SHA-256 of the {name}", digest or "none") for name, digest in sha256.items()),
    ]


def operations(found: dict[str, Any]) -> str:
    """Operations of the trainings in words."""
    counts = {name: found[name] for name in ("target", "encoders", "students") if found[name]}
    if not counts:
        return "not counted"
    told = [f"{count:.3g} for the {name}".replace("e+", "e") for name, count in counts.items()]
    text = f"{', '.join(told)}, in products of matrices and convolutions"
    if lacking := found["trainings"] - found["counted"]:
        text += (
            f"; {lacking} of {found['trainings']} trainings of encoders and students not counted"
        )
    return text
