"""Advice in messages, followed: each cure that one names is taken, and works.

Cures of configs, stages, inputs and servers are followed in test_advice_config.py,
test_advice_stages.py, test_advice_inputs.py and targets/test_advice_of_servers.py; others where
their faults are tested: of damaged ledgers in test_ledger_commands.py, of refused images in
test_ledger_refused.py, of held and full ledgers in test_ledger_writes.py, of caches in
test_cache.py, of photos in test_opened.py, of copies in test_copies.py, of checkpoints in
test_checkpoint.py, of stages and of changed functions in test_workdir.py.
"""

import collections
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY
from numbered import images, logits_of
from test_cache import make
from test_data import load
from test_ledger import Target
from test_ledger_commands import command as ledger_command
from test_named import arrays, write
from test_photos import tree

from qmx import board
from qmx import data as qmx_data
from qmx.checks import validate
from qmx.data import named
from qmx.ledger import BudgetSpent, Ledger, access, pixel_digests, weaken
from qmx.ledger.accounts import Account
from qmx.ledger.table import Recorded, save
from qmx.main import parse
from qmx.selection.orders import from_list, subset_size
from qmx.settings import base
from qmx.stages import outside, recorded
from qmx.stages.run import Run
from qmx.stages.target import target, target_query
from qmx.targets.query import Outside
from qmx.targets.shown import Shown, resolved
from qmx.workdir import Mismatch, claim, locked


def advice(pattern, call, *args, error=ValueError, **keywords):
    """The match of `pattern` in the one line of the error that a call raises."""
    with pytest.raises(error) as caught:
        call(*args, **keywords)
    assert "\n" not in str(caught.value)
    match = re.search(pattern, str(caught.value))
    assert match, caught.value
    return match


# The ledger


def test_a_poorer_answer(tmp_path):
    """Ask with the level that is named."""
    with Ledger(tmp_path / "l", target="t") as ledger:
        ledger.ask(Target("probs"), images(1, 2), access="probs")
        found = advice(r"ask with access='(\w+)'", ledger.read, images(1, 2))
        ledger.ask(Target(), images(1, 2), access=found[1])
        np.testing.assert_array_equal(ledger.read(images(1, 2)), logits_of(1, 2))


def test_no_answer_yet(tmp_path):
    """Ask first; a level and a purpose are among those that are listed."""
    with Ledger(tmp_path / "l", target="t") as ledger:
        advice("ask for them first", ledger.read, images(1), error=LookupError)
        levels = advice("choose one of (.*)", ledger.ask, Target(), images(1), access="all")
        purposes = advice("choose one of (.*)", ledger.ask, Target(), images(1), purpose="fun")
        for place, purpose in enumerate(purposes[1].split(", ")):
            ledger.ask(Target(), images(place), purpose=purpose)
        for place, level in enumerate(levels[1].split(", ")):
            ledger.ask(Target(level), images(10 + place), access=level)
        assert len(ledger.read(images(1))) == 1 and isinstance(ledger.account(), Account)
    for dtype in advice("one of (.*)", Ledger, tmp_path / "l", target="t", dtype="int8")[1].split(
        ", "
    ):
        Ledger(tmp_path / "l", target="t", dtype=dtype).__exit__()


def test_a_spent_budget(tmp_path):
    """Fewer images, or a larger budget."""
    with Ledger(tmp_path / "l", target="t", budget=2) as ledger:
        ask = ledger.ask
        advice(
            "Raise the budget or ask for fewer", ask, Target(), images(1, 2, 3), error=BudgetSpent
        )
        assert len(ask(Target(), images(1, 2))) == 2
    with Ledger(tmp_path / "l", target="t", budget=3) as ledger:
        assert len(ledger.ask(Target(), images(1, 2, 3))) == 3


@pytest.mark.parametrize(
    ("given", "answer", "fits"),
    [
        ("logits", [[0.25, 0.75]], "probs"),
        ("probs", [[-3.0, 2.0]], "logits"),
        ("label", [[-3.0, 2.0]], "logits"),
        ("label", [[0.25, 0.75]], "probs"),
    ],
)
def test_answers_of_another_level(given, answer, fits):
    """The level that is named takes them."""
    answer = np.array(answer)
    named_levels = advice("set target.access[= ](.*)", access.received, answer, 1, 2, given)[1]
    assert fits in named_levels
    np.testing.assert_array_equal(access.received(answer, 1, 2, fits), answer.astype(np.float32))


def test_tables_of_answers(tmp_path):
    """A target's beginning, and another name or place for a file that is there."""
    path, out = tmp_path / "l", tmp_path / "table.npz"
    for name in ("one", "two"):
        with Ledger(path, target=name) as ledger:
            ledger.ask(Target(), images(1, 2))
    status, _, err = ledger_command("export", path, out)
    names = re.search("give --target=BEGINNING of one of: (.*)", err)[1].split("; ")
    assert status and len(names) == 2
    assert ledger_command("export", path, out, f"--target={names[1].split()[0]}")[0] == 0
    words = ["export", path, out, "--target=one"]
    assert "move it away or give another name" in ledger_command(*words)[2]
    assert ledger_command("export", path, tmp_path / "other.npz", "--target=one")[0] == 0
    out.rename(tmp_path / "away.npz")
    assert ledger_command(*words)[0] == 0


# The workdir and --update


def test_workdirs_of_others(tmp_path):
    """--update, or another --workdir."""
    claim(tmp_path / "w", {"a": 1}, update=False)
    cures = "give --update to keep .*, or take another --workdir, which asks"
    advice(cures, claim, tmp_path / "w", {"a": 2}, False, error=Mismatch)
    claim(tmp_path / "other", {"a": 2}, update=False)
    claim(tmp_path / "w", {"a": 2}, update=True)
    claim(tmp_path / "w", {"a": 2}, update=False)
    with locked(tmp_path / "w"):
        with pytest.raises(Mismatch, match="wait until it has ended, or take another --workdir"):
            locked(tmp_path / "w").__enter__()
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "w"):
        pass


def test_words_of_update(tmp_path):
    """Each that is listed is taken."""
    words = ["qmx", *TINY, f"--workdir={tmp_path}"]
    listed = advice("is none of (.*)", parse, [*words, "--update=any"])[1].split(", ")
    assert [parse([*words, f"--update={word}"]).update for word in listed] == listed


def test_a_server_with_another_model(tmp_path, monkeypatch):
    """Go on with the answers that are there, or ask everything: both words do what is said."""
    config = base()
    config.target.update(kind="served", url="http://localhost:1", model="m")
    there = [Outside(Target(), "m", "one")]
    monkeypatch.setattr(outside, "connect", lambda keys, data: there[0])
    run = Run(config, tmp_path, arrays(), "all", lambda: False, [])
    known = target(run)
    with Ledger(tmp_path / "ledger.sqlite", **known.identity) as ledger:
        ledger.ask(target_query(run, known), images(1))
    there[0] = there[0]._replace(sha256="another")
    found = advice(r"--update=(\S+) goes on with .*--update=(\S+) asks", target_query, run, known)
    assert target(run) == known, "nothing was decided"
    same = target(run._replace(update=found[1]))
    assert same.identity == known.identity and target_query(run, same)
    assert target_query(run, target(run)) and target(run).sha256 == known.sha256
    new = target(run._replace(update=found[2]))
    assert new.sha256 == "another" and target_query(run, new) and target(run) == new


# The images


@pytest.fixture
def npz(tmp_path):
    """npz(name, image, label) -> the path of a file; None leaves an array out."""

    def save(name, image, label=None):
        given = {"image": image, "label": label}
        path = tmp_path / f"{name}.npz"
        np.savez(path, **{key: value for key, value in given.items() if value is not None})
        return str(path)

    return save


def test_arrays_of_ones_own(npz):
    """Each line on a file says what it must hold, and such a file is taken."""
    image = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    label = np.arange(12) % 3
    pool, held = npz("pool", image[:8], label[:8]), npz("held", image[8:], label[8:])
    advice("data.path=POOL.npz; .* data.eval_path=EVAL", load, "arrays")
    assert load("arrays", pool, held).pool.size == 8
    bad = npz("bad", image[8:])
    assert load("arrays", pool, bad).evaluation.size == 4, "labels are not needed"
    npz("bad", image[8:], label[8:])
    load("arrays", pool, bad)
    for wrong, pattern in (
        (image[8:].astype(int), "it must be uint8, 0..255"),
        (image[8:].reshape(4, 16, 4, 3), "they must have one shape"),
        (image[8:].reshape(4, 8, 4, 6), r"must be \[n, H, W, C\] with C = 1 or 3"),
    ):
        advice(pattern, load, "arrays", pool, npz("bad", wrong, label[8:]))
    for wrong, pattern in (
        (label[8:] + 1000, "number the classes 0..N-1"),
        (label[8:] - 1, "is negative; classes are 0..N-1"),
        (label[8:] / 2, "must be an integer, 0..N-1"),
        (label[7:], r"it must be \[4\], one for each image"),
    ):
        advice(pattern, load, "arrays", pool, npz("bad", image[8:], wrong))
    sources = advice("choose one of (.*)", load, "arays")[1].split(", ")
    advice("remove data.leave_out", load, "arrays", pool, held, leave_out="x.txt")
    advice("use data.source=arrays", load, "digits", pool, held)
    assert {"digits", "arrays", "folder", "tfds"} == {*sources}


def test_images_on_both_sides(npz):
    """Removed from either side."""
    image = np.random.default_rng(1).integers(0, 256, (10, 8, 8, 1), np.uint8)
    image[8], label = image[3], np.arange(10) % 2
    pool, held = npz("pool", image[:8], label[:8]), npz("held", image[8:], label[8:])
    found = advice(r"number (\d+) is the pool's number (\d+); remove", load, "arrays", pool, held)
    of_held, of_pool = 8 + int(found[1]), int(found[2])
    kept = np.delete(np.arange(8), of_pool)
    assert load("arrays", npz("less", image[kept], label[kept]), held).pool.size == 7
    kept = np.delete(np.arange(8, 10), of_held - 8)
    assert load("arrays", pool, npz("less", image[kept], label[kept])).evaluation.size == 1


def test_folders(tmp_path):
    """A class without photos is removed or filled; loose photos go into classes; both sides have
    the same ones, and lie apart."""
    sides = [
        tree(tmp_path / side, {f"n{c}/{side}{c}.JPEG": (40 + c, 30 + len(side)) for c in (1, 2)})
        for side in ("train", "val")
    ]
    advice("data.path=POOL; .* data.eval_path=EVALUATION", load, "folder")
    (tmp_path / "train/n3").mkdir()
    empty = advice(r"no image in class folder (\w+); remove it, or fill it", load, "folder", *sides)
    tree(tmp_path / "train", {f"{empty[1]}/a.JPEG": (50, 50)})
    advice("both must have the same classes", load, "folder", *sides)
    tree(tmp_path / "val", {f"{empty[1]}/b.JPEG": (51, 50)})
    assert load("folder", *sides).classes == 3
    for side in sides:
        for photo in Path(side, empty[1]).iterdir():
            photo.unlink()
    advice("remove it, or fill it", load, "folder", *sides)
    for side in sides:
        Path(side, empty[1]).rmdir()
    assert load("folder", *sides).classes == 2
    (tmp_path / "loose").mkdir()
    Path(sides[1], "n1/val1.JPEG").rename(tmp_path / "loose/x.JPEG")
    assert load("folder", sides[0], str(tmp_path / "loose")).evaluation.size == 1, "no labels"
    inside = f"{sides[0]}/n1"
    advice("evaluate on images outside the pool", load, "folder", sides[0], inside)
    (tmp_path / "loose/x.JPEG").rename(Path(sides[1], "n1/val1.JPEG"))
    assert load("folder", *sides).evaluation.size == 2

    left_out = tmp_path / "out.txt"
    left_out.write_text("n1/train1.JPEG\nn9/x.JPEG\n")
    tree(tmp_path / "train", {"n1/more.JPEG": (60, 61)})
    wrong = advice(
        "'(.*)' is neither .*correct or remove", load, "folder", *sides, leave_out=str(left_out)
    )
    left_out.write_text(left_out.read_text().replace(wrong[1] + "\n", ""))
    assert load("folder", *sides, leave_out=str(left_out)).pool.size == 2
    size = advice("use (224) or 256", load, "folder", *sides, crop=0)
    load("folder", *sides, crop=int(size[1]))


def test_names_of_classes(tmp_path):
    """Folders are renamed as the lines do; of two lines with one name, by another of theirs."""
    advice("write one a line", named, arrays(names=("a", "b", "c")), write(tmp_path, "\n"))
    path = write(tmp_path, "a\nb\nx, y\nx, z\n")
    advice("c; name the folders as the lines do", named, arrays(names=("a", "b", "c")), path)
    advice("name its folder by a name that is in one", named, arrays(names=("a", "b", "x")), path)
    assert named(arrays(names=("a", "b", "z")), path).classes == 4


def test_caches_of_other_settings(tmp_path):
    """The flag that is named takes the shards; where there is none, another folder does."""
    pool = tree(tmp_path / "train", {f"n{c}/{i}.JPEG": (40, 30) for c in (1, 2) for i in range(2)})
    out = tmp_path / "cache"
    make(pool, out)
    found = advice(r"give --(\w+)=(\d+)", make, pool, out, quality=70)
    make(pool, out, **{found[1]: int(found[2])})
    for beside in out.glob("shard-*.json"):
        beside.write_text(json.dumps({**json.loads(beside.read_text()), "version": 0}))
    advice("remove it, or write to another folder", make, pool, out)
    make(pool, tmp_path / "other")
    (out / "mine.txt").touch()
    for beside in out.glob("shard-*.json"):
        beside.unlink()
    advice("mine.txt; name a new folder", make, pool, out)


def test_shares_and_lists(tmp_path):
    """The share that is named leaves an image, and one less does not; a list has a name a line."""
    least = float(advice("use at least (.*)", subset_size, 1e-9, 1437)[1])
    assert subset_size(least, 1437) == 1
    path = tmp_path / "list.txt"
    path.write_text("\n")
    advice("write one a line", from_list, str(path), ["n/a.png", "n/b.png"])
    path.write_text("b.png\n")
    assert from_list(str(path), ["n/a.png", "n/b.png"]).tolist() == [1]
    advice("use another selection, or data.source=folder", from_list, str(path), ())


@pytest.mark.parametrize("said", ["", "uint8"])
def test_numbers_for_a_target_of_bytes(said):
    """Shown bytes without a scale; one that does not say what it takes may be given floats."""
    cure = advice("leave them out(.*)", resolved, Shown(scale=1.0), (8, 8, 1), said, [])[1]
    assert resolved(Shown(), (8, 8, 1), said, []).dtype == "uint8"
    assert ("target.shown.dtype=float32" in cure) == (not said)
    if cure:
        wide = Shown(scale=1.0, dtype="float32")
        assert resolved(wide, (8, 8, 1), said, []).dtype == "float32"


def table_of(path, data, pool, evaluation, level="logits"):
    """A table of answers to the first images of the pool and of the evaluation's."""
    sides = (data.pool, pool), (data.evaluation, evaluation)
    digests = b"".join(
        digest for side, count in sides for digest in pixel_digests(side.shown(np.arange(count)))
    )
    digests = np.frombuffer(digests, np.uint8).reshape(-1, 32)
    scores = np.eye(10, dtype=np.float32)[np.arange(len(digests)) % 10]
    if level == "logits":
        scores *= 5
    path.unlink(missing_ok=True)
    save(path, Recorded(digests, scores, np.array([level] * len(digests)), "owner's", "as-is"))


def recorded_config(path, *words):
    kind = ["--config.target.kind=recorded", f"--config.target.path={path}"]
    return parse(["qmx", *TINY, *kind, *words, f"--workdir={path.parent}/w"]).config


def test_a_table_of_less(tmp_path):
    """The two keys that are named let a table of labels be a target's."""
    data, path = qmx_data.load(source="digits", limit=200), tmp_path / "table.npz"
    table_of(path, data, 200, 200, "label")
    config = recorded_config(path)
    words = advice("set (--.*) and (--.*)", recorded.connect, config.target, data).groups()
    assert words == ("--config.target.access=label", "--config.accesses=\"('label',)\"")
    config = recorded_config(path, words[0], words[1].replace('"', ""))
    recorded.connect(config.target, data)
    validate(config, data)


def test_a_table_that_lacks_images(tmp_path):
    """Fewer queries, where the pool's are missing; more answers, where the evaluation's are."""
    data, path = qmx_data.load(source="digits", limit=60), tmp_path / "table.npz"
    config = recorded_config(path)
    table_of(path, data, 40, 60)
    told = advice("record those too(.*)", recorded.refuse_missing, config, data, np.arange(50))
    assert "or lower --config.fractions" in told[1]
    recorded.refuse_missing(config, data, np.arange(40))
    table_of(path, data, 60, 50)
    told = advice("record those too(.*)", recorded.refuse_missing, config, data, np.arange(40))
    assert not told[1]
    table_of(path, data, 60, 60)
    recorded.refuse_missing(config, data, np.arange(60))


# What is said of packages, and to the library's callers


def test_extras_that_are_named():
    """Each is one of the package's, and has what the message is about; there is no network here."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named_in = collections.defaultdict(set)
    for path in (ROOT / "qmx").rglob("*.py"):
        for extra in re.findall(r"pip install 'qmx\[(\w+)\]'", path.read_text()):
            named_in[extra].add(path.stem)
    assert named_in == {"tensorboard": {"board"}, "onnx": {"onnx_file"}, "torch": {"read_torch"}}
    for extra, package in (
        ("tensorboard", board.PACKAGE),
        ("onnx", "onnxruntime"),
        ("torch", "torch"),
    ):
        assert re.match(rf"{package}\b", extras[extra][0]), extra
        assert importlib.util.find_spec(package)


def test_a_key_for_each_answer():
    """Noise with as many keys as are wanted."""
    p = np.full((3, 4), 0.25)
    count = int(advice(r"a key for each of (\d+) answers", weaken.noise, p, 0.1, [b"1" * 32])[1])
    noisy = weaken.noise(p, 0.1, [bytes([row]) * 32 for row in range(count)])
    np.testing.assert_allclose(noisy.sum(1), 1)
    assert (noisy != 0.25).any()
