"""Two reports side by side, as before and after a fix: `qmx compare BEFORE AFTER`."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

from qmx.files import Unreadable, read_json
from qmx.grid import percent
from qmx.report import safe
from qmx.report.audit_tables import SAID, hours
from qmx.report.reach import MEASURES, column_of, fewest
from qmx.report.tables import Table, aligned, label
from qmx.terminal import MISTAKE, fail, show
from qmx.workdir import differences

SCHEMA = 2


class Parser(argparse.ArgumentParser):
    """Parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(
            fail(f"{message}; use qmx compare BEFORE/results.json AFTER/results.json", MISTAKE)
        )


def main(argv: list[str]) -> int:
    """Print the comparison of two results.json; returns the exit status."""
    parser = Parser(prog="qmx compare", description=__doc__)
    parser.add_argument("before", type=Path, help="results.json, or the workdir that has it")
    parser.add_argument("after", type=Path, help="the same of the other run")
    given = parser.parse_args(argv)
    try:
        return show(compared(read(given.before), read(given.after)))
    except (Unreadable, OSError) as error:
        return fail(str(error), MISTAKE)


def read(path: Path) -> dict[str, Any]:
    """The results in a file or a workdir, as plain text.

    Raises:
      Unreadable: it is missing, or no results.json of this schema.
    """
    path = path / "results.json" if path.is_dir() else path
    results = read_json(path)
    if (schema := results.get("schema")) != SCHEMA:
        told = f"has schema {schema}" if schema else "is no results.json"
        raise Unreadable(
            f"{path} {told}, and compare reads schema {SCHEMA}; make it again with this version:"
            " its command with --update asks nothing twice"
        )
    return safe.texts(results, safe.plain)


def compared(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Text of the comparison: the answers, the figures, and what else differs."""
    rows = []
    for measure in MEASURES:
        shares = sorted({*before["config"]["reach"], *after["config"]["reach"]})
        for share in shares:
            both = [fewest(results, measure, share) for results in (before, after)]
            rows.append([f"{percent(share)} {SAID[measure]}", *map(_said, both), _factor(*both)])
    for name, key in (("alone", "hours_alone"), ("pooled", "hours_pooled")):
        for share in sorted(set(before["config"]["reach"]) & set(after["config"]["reach"])):
            told = [_hours(results, share, key) for results in (before, after)]
            if any(told):
                rows.append([f"{percent(share)} fidelity, {name}", *told, ""])
    for k in ("top1", "top5"):
        figures = [_figure(results["target"][k]) for results in (before, after)]
        rows.append([f"the model's {k}, %", *figures, ""])
    table = Table("", ["a copy with", "before", "after", "queries"], rows)
    lines = [f"Before: {before['audit']['answer']['text']}"]
    lines += [f"After: {after['audit']['answer']['text']}", "", aligned(table), ""]
    for part, key in (("model", "target"), ("images", "pool")):
        same = before[key]["sha256"] == after[key]["sha256"]
        lines.append(f"The {part}: {'the same' if same else 'others'} (SHA-256).")
    changed = differences(before["config"], after["config"])
    lines += [f"The config: {len(changed) or 'no'} difference(s)", *(f"  {one}" for one in changed)]
    attacks = [{label(column_of(row), r) for row in r["reach"]} for r in (before, after)]
    if missing := attacks[0] - attacks[1]:
        lines.append(f"Not tried again: {', '.join(sorted(missing))}: a gain may be theirs.")
    return "\n".join(lines)


def _said(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not reached"
    return "at most " * _is_bound(row) + f"{math.ceil(row['queries'])}"


def _is_bound(row: dict[str, Any]) -> bool:
    return "queries" in row["bounds"]


def _factor(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    if not (before and after) or (_is_bound(before) and _is_bound(after)):
        return ""  # of two bounds nothing is known
    factor = f"x {after['queries'] / before['queries']:.2g}"
    if _is_bound(before):
        return f"{factor} or more"
    return f"{factor} or less" if _is_bound(after) else factor


def _hours(results: dict[str, Any], share: float, key: str) -> str:
    rows = results["audit"]["time_to_extract"]
    found = [row[key] for row in rows if (row["measure"], row["share"]) == ("fidelity", share)]
    return hours(found[0]) if found else ""


def _figure(number: float | None) -> str:
    return "not measured" if number is None else f"{number:.1f}"
