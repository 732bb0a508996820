"""Photos in the pool and among the evaluation images: by their content, under whatever name."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_data import load
from test_photos import encoded, photo, tree

from qmx.data.copies import TAIL, main


def bitmaps(seed, names, **more):
    """Photos of equal size in bytes, by name."""
    return {
        name: encoded(photo(40, 36, seed=seed + k), "BMP") for k, name in enumerate(names)
    } | more


NAMES = [f"{kind}/{kind}_{k:04}.bmp" for kind in ("cat", "dog") for k in range(4)]


def test_numbered_files_are_other_photos(tmp_path):
    """Equal names and equal sizes on both sides, and other pixels."""
    pool, evaluation = (
        tree(tmp_path / "a", bitmaps(0, NAMES)),
        tree(tmp_path / "b", bitmaps(50, NAMES)),
    )
    data = load("folder", pool, evaluation)
    assert data.pool.names == data.evaluation.names and data.pool.size == 8


def test_copies_under_other_names_are_refused_with_a_pair(tmp_path):
    files = bitmaps(0, NAMES)
    pool = tree(tmp_path / "a", files)
    evaluation = tree(
        tmp_path / "b",
        bitmaps(
            50,
            NAMES,
            **{"dog/other.bmp": files[NAMES[2]], "dog/name.bmp": files[NAMES[0]]},
        ),
    )
    with pytest.raises(ValueError) as error:
        load("folder", pool, evaluation)
    text = str(error.value)
    assert text.startswith(
        f"2 of 10 evaluation images are in the pool too: {evaluation}/dog/name.bmp is"
        f" {pool}/{NAMES[0]};"
    )
    assert len(text.splitlines()) == 1


def test_the_cure_of_copies_works(tmp_path, monkeypatch):
    """As the message has it, in a shell, with a space in the folder's name."""
    files = bitmaps(0, NAMES)
    pool, evaluation = (
        tree(tmp_path / "my photos", files),
        tree(tmp_path / "b", bitmaps(50, NAMES, **{"dog/x.bmp": files[NAMES[1]]})),
    )
    with pytest.raises(ValueError) as error:
        load("folder", pool, evaluation)
    command, _, end = str(error.value).partition("python -m ")[2].partition(" and leave")
    assert "data.leave_out=copies.txt" in end
    subprocess.run(
        f"cd {tmp_path} && PYTHONPATH={ROOT} {sys.executable} -m {command}", shell=True, check=True
    )
    monkeypatch.chdir(tmp_path)
    data = load("folder", pool, evaluation, leave_out="copies.txt")
    assert (data.pool.size, data.evaluation.size) == (8, 8)


def test_long_files_that_end_alike_are_read_whole(tmp_path):
    one = encoded(photo(60, 60), "BMP") + bytes(2 * TAIL)
    two = one[:100] + bytes([one[100] ^ 1]) + one[101:]
    pool = tree(tmp_path / "a", {"cat/1.bmp": one})
    assert load("folder", pool, tree(tmp_path / "b", {"cat/1.bmp": two})).pool.size == 1
    with pytest.raises(ValueError, match="^1 of 1 evaluation .*b2/cat/9.bmp is .*a/cat/1.bmp;"):
        load("folder", pool, tree(tmp_path / "b2", {"cat/9.bmp": one}))


def test_empty_files_are_broken_and_not_copies(tmp_path):
    files = {"cat/1.jpg": b"", "cat/2.jpg": (30, 30)}
    pool = tree(tmp_path / "a", files)
    data = load("folder", pool, tree(tmp_path / "b", {"cat/1.jpg": b"", "cat/2.jpg": (31, 30)}))
    assert data.evaluation.size == 2
    with pytest.raises(ValueError, match="the file is empty"):
        data.evaluation.shown(np.arange(2))


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none"), str(Path(tmp_path))]) == 2
    assert capsys.readouterr().err.count("\n") == 1
