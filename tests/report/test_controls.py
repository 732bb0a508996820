"""Controls: true labels in the place of answers, and a function that asks nothing; and a network
that learns a public encoder's features before it asks."""

import json
import re
import textwrap

import jsonschema
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_report import SCHEMA, results

from qmx import checks
from qmx.data import load
from qmx.grid import TRUE_LABELS, attacks, cells, columns, encoders
from qmx.report import files
from qmx.report.audit import audit
from qmx.report.beyond import beyond, first_figure
from qmx.report.reach import fewest, ranked, reached
from qmx.selection.by_features import maxherding, unit
from qmx.selection.patches import beside
from qmx.settings import base

# Fidelity of students of true labels, for each seed; those of answers are test_report.CURVES.
LABELS = {
    "none": ({10: 100.0, 100: 100.0, 1000: 100.0}, {10: 100.0, 100: 100.0, 1000: 100.0}),
    "moco": ({10: 65.0, 100: 90.0, 1000: 92.0}, {10: 70.0, 100: 91.0, 1000: 90.0}),
}


def with_control(weak=(), **names):
    """`results` with a control of each attack; `weak` are (init, queries, seed) of controls that
    did not learn."""
    found = results({"accesses": ("logits", TRUE_LABELS)}, **names)
    for row in list(found["rows"]):
        fidelity = LABELS[row["init"]][row["seed"]][row["queries"]["train"]]
        lost = (row["init"], row["queries"]["train"], row["seed"]) in weak
        more = {"access": TRUE_LABELS, "fidelity_top1": fidelity, "undertrained": lost}
        found["rows"].append({**row, **more})
    found["reach"] = reached(found)
    found["audit"] = audit(found, None)
    return found


def test_beyond_true_labels(tmp_path):
    """Seed by seed, then the mean and the deviation; the report begins with that of the strongest
    attack at the smallest budget that copies the model; it is everywhere."""
    found = with_control()
    rows = {(row["init"], row["queries"]): row for row in beyond(found)}
    assert len(rows) == 6
    moco = rows["moco", 100]  # 94 - 90 and 98 - 91
    assert (moco["beyond"], moco["fidelity"], moco["labels"]) == (5.5, 96.0, 90.5)
    assert moco["deviation"] == pytest.approx(4.5**0.5) and moco["seeds"] == 2
    assert rows["none", 10]["beyond"] == -55.0  # 40 and 50, less 100
    assert first_figure(found) == moco == found["audit"]["answer"]["beyond_labels"]
    assert found["audit"]["controls"]["beyond_labels"] == beyond(found)
    told = (
        "The model's answers to 100 images gave a copy +5.5 points of fidelity beyond true labels"
        " of the same images (moco + logits: 96.0 against 90.5 %). 90 queries"
    )
    assert found["audit"]["answer"]["text"].startswith(told)
    text = files.write(tmp_path, found)
    jsonschema.validate(json.loads((tmp_path / "results.json").read_text()), SCHEMA)
    report, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    cell = "+5.5 ± 2.1 (96.0 - 90.5)"
    assert cell in text and report.index("Fidelity beyond true labels") < report.index("Accuracy,")
    row = next(line for line in report.splitlines() if cell in line)
    assert row.startswith("| 100 (5 %)") and "-18.0 ± 2.8 (82.0 - 100.0)" in row
    assert re.search(r"<caption>Fidelity beyond.*\+5\.5 ±\u00a02\.1", page, re.DOTALL)
    assert page.index("Fidelity beyond") < page.index("<svg")


def test_controls_are_no_attacks():
    """They count in no answer, limit or rank, however well they do; who is audited is told what
    answers give, not what labels do."""
    found, plain = with_control(), results()
    assert [column.access for column in attacks(found["config"])] == ["logits"] * 2
    for share in (0.5, 0.95, 0.99):
        one, other = (fewest(of, "fidelity", share) for of in (found, plain))
        assert one == other
    assert [column.access for column in ranked(found)] == ["logits"] * 2 + [TRUE_LABELS] * 2
    assert ranked(found)[0].init == "moco"
    ours, theirs = found["audit"], plain["audit"]
    assert ours["largest_limits"] == theirs["largest_limits"]
    assert ours["attacker"] == theirs["attacker"]
    assert ours["not_tried"] == theirs["not_tried"] and ours["access"] == theirs["access"]
    assert {row["access"] for row in ours["controls"]["labels"]} == {TRUE_LABELS}
    assert theirs["controls"]["labels"] is None is theirs["controls"]["beyond_labels"]
    assert theirs["answer"]["beyond_labels"] is None


def test_pairs_that_lack_a_side():
    """Only seeds that have both sides, and learned; a cell without such a seed says why."""
    found = with_control(weak=[("moco", 100, 0), ("moco", 10, 0), ("moco", 10, 1)])
    found["rows"] = [
        row
        for row in found["rows"]
        if (row["init"], row["access"], row["queries"]["train"]) != ("none", TRUE_LABELS, 10)
    ]
    rows = {(row["init"], row["queries"]): row for row in beyond(found)}
    assert ("none", 10) not in rows and ("moco", 10) not in rows
    one = rows["moco", 100]
    assert (one["beyond"], one["seeds"], one["deviation"]) == (7.0, 1, None)
    from qmx.report.beyond import beyond_table

    first = beyond_table(found).rows[0]
    assert first[1:] == ["not run yet", "not trained"]
    assert first_figure(found) == one


def test_a_function_that_asks_nothing(tmp_path):
    """In the sentence, in the table beside one class for every image, in the file."""
    found = results()
    found["zero_queries"]["function"] = {
        **{"name": "scores of <b>.py", "sha256": "0f" * 32, "top1": None, "top5": None},
        **{"fidelity_top1": 71.25, "fidelity_top5": 90.0},
    }
    found["audit"] = audit(found, None)
    told = found["audit"]["answer"]["text"]
    assert told.endswith("Without any query, scores of <b>.py agrees with your model on 71.2 %.")
    files.write(tmp_path, found)
    jsonschema.validate(json.loads((tmp_path / "results.json").read_text()), SCHEMA)
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if "| " in line]
    assert any("one class for every image" in row and "52.0" in row for row in rows)
    assert any("no labels" in row and "71.2" in row for row in rows)
    assert "scores of &lt;b&gt;.py" in (tmp_path / "report.html").read_text()


def changed(**changes):
    config = ConfigDict(base())
    config.update(inits=("none", "moco"), fractions=(), queries=(20,))
    config.update(changes)
    return config


def test_columns():
    """A control for each column whose images do not depend on answers; one that is nobody's is
    refused."""
    both = ("logits", TRUE_LABELS)
    found = columns(changed(accesses=both, selects=("random", "margin")))
    assert [(c.init, c.select, c.access) for c in found] == [
        *(("none", "random", access) for access in both),
        *(("moco", "random", access) for access in both),
        ("moco", "margin", "logits"),
    ]
    found = columns(changed(also=("moco+true_labels",)))
    assert found[-1].access == TRUE_LABELS and len(found) == 3
    for also in ("moco+typiclust+true_labels", "moco+margin+true_labels"):
        with pytest.raises(ValueError, match="a control, and no column asks about the same images"):
            columns(changed(also=("moco+margin", also)))
    with pytest.raises(ValueError, match="accesses has 'true_labels' alone, a control; add answ"):
        columns(changed(accesses=(TRUE_LABELS,)))


def test_teachers():
    """An encoder that learns another's features brings it along, before itself; weights of its own
    need none; only one that stays as it is can teach."""
    config = changed(inits=("none", "features"))
    assert encoders(config) == ["public", "features"]
    assert {cell.init for cell in cells(config, 100)} == {"none", "features"}
    data = load("digits")
    with pytest.raises(ValueError, match="the init 'public' needs --config.pretrain.public.path"):
        checks.validate(config, data)
    config.pretrain.features.of = "moco"
    for stage in ("all", "pretrain"):
        with pytest.raises(ValueError, match="pretrain.features.of has the .*'moco'; choose among"):
            checks.validate(config, data, stage)
    config.pretrain.features.path = "weights.pth"
    assert encoders(config) == ["features"]
    unlabelled = data._replace(pool=data.pool._replace(labels=data.pool.labels[:0]))
    with pytest.raises(ValueError, match="accesses has 'true_labels', which reads labels"):
        checks.validate(changed(accesses=("logits", TRUE_LABELS), inits=("none",)), unlabelled)


def test_heads():
    """One on a network that learned features has them from their encoder; one on labels is a
    control; both are refused before anything is paid."""
    data = load("digits")
    config = changed(inits=("none", "features"), also=("features+head",))
    config.pretrain.public.path = __file__
    with pytest.raises(ValueError, match="heads on features, which learns the features of public"):
        checks.validate(config, data)
    config = changed(inits=("none", "public"))
    config.pretrain.public.path = __file__
    config.distill.learn_from = "labels"
    with pytest.raises(ValueError, match="distill.learn_from 'labels' is for students that are no"):
        checks.validate(config, data)
    config.distill.learn_from = "scores"
    checks.validate(config, data)


OWN = """
    import numpy as np

    MIX = np.random.default_rng(0).normal(size=(128, 10))


    def features(images):
        x = images.reshape(len(images), 64).astype(np.float32) / 255
        return np.concatenate([x, x**2], 1)


    def target(images):
        return (features(images) - 0.3) @ MIX


    def zero(images):
        return target(images) + np.random.default_rng(1).normal(size=10) * 3
"""
CONFIG = """
    import runpy


    def get_config():
        config = runpy.run_path("configs/digits.py")["get_config"]("float32")
        config.update(seeds=(0,), queries=(60,), fractions=(), also=())
        config.inits, config.accesses = ("public",), ("logits", "true_labels")
        config.data.limit = 200
        config.student.arch = "resnet8_narrow"
        config.target.update(kind="callable", path="{here}/own.py:target")
        config.pretrain.public.update(kind="callable", path="{here}/own.py:features", licence="MIT")
        config.pretrain.features.update(epochs=6.0, batch_size=40)
        config.head.update(folds=2, decays=(1e-2, 1e-4), temperatures=(1.0,))
        config.audit.zero = "{here}/own.py:zero"
        return config
"""


@pytest.fixture
def own(tmp_path):
    """Arguments of a config with functions of its own."""
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG).replace("{here}", str(tmp_path)))
    return f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"


@pytest.mark.slow
def test_features_are_learned(own, command, tmp_path):
    """By a small network, without a query; the stage pretrain makes all that it takes."""
    words = (*own, "--config.inits=('features',)", "--config.accesses=('logits',)")
    status, out, err = command(*words, "--stage=pretrain")
    assert status == 0, err
    folder = tmp_path / "run/pretrain/features-seed0"
    assert str(folder / "encoder.safetensors") in out
    assert not (tmp_path / "run/ledger.sqlite").exists()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["loss"] == pytest.approx(2 - 2 * lines[-1]["similarity"], abs=1e-5)
    inputs = json.loads((folder / "inputs.json").read_text())
    taught = json.loads((tmp_path / "run/pretrain/public/result.json").read_text())
    assert inputs["features"] == taught["sha256"]
    status, _, err = command(*words, "--stage=pretrain")
    assert status == 0 and "all of it was done before" in err


@pytest.mark.slow
def test_a_teachers_features(own, command, tmp_path):
    """They choose images and spread answers for the network that learned them, whose own are not
    even made."""
    words = "--config.inits=('features',)", "--config.also=('features+maxherding+pool',)"
    status, _, err = command(
        *own, *words, "--config.accesses=('logits',)", "--config.distill.min_steps=2"
    )
    assert status == 0, err
    workdir = tmp_path / "run"
    assert "60 of 200 images by the features of public seed 0" in err
    assert not (workdir / "select/features-features-seed0").exists()
    rows = unit(np.load(workdir / "select/features-public/features.npy"))
    rows = beside(rows, np.load(workdir / "select/patches/patches.npy"), 1.0)
    want = maxherding(rows, 60, np.random.default_rng(0), 10)
    with np.load(workdir / "select/public-maxherding-60-seed0/ids.npz") as file:
        np.testing.assert_array_equal(file["ids"], want)
    student = workdir / "distill/features-maxherding-logits-pool-60-seed0/inputs.json"
    taught = json.loads((workdir / "pretrain/public/result.json").read_text())
    assert json.loads(student.read_text())["features"] == taught["sha256"]


@pytest.mark.slow
def test_controls_of_a_run(own, command, tmp_path):
    """A head that learned answers beside one that learned labels of the same images, and a function
    that asks nothing."""
    status, out, err = command(*own)
    assert status == 0, err
    found = json.loads((tmp_path / "run/results.json").read_text())
    jsonschema.validate(found, SCHEMA)
    ours, control = found["rows"]
    assert (ours["access"], control["access"]) == ("logits", TRUE_LABELS)
    assert found["account"]["purposes"] == {"train": 60, "select": 0, "report": 200}
    (row,) = found["audit"]["controls"]["beyond_labels"]
    assert row["beyond"] == ours["fidelity_top1"] - control["fidelity_top1"]
    assert ours["kl_target_student"] < control["kl_target_student"]
    data = load("digits", limit=200)
    ids = np.load(tmp_path / "run/select/random-60-seed0/ids.npz")["ids"]
    assert control["fidelity_asked"] > 80  # with the labels that it was given, not with answers
    told = {}
    exec(textwrap.dedent(OWN), told)
    answers = told["target"](data.pool.shown(ids)).argmax(1)
    assert np.mean(answers == data.pool.labels[ids]) < 0.5
    images = data.evaluation.shown(np.arange(200))
    zero, target = told["zero"](images).argmax(1), told["target"](images).argmax(1)
    function = found["zero_queries"]["function"]
    assert function["fidelity_top1"] == pytest.approx(100 * np.mean(zero == target))
    assert function["top1"] == pytest.approx(100 * np.mean(zero == data.evaluation.labels))
    assert "zero of own.py agrees with your model on" in out and "licence MIT" in out

    status, _, err = command(*own)
    assert status == 0 and "all of it was done before" in err
