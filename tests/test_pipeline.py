"""The real command, end to end and stage by stage, on a few steps of everything."""

import hashlib
import json
import shutil
import sqlite3
import time

import jsonschema
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, TINY, table

from qmx import __version__


@pytest.mark.slow
def test_results(finished):
    """results.json has the keys that scripts rely on, one row for each run, and figures in their
    ranges."""
    results = json.loads((finished / "results.json").read_text())
    assert results["schema"] == 2
    jsonschema.validate(results, json.loads((ROOT / "qmx/report/results.schema.json").read_text()))
    assert (
        len(results["target"]["sha256"]) == 64
        and 0 < results["target"]["top1"] <= results["target"]["top5"] <= 100
    )
    assert results["pool"]["size"] == 1437 and results["pool"]["evaluation"] == 360
    assert results["pool"]["budgets"] == [
        {"queries": 71, "fraction": 0.05},
        {"queries": 1437, "fraction": 1.0},
    ]
    assert results["versions"]["qmx"] == __version__
    assert results["config"]["pretrain"]["moco"]["epochs"] == 1
    axes = ("init", "select", "access", "use", "fraction", "seed")
    cells = {tuple(row[axis] for axis in axes) for row in results["rows"]}
    columns = [
        *((init, "random", "logits", "asked") for init in ("none", "rotation", "moco", "simsiam")),
        ("moco", "maxherding", "logits", "asked"),
        ("moco", "maxherding", "logits", "pool"),
    ]
    assert cells == {(*column, fraction, 0) for column in columns for fraction in (0.05, 1.0)}
    assert len(results["rows"]) == 12
    target = results["target"]["top1"]
    for row in results["rows"]:
        train = {0.05: 71, 1.0: 1437}[row["fraction"]]
        assert row["queries"] == {"train": train, "select": 0, "report": 360}
        assert row["calls"] == train + 360
        assert (
            0 <= row["top1"] <= row["top5"] <= 100
            and 0 <= row["fidelity_top1"] <= row["fidelity_top5"] <= 100
        )
        assert row["kl_target_student"] > 0 and row["seconds"] > 0
        # What label agreement can be, given both accuracies (in per cent of the same images).
        assert (
            row["top1"] + target - 100 - 1e-9
            <= row["fidelity_top1"]
            <= 100 - abs(target - row["top1"]) + 1e-9
        )
        # Of images of one kind, a tenth of a pool that was asked about in whole.
        if row["fraction"] == 1:
            assert abs(row["fidelity_asked"] - row["fidelity_top1"]) < 15
        assert row["undertrained"] == (row["fidelity_asked"] < 80)
        name = "-".join(str(row[axis]) for axis in axes[:4])
        with np.load(finished / f"evaluate/{name}-{train}-seed0/named.npz") as named:
            same = named["student"] == named["target"]
            assert 100 * same.mean() == pytest.approx(row["fidelity_top1"])
            worst = [100 * same[named["target"] == k].mean() for k in range(10)]
            assert row["worst_class"]["fidelity"] == pytest.approx(min(worst))
    honest = results["access"][0]  # as they are, so that honest users get what the target has
    assert honest["top1"] == target and 0 < honest["calibration_error"] < 50
    assert results["provenance"]["command"].startswith("qmx --config=configs/digits.py:float32 ")
    assert {(m["init"], m["knn_k"]) for m in results["monitors"]} == {
        ("rotation", 5),
        ("moco", 5),
        ("simsiam", 5),
    }


@pytest.mark.slow
def test_artefacts(finished):
    """Each stage left what the design names; the curve is a picture; nothing half-written is
    about."""
    for path in (
        "config.json",
        "target/target.safetensors",
        "pretrain/moco-seed0/encoder.safetensors",
        "monitor/moco-seed0/result.json",
        "select/random-1437-seed0/ids.npz",
        "ledger.sqlite",
        "query/keys.npz",
        "select/moco-maxherding-71-seed0/ids.npz",
        "select/features-moco-seed0/features.npy",
        "distill/moco-random-logits-asked-71-seed0/metrics.jsonl",
        "evaluate/none-random-logits-asked-1437-seed0/result.json",
        "report.md",
        "report.html",
    ):
        assert (finished / path).stat().st_size > 0, path
    assert matplotlib.image.imread(finished / "curve.png").shape[:2] == (576, 1200)
    assert not list(finished.rglob("*.part")) and not list(finished.rglob("checkpoints"))
    lines = [
        json.loads(line)
        for line in (finished / "pretrain/moco-seed0/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 12))
    assert {"loss", "contrast_acc1", "contrast_acc5", "z_std"} <= lines[0].keys()
    page = (finished / "report.html").read_text()
    assert page.count("<svg ") == 2
    with open(finished / "report.sha256") as sums:
        for digest, name in (line.split() for line in sums):
            assert hashlib.sha256((finished / name).read_bytes()).hexdigest() == digest


@pytest.mark.slow
def test_second_call_finds_it_done(finished, process):
    """A second call trains nothing, asks nothing, says so, prints the same table, and takes
    seconds."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")}
    began = time.monotonic()
    status, out, err = process(*TINY, f"--workdir={finished}")
    assert status == 0 and "all of it was done before" in err
    assert time.monotonic() - began < 30
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")}
    assert out.rstrip().splitlines()[-1].startswith("| 1437 (100 %)")
    assert out.rstrip().endswith(
        (finished / "report.md").read_text().split("## ")[1].split("\n\n")[1].rstrip()
    )


@pytest.mark.slow
def test_stage_by_stage_without_the_target(finished, command, tmp_path):
    """Each stage in a call of its own gives the same table; from the query on the target is
    gone. test_kill.py has processes of their own."""
    for stage in ("target", "pretrain", "monitor", "select", "query"):
        assert command(*TINY, f"--workdir={tmp_path}/w", f"--stage={stage}")[0] == 0, stage
    (tmp_path / "w/target/target.safetensors").unlink()
    for stage in ("distill", "evaluate", "report"):
        status, _, err = command(*TINY, f"--workdir={tmp_path}/w", f"--stage={stage}")
        assert status == 0, (stage, err)
    assert table(tmp_path / "w") == table(finished)


@pytest.mark.slow
def test_stages_out_of_order(finished, command, tmp_path):
    """A stage whose inputs are missing names them and the stage that makes them."""
    status, _, err = command(*TINY, f"--workdir={tmp_path}/w", "--stage=distill")
    assert status == 2 and len(err.splitlines()) == 1 and not (tmp_path / "w").exists()
    shutil.copytree(finished, tmp_path / "w")
    shutil.rmtree(tmp_path / "w/pretrain/moco-seed0")
    status, _, err = command(*TINY, f"--workdir={tmp_path}/w", "--stage=distill")
    assert status == 2 and "moco-seed0, which --stage=pretrain makes" in err.splitlines()[-1]


@pytest.mark.slow
def test_partial_report(finished, command, tmp_path):
    """What is not there yet is shown so."""
    shutil.copytree(finished, tmp_path / "w")
    shutil.rmtree(tmp_path / "w/evaluate/moco-random-logits-asked-1437-seed0")
    status, out, _ = command(*TINY, f"--workdir={tmp_path}/w", "--stage=report")
    assert status == 0
    last = [cell.strip() for cell in out.rstrip().splitlines()[-1].strip("|").split("|")]
    assert last[3] == "not run yet" and "not run yet" not in (last[1], last[2], last[4])

    # What another config made is not shown as this one's, and it is not thrown away either.
    results = sorted((tmp_path / "w").glob("*/*/result.json"))
    status, out, _ = command(
        *TINY,
        f"--workdir={tmp_path}/w",
        "--stage=report",
        "--update",
        "--config.distill.learning_rate=0.05",
    )
    last = [cell.strip() for cell in out.rstrip().splitlines()[-1].strip("|").split("|")]
    assert status == 0 and last[1:] == ["not run yet"] * 6
    assert sorted((tmp_path / "w").glob("*/*/result.json")) == results


@pytest.mark.slow
def test_another_config(finished, command, tmp_path):
    """A workdir of another config is refused with the key; --update redoes what depends on it, and
    no more."""
    shutil.copytree(finished, tmp_path / "w")
    change = "--config.distill.learning_rate=0.05"
    status, _, err = command(*TINY, change, f"--workdir={tmp_path}/w")
    assert status == 2 and len(err.splitlines()) == 1
    assert "distill.learning_rate: 0.03 there, 0.05 now" in err and "--update" in err
    assert table(tmp_path / "w") == table(finished)

    kept = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "w").glob("[pst]*/**/result.json")
    }
    status, _, err = command(*TINY, change, f"--workdir={tmp_path}/w", "--update")
    assert (
        status == 0 and "is done again, because distill.learning_rate: 0.03 there, 0.05 now" in err
    )
    assert kept == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "w").glob("[pst]*/**/result.json")
    }
    new, old = table(tmp_path / "w"), table(finished)
    assert new["account"] == old["account"], "another recipe asks nothing new"
    assert all(
        a["kl_target_student"] != b["kl_target_student"]
        for a, b in zip(new["rows"], old["rows"], strict=True)
    )


@pytest.mark.slow
def test_workdir_of_version_0_1(finished, command, tmp_path):
    """A run of qmx 0.1 is refused in one line; --update does its stages again and asks nothing."""
    shutil.copytree(finished, tmp_path / "w")
    for path in (tmp_path / "w").rglob("inputs.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "qmx": "0.1.0"}))
        (path.parent / "SHA256SUMS").unlink()  # which came later
    config = json.loads((tmp_path / "w/config.json").read_text())
    del config["qmx"]
    (tmp_path / "w/config.json").write_text(json.dumps(config))
    fewer = [*TINY, f"--workdir={tmp_path}/w", "--config.inits=('none',)", "--config.also=()"]
    status, out, err = command(*fewer)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert "was made by qmx 0.1.0, and this is qmx 0.2" in err and "--update" in err

    status, _, err = command(*fewer, "--update")
    assert status == 0 and 'target is done again, because qmx: "0.1.0" there' in err, err
    assert table(tmp_path / "w")["account"] == table(finished)["account"]
    status, _, err = command(*fewer)
    assert status == 0 and "all of it was done before" in err, err


@pytest.mark.slow
def test_budgets_do_not_meet(finished, command, tmp_path):
    """A student is the same whether or not smaller budgets ran before it in the same
    call."""
    # Tuples given twice would be joined.
    tiny = [word for word in TINY if "fractions" not in word]
    status, _, err = command(
        *tiny,
        f"--workdir={tmp_path}/w",
        "--config.fractions=(1.0,)",
        "--config.inits=('none','moco')",
    )
    assert status == 0, err
    alone = table(tmp_path / "w")["rows"]
    together = [
        row
        for row in table(finished)["rows"]
        if row["fraction"] == 1 and row["init"] in ("none", "moco")
    ]
    assert alone == together


@pytest.mark.slow
@pytest.mark.parametrize("access", ["probs", "label"])
def test_weaker_access_asks_nothing_new(finished, command, tmp_path, access):
    """Weaker access levels are derived from the answers that were paid for."""
    shutil.copytree(finished, tmp_path / "w")
    status, _, err = command(
        *TINY,
        f"--workdir={tmp_path}/w",
        f"--config.accesses=('{access}',)",
        "--config.inits=('none',)",
        "--config.also=()",
        "--update",
    )
    assert status == 0 and "query" not in err, err
    new = table(tmp_path / "w")
    assert new["account"] == table(finished)["account"]
    assert {row["access"] for row in new["rows"]} == {access}


@pytest.mark.slow
def test_access_levels(finished, command, tmp_path):
    """Five levels of access ask exactly what one does, and stand side by side; a weaker one makes
    another student."""
    shutil.copytree(finished, tmp_path / "w")
    status, out, err = command(
        *TINY,
        f"--workdir={tmp_path}/w",
        "--config.inits=('none',)",
        "--config.also=()",
        "--update",
        "--config.accesses=('logits','probs','top5','rounded2','label')",
    )
    assert status == 0, err
    new, old = table(tmp_path / "w"), table(finished)
    assert new["account"] == old["account"]
    rows = {(row["access"], row["fraction"]): row for row in new["rows"]}
    assert rows["logits", 0.05] in old["rows"]
    for fraction in (0.05, 1):
        full, same, *weaker = (
            rows[level, fraction]["kl_target_student"]
            for level in ("logits", "probs", "top5", "rounded2", "label")
        )
        # Up to the rounding of a logarithm of a softmax.
        assert same == pytest.approx(full, rel=1e-3)
        assert len({full, *weaker}) == 4
    found = (
        out[out.index("Access to the answers, none + random + asked") :]
        .split("\n\n")[1]
        .splitlines()
    )
    assert [line.split("|")[1].strip() for line in found[2:]] == [
        "logits",
        "probs",
        "top5",
        "rounded2",
        "label",
    ]


@pytest.mark.slow
def test_self_labelled_students(finished, command, tmp_path):
    """They ask nothing new, at any budget and from nothing too, and take as many steps as they are
    told."""
    shutil.copytree(finished, tmp_path / "w")
    status, out, err = command(
        *TINY,
        f"--workdir={tmp_path}/w",
        "--config.inits=('none',)",
        "--update",
        "--config.also=('none+fixmatch','moco+maxherding+fixmatch')",
        "--config.fixmatch.mu=2",
        "--config.fixmatch.epochs=0.4",
        "--config.fixmatch.decay=0.8",
    )
    assert status == 0, err
    new, old = table(tmp_path / "w"), table(finished)
    assert new["account"] == old["account"]
    rows = [row for row in new["rows"] if row["use"] == "fixmatch"]
    assert {(row["init"], row["select"], row["fraction"]) for row in rows} == {
        (*column, fraction)
        for column in (("none", "random"), ("moco", "maxherding"))
        for fraction in (0.05, 1)
    }
    assert all(
        row["queries"]
        == {
            "train": {0.05: 71, 1: 1437}[row["fraction"]],
            "select": 0,
            "report": 360,
        }
        for row in rows
    )
    assert "| none + fixmatch" in out and "| moco + maxherding + fixmatch" in out
    folder = tmp_path / "w/distill/none-random-logits-fixmatch-71-seed0"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (
        len(lines) == 18  # 0.4 x 1437 / (2 x 16)
        and {"agreement_top1", "confident", "pool_agreement", "pool_loss"} <= lines[0].keys()
    )


@pytest.mark.slow
def test_labels_instead_of_scores(finished, command, tmp_path):
    """By one key the students learn the true labels of the same images."""
    shutil.copytree(finished, tmp_path / "w")
    status, _, err = command(
        *TINY,
        f"--workdir={tmp_path}/w",
        "--config.distill.learn_from=labels",
        "--config.inits=('none',)",
        "--config.also=()",
        "--update",
    )
    assert status == 0, err
    new = table(tmp_path / "w")["rows"]
    old = [row for row in table(finished)["rows"] if row["init"] == "none"]
    assert all(
        a["kl_target_student"] != b["kl_target_student"] for a, b in zip(new, old, strict=True)
    )


@pytest.mark.slow
def test_budget(finished, command, tmp_path):
    """Exit status 3 before the target is asked, with what was spent; a budget that suffices is no
    hindrance."""
    status, out, err = command(*TINY, f"--workdir={tmp_path}/w", "--config.budget=1436")
    assert status == 3 and not out and len(err.splitlines()) == 1 and not (tmp_path / "w").exists()
    assert "1437 distinct images" in err and "1436" in err and "0 spent" in err
    shutil.copytree(finished, tmp_path / "w")
    status, _, err = command(*TINY, f"--workdir={tmp_path}/w", "--config.budget=1000", "--update")
    assert status == 3 and "1437 spent" in err
    assert command(*TINY, f"--workdir={tmp_path}/w", "--config.budget=1437", "--update")[0] == 0


@pytest.mark.slow
def test_nothing_was_asked_twice(finished):
    """The ledger's account: every call answered a distinct image, none is in flight."""
    account = table(finished)["account"]
    assert account == {
        "calls": 1797,
        "images": 1797,
        "views": 1797,
        "lost": 0,
        "unanswered": 0,
        "failed": 0,
        "retried": 0,
        "purposes": {"train": 1437, "select": 0, "report": 360},
        "refused": 0,
    }
    with sqlite3.connect(finished / "ledger.sqlite") as db:
        assert db.execute("SELECT COUNT(*), COUNT(DISTINCT image) FROM answers").fetchone() == (
            1797,
            1797,
        )
