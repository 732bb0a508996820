"""The cache of squashed photos: what is in it, stopping at any time, and everything that can be
wrong with it."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_data import load
from test_photos import WHOLE, encoded, photo, tree, turned

from qmx.data import batches
from qmx.data.cache import main, write
from qmx.data.cached import SIZE
from qmx.data.folder import listing
from qmx.data.photos import canvas, shown

FILES = {f"n{c}/{c}_{i:02}.JPEG": (40 + 3 * i, 30 + 5 * c) for c in range(3) for i in range(7)}
BROKEN = {"n0/0_03.JPEG": WHOLE[:900], "n1/1_05.JPEG": b"", "n2/2_06.JPEG": b"404 not found"}
ODD = {
    "n0/0_01.JPEG": encoded(photo(50, 20, "L")),
    "n1/1_01.JPEG": encoded(photo(50, 20, "CMYK")),
    "n2/2_01.JPEG": encoded(photo(50, 20), "PNG"),
    "n2/2_02.JPEG": turned(6),
}


@pytest.fixture
def pool(tmp_path):
    return tree(tmp_path / "train", FILES)


@pytest.fixture
def evaluation(tmp_path):
    return tree(tmp_path / "val", {f"n{c}/v.JPEG": (31, 32) for c in range(3)})


def make(pool, out, **more):
    return write(listing(pool)[0], Path(out), **{"side": 32, "per_shard": 5, **more})


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "qmx.data.cache", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(capsys, message, *words):
    """Status 2 and one line."""
    assert main([str(word) for word in words]) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and err.startswith("qmx.data.cache: ")
    assert re.search(message, err), err


# What it holds


def test_canvases_and_sizes_come_back(pool, evaluation, tmp_path):
    """Within JPEG's loss, in any order, with the sizes exact; what is shown still comes from the
    files."""
    make(pool, tmp_path / "cache")
    plain = load("folder", pool, evaluation, canvas=32, crop=24, resize=30)
    quick = load(
        "folder", pool, evaluation, canvas=32, crop=24, resize=30, cache=str(tmp_path / "cache")
    )
    assert quick.digest != plain.digest, "its canvases are not the files' to the last bit"
    rest = {"pool": None, "evaluation": None, "pool_digest": ""}
    assert quick._replace(**rest) == plain._replace(**rest)
    assert quick.pool.names == plain.pool.names
    ids = np.random.default_rng(0).permutation(21)
    want, got = plain.pool.read(ids), quick.pool.read(ids)
    assert list(want) == list(got) and all(got[name].dtype == want[name].dtype for name in want)
    np.testing.assert_array_equal(got["size"], want["size"])
    np.testing.assert_array_equal(got["label"], want["label"])
    error = np.abs(got["image"].astype(int) - want["image"]).mean((1, 2, 3))
    assert error.max() < 5 and error.min() > 0
    np.testing.assert_array_equal(quick.pool.shown(ids), plain.pool.shown(ids))
    for batch in batches(quick.pool, 4, steps=4, seed=0):
        rows = quick.pool.read(
            np.array(
                [
                    int(np.flatnonzero(np.all(want["size"] == size, 1))[0])
                    for size in np.asarray(batch["size"])
                ]
            )
        )
        assert rows["image"].shape == batch["image"].shape


def test_a_record_is_two_numbers_and_a_jpeg(pool, tmp_path):
    """The format, read without our reader."""
    from array_record.python.array_record_module import ArrayRecordReader

    manifest = make(pool, tmp_path / "cache", quality=75)
    assert [shard["count"] for shard in manifest["shards"]] == [5, 5, 5, 5, 1]
    shard = ArrayRecordReader(str(tmp_path / "cache" / "shard-00001.array_record"))
    assert shard.num_records() == 5 and "group_size:1" in shard.writer_options_string()
    record = shard.read([3])[0]
    name = listing(pool)[0].names[8]
    image = Image.open(Path(pool, name))
    assert (
        SIZE.unpack_from(record)
        == image.size[::-1]
        == (int.from_bytes(record[:4], "little"), int.from_bytes(record[4:8], "little"))
    )
    assert record[8:] == encoded(
        Image.fromarray(canvas(image, 32)[0]), quality=75, subsampling="4:4:4"
    )


@pytest.mark.parametrize("several", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_writes_the_same_files(pool, tmp_path, several):
    tree(pool, {**BROKEN, **ODD})
    for processes in (1, several):
        make(pool, tmp_path / str(processes), processes=processes)
    assert files(tmp_path / "1") == files(tmp_path / str(several))
    assert len(files(tmp_path / "1")) == 5 + 5 + 2


def test_unreadable_photos_are_named_and_left_out(pool, evaluation, tmp_path, capsys):
    """The others keep their places: image, label, size and name belong together."""
    tree(pool, BROKEN)
    manifest = make(pool, tmp_path / "cache")
    assert manifest["images"] == 21 and manifest["count"] == 18
    assert [(i, name) for i, name, _ in manifest["broken"]] == [
        (3, "n0/0_03.JPEG"),
        (12, "n1/1_05.JPEG"),
        (20, "n2/2_06.JPEG"),
    ]
    assert all(
        re.search(f"^[^/]*{what}", reason)
        for what, (*_, reason) in zip(
            ("truncated", "empty", "not an image"), manifest["broken"], strict=True
        )
    )
    data = load(
        "folder", pool, evaluation, canvas=32, resize=30, crop=24, cache=str(tmp_path / "cache")
    )
    assert (
        "3 of 21 images are unreadable and left out: n0/0_03.JPEG, n1/1_05.JPEG, n2/2_06.JPEG"
        in capsys.readouterr().err
    )
    assert data.pool.size == 18 and data.pool.names == tuple(
        name for name in sorted(FILES) if name not in BROKEN
    )
    rows, pixels = data.pool.all(), data.pool.shown(np.arange(18))
    for row, name in enumerate(data.pool.names):
        image = Image.open(Path(pool, name))
        assert tuple(rows["size"][row]) == image.size[::-1] and rows["label"][row] == int(name[1])
        assert np.abs(rows["image"][row].astype(int) - canvas(image, 32)[0]).mean() < 5
        np.testing.assert_array_equal(pixels[row], shown(image, 30, 24))
    assert data.digest != load("folder", pool, evaluation, canvas=32, resize=30, crop=24).digest


def test_odd_photos_are_counted(pool, tmp_path, capsys):
    tree(pool, ODD)
    assert main([pool, str(tmp_path / "cache"), "--side=32", "--processes=1"]) == 0
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["odd"] == {
        "CMYK": 1,
        "EXIF-rotated, used as stored": 1,
        "PNG named JPEG": 1,
        "greyscale": 1,
    }
    assert not manifest["broken"] and manifest["pillow"] == [__import__("PIL").__version__]
    out = capsys.readouterr().out
    assert "21 images in 1 shards" in out and "1 greyscale" in out


# Stopping and going on


def test_a_second_call_writes_only_what_is_missing(pool, tmp_path):
    whole = tmp_path / "cache"
    make(pool, whole)
    want = files(whole)
    before = {
        path.name: path.stat().st_mtime_ns
        for path in whole.iterdir()
        if path.name.startswith("shard")
    }
    (whole / "shard-00001.json").unlink()  # killed between a shard and its JSON
    (whole / "shard-00003.array_record").unlink()
    (whole / "shard-00003.json").write_text("{")
    (whole / "shard-00004.array_record").write_bytes(b"short")
    (whole / "shard-00002.array_record.part").write_bytes(b"killed while writing")
    (whole / "manifest.json").unlink()
    make(pool, whole)
    assert {
        name: content for name, content in files(whole).items() if not name.endswith(".part")
    } == want
    after = {
        path.name: path.stat().st_mtime_ns
        for path in whole.iterdir()
        if path.name.startswith("shard")
    }
    for number in (0, 2):
        assert after[f"shard-{number:05}.array_record"] == before[f"shard-{number:05}.array_record"]
    for number in (1, 3, 4):
        assert after[f"shard-{number:05}.array_record"] > before[f"shard-{number:05}.array_record"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, processes",
    [(signal.SIGKILL, 2), (signal.SIGTERM, 2), (signal.SIGINT, 1), (signal.SIGTERM, 1)],
)
def test_it_can_be_stopped_at_any_time(tmp_path, number, processes):
    """And what goes on from there is what an undisturbed call writes; no worker is left behind."""
    pool = tree(tmp_path / "train", {"n0/big.JPEG": (700, 500), "n1/x.JPEG": (40, 30)})
    for k in range(400):
        Path(pool, "n0", f"{k:03}.JPEG").symlink_to(Path(pool, "n0", "big.JPEG"))
    out = tmp_path / "cache"
    words = [pool, out, "--side=64", "--shard=30", f"--processes={processes}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qmx.data.cache", *map(str, words)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 60
    while not list(out.glob("shard-*.json")) and time.monotonic() < limit:
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    if number != signal.SIGKILL:
        assert (
            process.returncode == 75
            and "goes on from here" in err.splitlines()[-1]
            and "Traceback" not in err
        ), err
    done = len(list(out.glob("shard-*.json")))
    assert done and not (out / "manifest.json").exists()
    while any(Path(f"/proc/{child}/exe").exists() for child in children):
        assert time.monotonic() < limit, "a worker outlives the command"
        time.sleep(0.02)
    finished = len(list(out.glob("shard-*.json")))
    assert finished < 14
    assert main([str(word) for word in words]) == 0
    make(pool, tmp_path / "undisturbed", side=64, per_shard=30)
    assert files(out) == files(tmp_path / "undisturbed")


def test_two_calls_do_not_write_at_once(pool, tmp_path, capsys):
    from qmx.data.cache import alone

    (tmp_path / "cache").mkdir()
    with alone(tmp_path / "cache"):
        refused(capsys, "another process is writing", pool, tmp_path / "cache", "--processes=1")
    assert main([pool, str(tmp_path / "cache"), "--processes=1"]) == 0


# What is refused


def test_other_photos_or_settings_are_refused(pool, tmp_path, capsys):
    out = tmp_path / "cache"
    words = [pool, out, "--processes=1", "--side=32", "--shard=5"]
    assert main([str(word) for word in words]) == 0
    capsys.readouterr()
    refused(
        capsys,
        "shards of side 32, and this is 48; .*--side=32",
        *words[:3],
        "--side=48",
        "--shard=5",
    )
    refused(capsys, "shards of quality 90, and this is 80; .*--quality=90", *words, "--quality=80")
    refused(capsys, "shards of shard 5, and this is 7", *words[:4], "--shard=7")
    tree(pool, {"n1/more.JPEG": (20, 20)})
    refused(capsys, "other photos than .*train, or these have changed since; remove it", *words)


def test_folders_that_cannot_be_written_to(pool, tmp_path, capsys):
    refused(
        capsys, "inside .*train, where it would be taken for a class", pool, Path(pool, "cache")
    )
    refused(capsys, "none: no such folder", tmp_path / "none", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    refused(capsys, "mine holds other files, such as thesis.tex", pool, tmp_path / "mine")
    (tmp_path / "file").touch()
    refused(capsys, "file", pool, tmp_path / "file")
    refused(
        capsys, "Permission denied|Read-only|No such|not permitted|Not a dir", pool, "/proc/cache"
    )
    Path(pool, "n0/0_00.JPEG").unlink()
    photos = listing(pool)[0]
    Path(pool, "n2/2_00.JPEG").unlink()
    with pytest.raises(ValueError, match="n2/2_00.JPEG: No such file"):
        write(photos, tmp_path / "cache", per_shard=5)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["one"],
        ["a", "b", "--side=0"],
        ["a", "b", "--quality=101"],
        ["a", "b", "c"],
        ["a", "b", "--processes=0"],
        ["a", "b", "--source=zip"],
    ],
)
def test_a_wrong_command_line_is_refused(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_said_in_one_line(pool, tmp_path, processes):
    """As a limit on the size of files stands in for it; nothing is left that looks like a shard."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); "
    code = limit + "from qmx.data.cache import main; sys.exit(main(sys.argv[1:]))"
    script = tmp_path / "limited.py"
    script.write_text(f"if __name__ == '__main__':\n    {code}\n")
    done = subprocess.run(
        [
            sys.executable,
            script,
            pool,
            tmp_path / "cache",
            "--side=64",
            "--shard=10",
            f"--processes={processes}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "File too large" in done.stderr
    left = [name for name in files(tmp_path / "cache") if name.startswith("shard")]
    assert not left if processes == 1 else all(name.endswith(".part") for name in left)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4000


# Reading what is wrong


@pytest.fixture
def cached(pool, evaluation, tmp_path):
    """open(**keys) -> the data set with a cache of the pool, in tmp_path/cache."""
    make(pool, tmp_path / "cache")
    return lambda **more: load(
        "folder", pool, evaluation, **{"canvas": 32, "cache": str(tmp_path / "cache"), **more}
    )


def test_a_cache_that_does_not_fit_is_refused_with_the_command(cached, pool, tmp_path):
    again = f"run python -m qmx.data.cache {pool} {tmp_path / 'cache'} --side="
    with pytest.raises(
        ValueError, match="canvases of 32 pixels and data.canvas is 64; .*data.canvas=32"
    ):
        cached(canvas=64)
    with pytest.raises(
        ValueError, match="none: no finished cache in it; run python -m qmx.data.cache .*none"
    ):
        cached(cache=str(tmp_path / "none"))
    tree(pool, {"n0/0_00.JPEG": (99, 99)})
    with pytest.raises(
        ValueError,
        match="made of other photos than .*train, or these have changed since; .*" + again,
    ):
        cached()


def test_a_cache_that_is_not_finished_is_refused(cached, tmp_path):
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no finished cache"):
        cached()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 7}', '{"version": 1}'])
def test_a_damaged_manifest_is_refused(cached, tmp_path, text):
    (tmp_path / "cache" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json: .*python -m qmx.data.cache"):
        cached()


def edited(**facts):
    """A change of a manifest's text: facts by name, None to leave one out."""

    def edit(text):
        manifest = {**json.loads(text), **facts}
        return json.dumps({key: fact for key, fact in manifest.items() if fact is not None})

    return edit


def shards_edited(**facts):
    """As `edited`, for the facts of the second shard."""

    def edit(text):
        manifest = json.loads(text)
        manifest["shards"][1] |= facts
        return json.dumps(manifest)

    return edit


EDITS = {
    "cut": lambda text: text[: len(text) // 2],
    "zeroed": lambda text: "\0" * len(text),
    "deep": lambda text: "[" * 100_000,
    "version as text": edited(version="2"),
    "no digest": edited(digest=None),
    "digest as number": edited(digest=5),
    "images as text": edited(images="21"),
    "images as truth": edited(images=True),
    "many images": edited(images=10**12, count=10**12),
    "negative count": edited(count=-1),
    "side as list": edited(side=[32]),
    "shards as text": edited(shards="all"),
    "shards as numbers": edited(shards=[1, 2]),
    "no shards": edited(shards=[]),
    "broken as numbers": edited(broken=[1, 2]),
    "broken elsewhere": edited(broken=[[99, "x", "y"]]),
    "a shard's count": shards_edited(count=4),
    "a shard's count as text": shards_edited(count="5"),
    "a shard's size as text": shards_edited(bytes="many"),
    "a shard elsewhere": shards_edited(file="../shard-00001.array_record"),
    "a shard's name as number": shards_edited(file=1),
    "a shard's digest": shards_edited(sha256=None),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_manifest_is_named_and_the_cure_works(cached, pool, tmp_path, capsys, edit):
    """One line, for reading and for verifying; and the command that it names mends it."""
    path = tmp_path / "cache" / "manifest.json"
    text = path.read_text()
    path.write_text(edit(text))
    with pytest.raises(ValueError) as error:
        cached()
    said = str(error.value)
    assert str(path) in said and len(said.splitlines()) == 1 and len(said) < 800
    command = re.search("remove it and run (python -m qmx.data.cache .*)", said)[1]
    refused(capsys, "manifest.json: ", "--verify", tmp_path / "cache")
    path.unlink()
    assert main([*command.split()[3:], "--processes=1"]) == 0
    assert path.read_text() == text
    assert cached().pool.size == 21


@pytest.mark.parametrize("text", ["", "[]", "5", '{"file": 1}', "\0\0", '{"broken": 3}'])
def test_a_damaged_json_of_a_shard_is_written_again(pool, tmp_path, text):
    make(pool, tmp_path / "cache")
    want = files(tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00001.json"
    path.write_text(text)
    make(pool, tmp_path / "cache")
    facts = json.loads(want[path.name]) | {"count": "5"}
    path.write_text(json.dumps(facts))
    make(pool, tmp_path / "cache")
    assert files(tmp_path / "cache") == want


def test_missing_and_short_shards_are_named_at_once(cached, tmp_path):
    shard = tmp_path / "cache" / "shard-00002.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match="1 of 5 shards are missing or cut off: shard-00002.array_record; run"
    ):
        cached()
    shard.unlink()
    with pytest.raises(ValueError, match="1 of 5 shards are missing"):
        cached()


def test_damage_is_named_when_it_is_read_and_found_by_verify(cached, tmp_path, capsys):
    """Each of the bytes of a shard: the same data, or one line with its name; and --verify finds
    every one."""
    assert main(["--verify", str(tmp_path / "cache")]) == 0
    assert "21 images in 5 shards, all as they were written" in capsys.readouterr().out
    want = cached().pool.all()
    shard = tmp_path / "cache" / "shard-00001.array_record"
    whole = shard.read_bytes()
    hits = 0
    for at in [*range(0, len(whole), 4999), *(i for i in range(0, len(whole), 97) if whole[i])]:
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            got = cached().pool.read(np.arange(5, 10))
            np.testing.assert_array_equal(got["image"], want["image"][5:10])
            np.testing.assert_array_equal(got["size"], want["size"][5:10])
        except ValueError as error:
            hits += 1
            assert (
                "shard-00001.array_record is damaged" in str(error)
                and len(str(error).splitlines()) == 1
            )
    assert hits > 20
    refused(
        capsys,
        "1 of 5 shards are damaged: shard-00001.array_record; remove them",
        "--verify",
        tmp_path / "cache",
    )
    shard.unlink()
    refused(capsys, "1 of 5 shards are damaged: shard-00001", "--verify", tmp_path / "cache")


def test_many_threads_read_one_cache(cached):
    source = cached().pool
    want, errors = source.all()["image"], []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(10):
            ids = rng.integers(0, 21, 30)
            if not np.array_equal(source.read(ids)["image"], want[ids]):
                errors.append(ids)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_the_command_runs_and_explains_itself():
    done = run("--help")
    assert done.returncode == 0 and "--verify OUT" in done.stdout and not done.stderr
