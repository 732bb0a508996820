"""Every photo is opened before anything is spent, and what cannot be read is left out by name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_cache import make
from test_data import load
from test_photos import WHOLE, encoded, photo, tree

from qmx.data import open_photos, photos
from qmx.data.opened import AT_ONCE, count

SIZES = {"canvas": 16, "resize": 24, "crop": 20}


@pytest.fixture
def folders(tmp_path):
    """A pool of two classes and an evaluation folder with some of the same names."""
    return (
        tree(
            tmp_path / "train",
            {f"n{c}/{i}.JPEG": (40 + i, 30 + c) for c in (1, 2) for i in range(6)},
        ),
        tree(
            tmp_path / "val", {f"n{c}/{i}.JPEG": (50 + i, 33 + c) for c in (1, 2) for i in range(3)}
        ),
    )


def opened(data, folder, **more):
    """What `open_photos` says, or the text of its error, which is one line."""
    try:
        return open_photos(data, folder, **more)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return str(error)


def decodes(monkeypatch):
    """The names of the files that are decoded from now on."""
    names = []
    real = photos.decode

    def decode(data, name):
        names.append(name)
        return real(data, name)

    monkeypatch.setattr("qmx.data.opened.decode", decode)
    return names


def test_good_photos_are_opened_once(folders, tmp_path, monkeypatch):
    """With progress up to their number; a second call decodes none, another folder all."""
    data, names, steps = load("folder", *folders, **SIZES), decodes(monkeypatch), []
    assert count(data) == 18 and opened(data, tmp_path / "w", update=steps.append) == []
    assert len(set(names)) == 18 and steps == sorted(steps) and steps[-1] == 18
    assert opened(load("folder", *folders, resize=30, crop=20), tmp_path / "w") == []
    assert len(names) == 18
    assert opened(data, tmp_path / "other") == [] and len(names) == 36
    assert count(load("digits")) == 0 and opened(load("digits"), tmp_path / "w") == []


def test_folders_with_one_listing_are_opened_each(tmp_path):
    """Numbered photos of equal sizes: what is known of the pool says nothing of the others."""
    names = [f"n{c}/{i}.bmp" for c in (1, 2) for i in range(3)]
    sides = [
        tree(
            tmp_path / side,
            {name: encoded(photo(30, 30, seed=seed + k), "BMP") for k, name in enumerate(names)},
        )
        for side, seed in (("train", 0), ("val", 50))
    ]
    bad = Path(sides[1], "n2/1.bmp")
    bad.write_bytes(bytes(bad.stat().st_size))
    for _ in range(2):
        assert f"1 of 12 photos cannot be read: {bad}: " in opened(
            load("folder", *sides), tmp_path / "w"
        )


def test_memory_that_is_damaged_is_no_memory(folders, tmp_path, monkeypatch):
    data, names = load("folder", *folders, **SIZES), decodes(monkeypatch)
    opened(data, tmp_path / "w")
    for path in (tmp_path / "w").iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    assert opened(data, tmp_path / "w") == [] and len(names) == 36


def test_a_stopped_call_goes_on(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("qmx.data.opened.AT_ONCE", 5)
    data, names = load("folder", *folders, **SIZES), decodes(monkeypatch)

    def stop(done):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_photos(data, tmp_path / "w", stop)
    assert len(names) == 10 < AT_ONCE
    assert opened(data, tmp_path / "w") == [] and len(set(names)) == len(names) == 18


KILLED = """
import os, sys
from pathlib import Path

from qmx.data import load, open_photos, opened

opened.AT_ONCE, opened.SECONDS = 5, -1.0
pool, evaluation, folder = sys.argv[1:]
sides = dict(path=pool, eval_path=evaluation)
data = load(source="folder", **sides, canvas=16, resize=24, crop=20)
open_photos(data, Path(folder), lambda done: os._exit(7) if done == 10 else None)
"""


def test_a_killed_call_goes_on(folders, tmp_path, monkeypatch):
    """What was opened is remembered meanwhile: a signal ends the program at once."""
    words = [sys.executable, "-c", KILLED, *map(str, folders), str(tmp_path / "w")]
    assert subprocess.run(words, cwd=ROOT).returncode == 7
    data, names = load("folder", *folders, **SIZES), decodes(monkeypatch)
    assert opened(data, tmp_path / "w") == [] and len(set(names)) == len(names) == 18 - 5


def test_unreadable_photos_are_named_on_both_sides_and_the_cure_works(folders, tmp_path):
    """One line with all; the file that it names leaves out these and no others; then more."""
    pool, evaluation = folders
    broken = [f"{pool}/n2/3.JPEG", f"{evaluation}/n1/1.JPEG", f"{evaluation}/n2/0.JPEG"]
    for path, content in zip(broken, (WHOLE[:900], b"", b"404"), strict=True):
        Path(path).write_bytes(content)
    data = load("folder", *folders, **SIZES)
    text = opened(data, tmp_path / "w")
    names = tmp_path / "w" / "unreadable.txt"
    assert text.startswith(f"3 of 18 photos cannot be read: {broken[0]}: ")
    assert "truncated" in text and f", and {broken[1]}, {broken[2]}; " in text
    assert f"data.leave_out={names}," in text
    assert names.read_text().splitlines() == broken

    less = load("folder", *folders, **SIZES, leave_out=str(names))
    assert (less.pool.size, less.evaluation.size) == (11, 4)
    assert opened(less, tmp_path / "w") == []
    less.pool.all(), less.pool.shown(np.arange(11)), less.evaluation.shown(np.arange(4))
    assert "n2/3.JPEG" not in less.pool.names and "n1/1.JPEG" in less.pool.names
    assert less.evaluation.labels.tolist() == [0, 0, 1, 1]

    size = Path(f"{pool}/n1/4.JPEG").stat().st_size
    Path(f"{pool}/n1/4.JPEG").write_bytes(WHOLE[: size + 1])
    assert opened(load("folder", *folders, **SIZES, leave_out=str(names)), tmp_path / "w")
    assert names.read_text().splitlines() == [*broken, f"{pool}/n1/4.JPEG"]
    assert load("folder", *folders, **SIZES, leave_out=str(names)).pool.size == 10


def test_names_that_hold_what_ends_lines(folders, tmp_path):
    """As a name in another encoding does; and a list that an editor saved with its mark."""
    pool, _ = folders
    for name in ("a\x85b.jpg", "c\u2028d.jpg"):
        Path(f"{pool}/n1/{name}").write_bytes(b"broken")
    with pytest.raises(ValueError, match="2 of 20 photos cannot be read"):
        open_photos(load("folder", *folders, **SIZES), tmp_path / "w")
    names = tmp_path / "w" / "unreadable.txt"
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes().replace(b"\n", b"\r\n"))
    less = load("folder", *folders, **SIZES, leave_out=str(names))
    assert opened(less, tmp_path / "w") == [] and less.pool.size == 12


def test_a_side_that_loses_nothing_keeps_its_digest(folders, tmp_path, monkeypatch):
    pool, evaluation = folders
    whole = load("folder", *folders, **SIZES)

    def without(*lines):
        path = tmp_path / "names.txt"
        path.write_text("\n".join(lines))
        return load("folder", *folders, **SIZES, leave_out=str(path))

    one = without(f"{evaluation}/n2/1.JPEG", "")
    assert one.pool_digest == whole.pool_digest
    assert one.evaluation_digest != whole.evaluation_digest
    both = without("n2/1.JPEG")
    assert (both.pool.size, both.evaluation.size) == (11, 5)
    assert both.pool_digest != whole.pool_digest
    assert both.evaluation_digest == one.evaluation_digest
    assert without("").digest == whole.digest
    monkeypatch.chdir(tmp_path)  # a path of the same photo
    assert without("val/n2/1.JPEG").digest == one.digest


@pytest.mark.parametrize(
    "lines, message",
    [
        (b"n2/9.JPEG", "'n2/9.JPEG' is neither a photo of the pool nor of the evaluation images"),
        (b"\0\1", "is not text"),
        (None, "No such file"),
        (b"n1/0.JPEG\nn1/1.JPEG\nn1/2.JPEG\nn2/0.JPEG\nn2/1.JPEG\nn2/2.JPEG", "leaves no photo"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(folders, tmp_path, lines, message):
    path = tmp_path / "names.txt"
    if lines is not None:
        path.write_bytes(lines)
    with pytest.raises(ValueError, match=message) as error:
        load("folder", *folders, **SIZES, leave_out=str(path))
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match="data.leave_out is not read by data.source=digits"):
        load("digits", leave_out=str(path))


def test_only_what_a_limit_leaves_is_opened(folders, tmp_path):
    Path(folders[0], "n2/5.JPEG").write_bytes(b"no")
    assert opened(load("folder", *folders, **SIZES, limit=4), tmp_path / "w") == []
    assert "1 of 18 photos" in opened(load("folder", *folders, **SIZES), tmp_path / "w")


def test_with_a_cache_the_pool_is_looked_at_and_what_is_left_out_is_left_out(folders, tmp_path):
    """The cache was made of all photos: others keep their places, in canvases and in what is
    shown."""
    pool, evaluation = folders
    Path(pool, "n1/2.JPEG").write_bytes(WHOLE[:900])
    make(pool, tmp_path / "cache", side=16)
    (tmp_path / "names.txt").write_text(f"{pool}/n1/0.JPEG\n{pool}/n2/4.JPEG\n")
    more = {**SIZES, "leave_out": str(tmp_path / "names.txt"), "cache": str(tmp_path / "cache")}
    data = load("folder", *folders, **more)
    (tmp_path / "all.txt").write_text(f"{pool}/n1/0.JPEG\n{pool}/n1/2.JPEG\n{pool}/n2/4.JPEG")
    plain = load("folder", *folders, **SIZES, leave_out=str(tmp_path / "all.txt"))
    assert data.pool.names == plain.pool.names and data.pool.size == 9
    got, want = data.pool.all(), plain.pool.all()
    np.testing.assert_array_equal(got["size"], want["size"])
    assert np.abs(got["image"].astype(int) - want["image"]).mean() < 5
    np.testing.assert_array_equal(data.pool.shown(np.arange(9)), plain.pool.shown(np.arange(9)))
    assert opened(data, tmp_path / "w") == []
    Path(pool, "n2/1.JPEG").write_bytes(bytes(Path(pool, "n2/1.JPEG").stat().st_size))
    assert "1 of 15 photos cannot be read: " in opened(
        load("folder", *folders, **more), tmp_path / "w2"
    )


@pytest.mark.slow
def test_a_photo_that_breaks_after_the_run(command, folders, tmp_path):
    """An evaluation photo is cut when all is done: the line has two cures, repair and leaving it
    out; the second one does neither the pretraining nor the target again, and pays for nothing."""
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\nimport numpy as np\n\ndef f(images):\n"
        "    with open(Path(__file__).with_name('asked'), 'a') as log:\n"
        "        log.write('x' * len(images))\n    m = images.mean((1, 2)) / 32\n"
        "    return np.concatenate([m, -m], 1)[:, :2]\n"
    )
    words = ["--config=photos:audit", f"--workdir={tmp_path}/w"]
    words += [f"--config.data.path={folders[0]}", f"--config.data.eval_path={folders[1]}"]
    words += [f"--config.target.path={tmp_path}/own.py:f", "--config.inits=('moco',)"]
    words += ["--config.also=()", "--config.pretrain.moco.epochs=1", "--config.distill.epochs=0.1"]
    words += ["--config.distill.min_steps=2", "--config.student.arch=one_block"]
    words += [f"--config.{key}=16" for key in ("data.canvas", "data.resize", "data.crop")]
    words += [f"--config.{key}.size=16" for key in ("student", "weak_view", "strong_view")]
    status, _, err = command(*words)
    assert status == 0, err
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "w/pretrain").rglob("*")}
    paid, bad = (tmp_path / "asked").stat().st_size, Path(folders[1], "n1/2.JPEG")
    whole = bad.read_bytes()
    bad.write_bytes(whole[:200])
    for more in ((), ("--update",)):
        status, _, err = command(*words, *more)
        assert status == 2 and f"1 of 18 photos cannot be read: {bad}: " in err.splitlines()[-1]
    cure = re.search(r"leave them out with (data.leave_out=\S+),", err)[1]
    status, _, err = command(*words, f"--config.{cure}")
    assert status == 2 and "data.leave_out" in err and "--update" in err.splitlines()[-1]
    status, _, err = command(*words, f"--config.{cure}", "--update")
    assert status == 0, err
    results = json.loads((tmp_path / "w/results.json").read_text())
    assert results["pool"]["evaluation"] == 5 and (tmp_path / "asked").stat().st_size == paid
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "w/pretrain").rglob("*")}
    bad.write_bytes(whole)
    status, _, err = command(*words, "--update")
    assert status == 0 and (tmp_path / "asked").stat().st_size == paid, err
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "w/pretrain").rglob("*")}


def test_photos_that_become_one_colour_are_said(folders, tmp_path):
    """12 bits in a file of 16 can; a photo that has one colour in its file is as it is."""
    faint = Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) % 128)
    tree(
        folders[0],
        {
            "n1/faint.png": encoded(faint, "PNG"),
            "n1/red.png": encoded(Image.new("RGB", (9, 9), "red"), "PNG"),
        },
    )
    data = load("folder", *folders, **SIZES)
    for _ in range(2):
        (line,) = opened(data, tmp_path / "w")
        assert line.startswith("1 photos are of one colour") and "train/n1/faint.png" in line
