"""Images without labels, and pools alone: the table is fidelity, and what reads labels says so."""

import json
import re

import numpy as np
import pytest
from conftest import ONE_BLOCK
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image

from qmx import cautions, checks
from qmx.data import load, named
from qmx.data.folder import listing
from qmx.data.photos import remembered
from qmx.ledger.access import received
from qmx.main import parse
from qmx.metrics import compare
from qmx.settings import recipe
from qmx.stages.trial import oddity

RNG = np.random.default_rng(0)
POOL, OTHERS = (RNG.integers(0, 256, (size, 8, 8, 1), np.uint8) for size in (60, 30))
FUNCTION = """
import numpy as np

def f(images):
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    return flat @ np.random.default_rng(0).normal(size=(flat.shape[1], 7)).astype(np.float32)
"""


@pytest.fixture
def files(tmp_path):
    """The flags of a pool of 60 and an evaluation set of 30 images, and of a function of seven
    classes."""
    np.savez(tmp_path / "pool.npz", image=POOL)
    np.savez(tmp_path / "eval.npz", image=OTHERS)
    (tmp_path / "own.py").write_text(FUNCTION)
    return {
        "pool": f"--config.data.path={tmp_path}/pool.npz",
        "evaluation": f"--config.data.eval_path={tmp_path}/eval.npz",
        "target": f"--config.target.path={tmp_path}/own.py:f",
    }


SMALL = [
    *("--config=configs/digits.py:float32", ONE_BLOCK[0]),
    *("--config.seeds=(0,)", "--config.inits=('none',)"),
    *("--config.also=()", "--config.fractions=()", "--config.queries=(40,)"),
    *("--config.data.source=arrays", "--config.distill.batch_size=40"),
    *("--config.distill.min_steps=2", "--config.distill.epochs=0.1"),
]


def flat(root, count, seed):
    root.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(seed + i).integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    return root


def test_folders(tmp_path, capfd):
    """Photos in one folder have no labels; those beside class folders are named; each side may have
    labels or not, and the classes are those of the side that has."""
    pool, val = flat(tmp_path / "pool", 5, 0), flat(tmp_path / "val", 3, 50)
    photos, sizes = listing(str(pool))
    assert photos.names == tuple(f"{i}.png" for i in range(5)) and photos.size == 5
    assert len(photos.labels) == 0 and photos.class_names == ()
    assert sizes.tolist() == [(pool / f"{i}.png").stat().st_size for i in range(5)]
    keys = {"path": str(pool), "canvas": 8, "resize": 8, "crop": 8}
    data = load("folder", **keys, eval_path=str(val))
    assert (data.classes, data.pool.labelled, data.evaluation.labelled) == (0, False, False)
    assert data.pool.read(np.array([3, 1])).keys() == {"image", "size"}
    assert data.pool.shown(np.array([3])).shape == (1, 8, 8, 3)
    alone = load("folder", **keys)
    assert alone.evaluation.size == 0 and alone.pool_digest == data.pool_digest
    for kind in ("cat", "dog"):
        flat(tmp_path / "val" / kind, 2, 100 + ord(kind[0]))
    data = load("folder", **keys, eval_path=str(val))
    assert "val: 3 photos beside the class folders are not used: 0.png" in capfd.readouterr().err
    assert data.class_names == ("cat", "dog") and data.classes == 2
    assert not data.pool.labelled and data.evaluation.labels.tolist() == [0, 0, 1, 1]


def test_arrays(tmp_path, files):
    """No "label" on either side, or on one; the target's names leave the pool as it is."""
    pool, both = files["pool"].split("=")[1], tmp_path / "both.npz"
    np.savez(both, image=OTHERS, label=np.arange(30) % 3)
    data = load("arrays", path=pool, eval_path=str(both))
    assert data.classes == 3 and not data.pool.labelled and data.evaluation.labelled
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    of_target = named(data, str(tmp_path / "names.txt"))
    assert of_target.classes == 4 and of_target.pool_digest == data.pool_digest
    assert of_target.evaluation_digest != data.evaluation_digest
    np.testing.assert_array_equal(of_target.pool.read(np.arange(60))["image"], POOL)
    alone = load("arrays", path=pool)
    assert alone.evaluation.size == 0 and alone.classes == 0


def test_what_reads_labels(files):
    """It is refused in one line, whose cure works; before anything is spent."""
    words = ["qmx", *SMALL, files["pool"], files["evaluation"], "--workdir=none", files["target"]]
    changes = {
        "target.kind=train learns from labels.*--config.target.kind=callable": {
            "target.kind": "train",
            "target.path": "",
        },
        "'class_balanced' reads labels.*'typiclust' reads none": {"selects": ("class_balanced",)},
        "distill.learn_from 'labels' reads labels.*set it to 'scores'": {
            "distill.learn_from": "labels"
        },
        "monitor.linear trains on labels.*set it to False": {"monitor.linear": True},
    }

    def config(stage="all", **more):
        made = ConfigDict(parse([*words, "--config.target.kind=callable"]).config)
        made.update_from_flattened_dict(more)
        data = load(**made.data)
        made = FrozenConfigDict(made)
        checks.validate(made, data, stage)
        return made, data

    for message, change in changes.items():
        with pytest.raises(ValueError, match=message) as error:
            config(**change)
        assert len(str(error.value).splitlines()) == 1
    made, data = config()
    lines = cautions.warnings(made, data)
    assert len(lines) == 1 and "fidelity to the target is measured and no accuracy" in lines[0]
    made, data = config(inits=("moco",), selects=("typiclust",), **SHORT_MOCO)
    assert len(cautions.warnings(made, data)) == 2, "and of the encoders nothing"
    with pytest.raises(ValueError, match="--stage=monitor compares with labels.*stage=pretrain"):
        config("monitor", inits=("moco",), **SHORT_MOCO)
    with pytest.raises(ValueError, match="no images to evaluate on; name some with data.eval_path"):
        config(**{"data.eval_path": ""})
    # a pool, and nothing else: neither a target nor budgets that the pool has.
    alone = {"data.eval_path": "", "target.kind": "train", "queries": (5000,)}
    made, data = config("pretrain", inits=("none", "moco"), **alone, **SHORT_MOCO)
    assert cautions.warnings(made, data, "pretrain") == []
    checks.check_trainers(made, data, "pretrain")
    with pytest.raises(ValueError, match="nothing to train, .* choose among .*moco.*simsiam"):
        config("pretrain", **alone)
    with pytest.raises(ValueError, match="batch_size 128 is larger than the pool of 60 images"):
        config("pretrain", inits=("moco",), **alone)


SHORT_MOCO = {
    "pretrain.moco.batch_size": 16,
    "pretrain.moco.group_size": 8,
    "pretrain.moco.queue_size": 32,
}


def test_no_accuracy():
    """Without labels a student is compared with the target alone."""
    student, target = RNG.normal(size=(2, 20, 7)).astype(np.float32)
    with_labels = compare(student, target, target.argmax(1))
    without = compare(student, target, None)
    assert with_labels["top1"] == with_labels["fidelity_top1"] == without["fidelity_top1"]
    assert without["top1"] is without["top5"] is None


def test_how_many_classes():
    """As many as the answer has; a class number does not say it."""
    assert received(np.zeros((2, 7), np.float32), 2, 0, "logits").shape == (2, 7)
    rng = np.random.default_rng(0)
    scores = rng.normal(scale=3, size=(64, 1000))
    probs = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    top = np.where(np.argsort(np.argsort(-probs)) < 20, probs, 0)
    for given in (probs, probs.round(4), probs[:, :10] / probs[:, :10].sum(1, keepdims=True), top):
        for one in (given.round(3), given[:1]) if len(given[0]) == 10 else (given,):
            with pytest.raises(ValueError, match="set target.access=probs"):
                received(one.astype(np.float32), len(one), 0, "logits")
    for logits in (scores, scores / 30, np.abs(scores) / 30, np.float32([[0.3, 0.5]] * 3)):
        assert received(logits, len(logits), 0, "logits").shape == logits.shape
    with pytest.raises(ValueError, match=r"shape \[2, 1\], and it must be \[2, N\]"):
        received(np.zeros((2, 1), np.float32), 2, 0, "logits")
    with pytest.raises(ValueError, match="how many classes there are; target.classes"):
        received(np.array([3, 1]), 2, 0, "label")
    assert received(np.array([3, 1]), 2, 7, "label").argmax(1).tolist() == [3, 1]


@pytest.mark.slow
def test_a_table_of_fidelity(command, files, tmp_path):
    """From images alone: N is the target's, each image is paid for once, and the report says that
    there is no accuracy."""
    words = [*SMALL, files["pool"], files["evaluation"], f"--workdir={tmp_path}/w"]
    words += ["--config.target.kind=callable", files["target"]]
    status, out, err = command(*words)
    assert status == 0, err
    report = (tmp_path / "w/report.md").read_text()
    assert "accuracy not known without labels" in report and "| no labels |" in report
    assert "share of the target's top-1 accuracy" not in report
    assert "images that the copy gets right" not in (tmp_path / "w/report.html").read_text()
    results = json.loads((tmp_path / "w/results.json").read_text())
    assert results["pool"]["classes"] == 7 and results["pool"]["labelled"] is False
    assert results["target"]["top1"] is None and results["account"]["calls"] == 70
    (row,) = results["rows"]
    assert row["top1"] is None and 0 <= row["fidelity_top1"] <= 100
    status, again, err = command(*words)
    assert status == 0 and again == out and "nothing was trained or asked" in err


ODD = """
import numpy as np
from pathlib import Path

def f(images):
    path = Path(__file__).with_name("asked")
    count = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(count))
    if count > LIMIT:
        raise RuntimeError("enough")
    x = images.reshape(len(images), -1).astype(np.float32) / 255
    scores = x @ np.random.default_rng(0).normal(size=(x.shape[1], 7)).astype(np.float32)
    return {}
"""


@pytest.mark.parametrize(
    ("code", "size", "message"),
    [
        (
            "scores + 9 * x.std(0).mean() * np.arange(7)",
            64,
            "of the range of its scores.*batch_size=1",
        ),
        ("scores + 9 * x.std(0).mean() * np.arange(7)", 1, ""),
        ("scores + 9 * count * np.arange(7)", 1, "of the range of its scores.*: it is random$"),
        ("scores[::-1]", 64, "not answer in the order of the images.*target.batch_size=1"),
        ("scores[::-1]", 1, ""),
        ("scores.astype(np.float16)", 64, ""),
    ],
)
def test_asked_twice(command, files, tmp_path, monkeypatch, code, size, message):
    """A target that looks at a batch, is random, or mixes up its answers is found by two images
    more, before the rest is asked; and the advice is right."""
    monkeypatch.setattr("qmx.stages.trial.MANY", 1)
    (tmp_path / "own.py").write_text(ODD.format(code).replace("LIMIT", "4" if size == 1 else "3"))
    words = [*SMALL, files["pool"], files["evaluation"], f"--workdir={tmp_path}/w"]
    words += ["--config.target.kind=callable", files["target"]]
    status, _, err = command(*words, f"--config.target.batch_size={size}")
    lines = [line for line in err.splitlines() if "no accuracy" not in line]
    assert status == 2 and ("enough" in lines[-1]) != ("order" in message)
    if not message:
        assert not [line for line in lines if line.startswith("warning")], err
    else:
        assert [line for line in lines if re.search(message, line)], err


def test_oddity():
    """Of an answer's own range."""
    alone = np.array([0.0, 50.0, 100.0])
    assert oddity(alone, np.stack([alone + 40, alone + 0.9])) == ""
    assert "differs by 1.1 %" in oddity(alone, np.stack([alone + 40, alone + 1.1]))
    assert "last came in place 1" in oddity(alone, np.stack([alone, alone + 40]))


def test_canvases_are_read_once(monkeypatch):
    """As long as they fit."""
    asked = []

    def read(ids):
        asked.extend(ids.tolist())
        return np.broadcast_to(ids[:, None, None, None], (len(ids), 2, 2, 3)).astype(np.uint8), (
            np.stack([ids, ids + 1], 1).astype(np.float32)
        )

    once = remembered(read, 9, 2)
    for ids in ([3, 1, 3], [1, 8], [8, 3]):
        images, sizes = once(np.array(ids))
        np.testing.assert_array_equal(images[:, 1, 1, 2], ids)
        np.testing.assert_array_equal(sizes[:, 1], np.array(ids) + 1)
    assert sorted(set(asked)) == [1, 3, 8] and asked.count(8) == 1
    monkeypatch.setattr("qmx.data.photos.MEMORY", 9 * 12 - 1)
    assert remembered(read, 9, 2) is read


def test_recipes_are_looked_at(files):
    """A recipe of another name is named."""
    words = ["qmx", *SMALL, files["pool"], files["evaluation"], "--workdir=none", files["target"]]
    made = ConfigDict(parse([*words, "--config.target.kind=callable"]).config)
    with made.unlocked():
        made.recipes.own = recipe(("none",), learn_from="labels", batch_size=20)
    with pytest.raises(ValueError, match="recipes.own.learn_from 'labels' reads labels"):
        checks.validate(made, load(**made.data))
