"""Number of queries that reach an accuracy: closed forms, only inside the measured range."""

import json
import math
import shutil

import pytest
from conftest import TINY
from test_report import results

from qmx.grid import columns
from qmx.report.answer import answer
from qmx.report.audit import inverse
from qmx.report.reach import first_reached, reach_of


def test_between_budgets():
    """A straight line in the logarithm: half of the way in accuracy is the geometric mean in
    queries."""
    assert first_reached([10, 1000], [20, 60], 40) == pytest.approx(100)
    assert first_reached([10, 100, 1000], [20, 60, 70], 62.5) == pytest.approx(100 * 10**0.25)
    assert first_reached((50, 200), [40.0, 50.0], 45.0) == pytest.approx(100)
    for level in (21, 33, 59.9):
        x = first_reached([14, 143], [20, 60], level)
        assert 14 < x < 143 and 20 + 40 * math.log(x / 14) / math.log(143 / 14) == pytest.approx(
            level
        )


def test_only_what_was_measured():
    """Below the smallest budget it says no less, above the largest nothing; a budget's own accuracy
    is that budget."""
    assert first_reached([10, 100], [20, 60], 5) == first_reached([10, 100], [20, 60], 20) == 10
    assert first_reached([10, 100], [20, 60], 60) == pytest.approx(100)
    assert first_reached([10, 100], [20, 60], 60.1) is None
    assert first_reached((50, 200), [40.0, 50.0], 30.0) == 50
    assert first_reached((50, 200), [40.0, 50.0], 51.0) is None
    assert first_reached([10], [20], 20.1) is None and first_reached([], [], 1) is None


def test_exactly_the_last_budget():
    """No rounding takes it beyond what was measured."""
    budgets = (10, 20, 50, 100, 150, 250, 500, 1000, 5000, 12812)
    pairs = [(few, many) for few in budgets for many in budgets if few < many]
    found = [first_reached(pair, (80.0, 95.0), 95.0) for pair in pairs]
    assert all(x <= many for x, (_, many) in zip(found, pairs, strict=True))
    assert found == pytest.approx([many for _, many in pairs])


def test_the_first_budget_that_counts():
    """Where smaller budgets' students did not learn, the first whose did is a bound, and no limit
    is safe by it."""
    found = results(weak={("none", 10), ("moco", 10)})
    row = reach_of(found, columns(found["config"])[1], "fidelity", 0.95)
    assert (row["queries"], row["low"], row["first"]) == (100.0, 100.0, 100)
    assert row["bounds"] == ["queries", "low"]
    limit = inverse(found, "fidelity", 0.95)
    assert limit["alone"] is None
    words = "100 queries, the smallest budget of an attack whose students learned, reach it already"
    assert limit["why"] == f"no limit is known, for {words}"
    assert answer(found)["text"].startswith("At most 100 queries")
    found = results()
    row = reach_of(found, columns(found["config"])[1], "fidelity", 0.95)
    assert row["bounds"] == [] and 10 < row["low"] < row["queries"] < 100
    assert inverse(found, "fidelity", 0.95)["alone"]


def test_the_first_time():
    """A curve that falls again counts where it first gets there; a flat one where it begins to
    rise."""
    assert first_reached([1, 10, 100, 1000], [10, 50, 30, 90], 40) == pytest.approx(10**0.75)
    assert first_reached((50, 200, 800), [40.0, 39.0, 49.0], 44.0) == pytest.approx(400)
    assert first_reached([1, 10, 100], [10, 10, 20], 15) == pytest.approx(10**1.5)


def test_another_attacks_bound():
    """An attack whose smaller budgets' students did not learn may need fewer than the other one's
    measured number: no limit is safe by that."""
    found = results(weak={("moco", 10)})
    measured, bound = (
        reach_of(found, column, "fidelity", 0.9) for column in columns(found["config"])[:2]
    )
    assert bound["bounds"] and (measured is None or not measured["bounds"])
    assert inverse(found, "fidelity", 0.9)["alone"] is None


@pytest.mark.slow
def test_report(finished, command, tmp_path):
    """The table beside the others, with prices where the config has one; by hand from the rows of
    students that learned; only what was run.

    The smaller budget is given as a number here and was run as the same images' share.
    """
    shutil.copytree(finished, tmp_path / "w")
    words = [word for word in TINY if "fractions" not in word and "queries" not in word]
    words += [
        "--config.fractions=(1.0,)",
        "--config.queries=71",
        "--config.reach=(0.1,0.5,1.0)",
        "--config.price=1.5",
    ]
    status, out, err = command(*words, f"--workdir={tmp_path}/w", "--stage=report", "--update")
    assert status == 0, err
    assert "| 71 (4.9 %)" in out and "| 1437 (100 %)" in out and "5 %)" not in out
    results = json.loads((tmp_path / "w/results.json").read_text())
    assert results["pool"]["budgets"] == [
        {"queries": 71, "fraction": 71 / 1437},
        {"queries": 1437, "fraction": 1.0},
    ]
    assert {row["fraction"] for row in results["rows"]} == {71 / 1437, 1.0} and len(
        results["rows"]
    ) == 12
    assert "At 1.5 per 1,000 calls that is 2.70." in out  # of 1,797
    table = out[out.index("Queries that reach a share") :].split("\n\n")[1].splitlines()
    assert "(price at 1.5 per 1,000)" in out and [
        line.split("|")[1].strip() for line in table[2:]
    ] == ["10 %", "50 %", "100 %"]
    metrics = {"accuracy": "top1", "fidelity": "fidelity_top1"}
    full = {"accuracy": results["target"]["top1"], "fidelity": 100}
    for row in results["reach"]:
        points = [
            (r["queries"]["train"], r[metrics[row["measure"]]])
            for r in results["rows"]
            if all(r[axis] == row[axis] for axis in ("init", "select", "access", "use"))
            and not r["undertrained"]
        ]
        level = row["share"] * full[row["measure"]]
        assert row["largest"] == max((queries for queries, _ in points), default=None)
        assert row["low"] == row["queries"] == row["high"]  # of one seed
        if not any(figure >= level for _, figure in points):
            assert row["queries"] is None
        elif points[0][1] >= level:
            assert row["queries"] == points[0][0]
        else:
            (_, few), (_, many) = points
            share = (level - few) / (many - few)
            assert row["queries"] == pytest.approx(71 ** (1 - share) * 1437**share)
    assert len(results["reach"]) == 2 * 3 * 6

    shutil.rmtree(tmp_path / "w/evaluate/moco-random-logits-asked-1437-seed0")
    status, out, _ = command(*words, f"--workdir={tmp_path}/w", "--stage=report")
    table = out[out.index("Queries that reach a share") :].split("\n\n")[1].splitlines()
    column = "moco", "random", "logits", "asked", "accuracy"
    axes = "init", "select", "access", "use", "measure"
    shown = [
        "at most 71 (0.11)" if row["queries"] == 71 else "not run yet"
        for row in results["reach"]
        if tuple(row[axis] for axis in axes) == column
    ]
    assert status == 0 and [line.split("|")[4].strip() for line in table[2:]] == shown
