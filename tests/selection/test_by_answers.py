"""Choosing by answers: against closed forms, and in the real command: its questions, its account,
its kills."""

import shutil
import sqlite3

import numpy as np
import pytest
import scipy.stats
from conftest import TINY, table

from qmx.data import load
from qmx.grid import cells
from qmx.main import parse
from qmx.selection.by_answers import BY_ANSWERS, entropy, margin, shares
from qmx.selection.orders import random_order
from qmx.stages.features import features
from qmx.stages.pretrain import pretrain
from qmx.stages.run import Run
from qmx.stages.select import select
from qmx.stages.target import target
from qmx.train import Stopped


def predicted(n=200, classes=10, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.5), n).astype(np.float32)


def certainty(way, p):
    if way == "entropy":
        return -scipy.stats.entropy(p.astype(np.float64), axis=1)
    high = np.sort(p.astype(np.float64), axis=1)
    return high[:, -1] - high[:, -2]


@pytest.mark.parametrize("way", BY_ANSWERS)
@pytest.mark.parametrize("number", [1, 17, 160])
def test_the_least_certain(way, number):
    """As many as asked for, none twice and none again, the least certain of the others, in that
    order."""
    p, asked = predicted(), np.random.default_rng(1).permutation(200)[:40]
    ids = BY_ANSWERS[way](p, asked, number)
    assert ids.dtype == np.int64 and len(ids) == number == len(set(ids.tolist()))
    assert not set(ids.tolist()) & set(asked.tolist())
    scores = certainty(way, p)
    left = np.setdiff1d(np.arange(200), asked)
    np.testing.assert_allclose(scores[ids], np.sort(scores[left])[:number], rtol=1e-9)


def test_they_differ():
    """Two classes that are nearly equal beside a third, and one that is a little ahead of nine."""
    p = np.array([[0.5, 0.5, 0.0, 0.0], [0.34, 0.22, 0.22, 0.22], [1.0, 0.0, 0.0, 0.0]], np.float32)
    nobody = np.array([], np.int64)
    assert margin(p, nobody, 3).tolist() == [0, 1, 2]
    assert entropy(p, nobody, 3).tolist() == [1, 0, 2]


@pytest.mark.parametrize("way", BY_ANSWERS)
def test_ties(way):
    """Equal ones in the pool's order, the asked ones left out; all certain or all uniform is such a
    tie."""
    for row in (np.full(4, 0.25), np.eye(4)[1]):
        p = np.tile(row.astype(np.float32), (30, 1))
        assert BY_ANSWERS[way](p, np.array([0, 2, 5]), 4).tolist() == [1, 3, 4, 6]
    p = np.tile(np.eye(4, dtype=np.float32)[1], (30, 1))
    p[[7, 21]] = 0.25
    assert BY_ANSWERS[way](p, np.array([0]), 4).tolist() == [7, 21, 1, 2]


def test_shares():
    """They add up, differ by one at most, and none is empty."""
    assert shares(14, 2) == [5, 5, 4] and shares(2, 5) == [1, 1] and shares(1, 2) == [1]
    for budget in range(1, 40):
        for rounds in range(1, 12):
            found = shares(budget, rounds)
            assert (
                sum(found) == budget
                and len(found) == min(rounds + 1, budget)
                and max(found) - min(found) <= 1
            )


# Without those that are given anew below: tuples given twice would be joined.
SHORT = [word for word in TINY if not word.startswith(("--config.seeds", "--config.fractions"))]
MARGIN = [*SHORT, "--config.inits=('moco',)", "--config.selects=('margin',)", "--config.also=()"]
SEED, SEEDS = "--config.seeds=(0,)", "--config.seeds=(0,1,2)"
SMALL, BOTH = "--config.fractions=(0.05,)", "--config.fractions=(0.05,0.1)"
BESIDE = [
    *SHORT,
    SEED,
    BOTH,
    "--config.inits=('moco',)",
    "--config.also=('moco+margin','moco+margin+label')",
]


def chosen(workdir, name):
    with np.load(workdir / "select" / name / "ids.npz") as file:
        return file["ids"]


def purposes(workdir):
    """Images of each purpose in the ledger, and how many images were sent in all."""
    with sqlite3.connect(workdir / "ledger.sqlite") as db:
        by_purpose = dict(
            db.execute(
                "SELECT purpose, COUNT(*) FROM answers JOIN requests ON request = id GROUP BY 1"
            )
        )
        return by_purpose, db.execute("SELECT COALESCE(SUM(views), 0) FROM requests").fetchone()[0]


@pytest.fixture(scope="module")
def beside(command, tmp_path_factory):
    """The workdir of random and margin side by side, and of margin by labels, at two budgets."""
    workdir = tmp_path_factory.mktemp("answers") / "w"
    status, _, err = command(*BESIDE, f"--workdir={workdir}")
    assert status == 0, err
    return workdir


@pytest.mark.slow
def test_questions(beside):
    """A row's questions add up to its budget, the account to the distinct images; none is sent
    twice."""
    results = table(beside)
    rows = {(row["select"], row["access"], row["fraction"]): row for row in results["rows"]}
    assert len(rows) == 6
    for (way, _, fraction), row in rows.items():
        budget = {0.05: 71, 0.1: 143}[fraction]
        select = {0.05: 48, 0.1: 96}[fraction] if way == "margin" else 0
        assert row["queries"] == {"train": budget - select, "select": select, "report": 360}
        assert row["calls"] == budget + 360
    names = [
        f"{way}-{budget}-seed0"
        for way in ("random", "moco-margin-logits", "moco-margin-label")
        for budget in (71, 143)
    ]
    ids = {name: chosen(beside, name) for name in names}
    early = np.unique(
        np.concatenate(
            [
                found[: {71: 48, 143: 96}[len(found)]]
                for name, found in ids.items()
                if "margin" in name
            ]
        )
    )
    every = np.unique(np.concatenate(list(ids.values())))
    account = results["account"]
    assert account["purposes"] == {
        "train": len(every) - len(early),
        "select": len(early),
        "report": 360,
    }
    assert account["calls"] == account["images"] == account["views"] == len(every) + 360
    assert account["unanswered"] == 0


@pytest.mark.slow
def test_the_choice(beside):
    """Distinct images; the first share is the random selection's; what is chosen is not; access
    makes it another."""
    for budget in (71, 143):
        by_logits, by_label = (
            chosen(beside, f"moco-margin-{access}-{budget}-seed0") for access in ("logits", "label")
        )
        at_random = random_order(1437, 0)
        first = shares(budget, 2)[0]
        for ids in (by_logits, by_label):
            assert len(ids) == budget == len(set(ids.tolist()))
            np.testing.assert_array_equal(ids[:first], at_random[:first])
            assert not np.array_equal(ids, at_random[:budget])
        assert not np.array_equal(by_logits, by_label)


@pytest.mark.slow
def test_again_asks_nothing(beside, command):
    """A second call finds everything done."""
    before = purposes(beside)
    status, _, err = command(*BESIDE, f"--workdir={beside}")
    assert status == 0 and "all of it was done before" in err
    assert purposes(beside) == before


@pytest.mark.slow
def test_alone(beside, command, tmp_path):
    """One column at one budget, stage by stage in its own workdir, chooses the same and
    learns the same."""
    for stage in ("target", "pretrain", "select"):
        status, _, err = command(
            *MARGIN, SEED, SMALL, f"--workdir={tmp_path}/w", f"--stage={stage}"
        )
        assert status == 0, err
    assert purposes(tmp_path / "w") == (
        {"select": 48},
        48,
    ), "all rounds but the last were asked in this stage"
    for stage in ("query", "monitor", "distill", "evaluate", "report"):
        status, _, err = command(
            *MARGIN, SEED, SMALL, f"--workdir={tmp_path}/w", f"--stage={stage}"
        )
        assert status == 0, err
        if stage == "query":
            (tmp_path / "w/target/target.safetensors").unlink()
    name = "moco-margin-logits-71-seed0"
    np.testing.assert_array_equal(chosen(tmp_path / "w", name), chosen(beside, name))
    (row,) = table(tmp_path / "w")["rows"]
    assert row in table(beside)["rows"]
    assert table(tmp_path / "w")["account"]["purposes"] == {
        "train": 23,
        "select": 48,
        "report": 360,
    }


@pytest.mark.slow
def test_budget_between_rounds(command, tmp_path):
    """Status 3 before a round that the budget does not hold, nothing of it sent; a larger one goes
    on from there."""
    status, out, err = command(
        *MARGIN, SEEDS, SMALL, f"--workdir={tmp_path}/w", "--config.budget=100"
    )
    assert status == 3 and not out, err
    asked, sent = purposes(tmp_path / "w")
    assert asked.keys() == {"select"} and 76 < sent == asked["select"] <= 100
    assert f"{sent} of 100 queries are spent and 2" in err.splitlines()[-1]
    assert not (tmp_path / "w/select/moco-margin-logits-71-seed2/result.json").exists()
    status, _, err = command(
        *MARGIN, SEEDS, SMALL, f"--workdir={tmp_path}/w", "--config.budget=300", "--update"
    )
    assert status == 0, err
    together = np.concatenate(
        [chosen(tmp_path / "w", f"moco-margin-logits-71-seed{seed}") for seed in range(3)]
    )
    asked, sent = purposes(tmp_path / "w")
    assert sent == sum(asked.values()) == len(set(together.tolist())) + 360
    assert table(tmp_path / "w")["account"]["purposes"] == {"train": 0, **asked}


@pytest.mark.slow
def test_stopped_between_rounds(beside, tmp_path):
    """Stopped after the first round, and killed after the second: the same choice, and only what is
    missing is sent."""
    shutil.copytree(beside, tmp_path / "w")
    name = "moco-margin-logits-71-seed0"
    want = chosen(beside, name)
    shutil.rmtree(tmp_path / "w/select" / name)
    for path in (tmp_path / "w").glob("ledger.sqlite*"):
        path.unlink()
    config = parse(["qmx", *BESIDE, f"--workdir={tmp_path}/w"]).config
    (cell,) = (
        cell
        for cell in cells(config, 1437)
        if (cell.select, cell.access, cell.queries) == ("margin", "logits", 71)
    )

    def go(stopped):
        run = Run(config, tmp_path / "w", load(**config.data), "select", stopped, [])
        rows = features(run, pretrain(run, *cell.start))
        return select(run, cell, rows, target(run)).ids

    with pytest.raises(Stopped, match="round 0"):
        go(lambda: True)
    assert purposes(tmp_path / "w") == ({"select": 24}, 24)
    assert not (tmp_path / "w/select" / name / "result.json").exists()
    np.testing.assert_array_equal(go(lambda: False), want)
    assert purposes(tmp_path / "w") == ({"select": 48}, 48)
    (tmp_path / "w/select" / name / "result.json").unlink()
    np.testing.assert_array_equal(go(lambda: False), want)
    assert purposes(tmp_path / "w") == ({"select": 48}, 48)
