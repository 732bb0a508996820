"""A ledger in which bits are flipped: no wrong answer is read, and each command ends in words."""

import shutil
import sqlite3

import numpy as np
import pytest
from numbered import images, logits_of
from test_ledger import Target
from test_ledger_commands import command

from qmx.ledger import Damaged, Ledger

ANSWERS = 60


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A ledger of 60 answers to one target, a few of them float16 and labels."""
    path = tmp_path_factory.mktemp("small") / "ledger.sqlite"
    with Ledger(path, target="t", dtype="float16") as ledger:
        ledger.ask(Target(), images(*range(50, ANSWERS)))
    with Ledger(path, target="t") as ledger:
        ledger.ask(Target(), images(*range(40)), batch_size=16)
        ledger.ask(Target("label"), images(*range(40, 50)), access="label", purpose="report")
    return path


def wrong_answers(path):
    """Number of answers that are read and are not as they were written."""
    want = logits_of(*range(ANSWERS))
    want[40:50] = np.eye(4)[want[40:50].argmax(1)]
    want[50:] = want[50:].astype(np.float16)
    wrong = 0

    def read(ledger, numbers, access):
        """All at once; where that is refused in words, each for itself."""
        nonlocal wrong
        try:
            answers = ledger.read(images(*numbers), access)
        except (ValueError, LookupError, OSError):  # Damaged is a ValueError
            if len(numbers) > 1:
                for number in numbers:
                    read(ledger, [number], access)
            return
        wrong += int((answers != want[numbers]).any(1).sum())

    try:
        with Ledger(path, target="t") as ledger:
            read(ledger, [*range(40), *range(50, ANSWERS)], "logits")
            read(ledger, [*range(40, 50)], "label")
    except (ValueError, OSError) as error:
        assert str(error)
    return wrong


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("flips", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_flipped_bits(small, tmp_path, flips):
    """One bit at a time, anywhere: nothing wrong is read, and each command ends in words."""
    size = 8 * small.stat().st_size
    for bit in np.random.default_rng(flips).choice(size, flips, replace=False).tolist():
        path = tmp_path / f"{bit}.sqlite"
        shutil.copy(small, path)
        flip(path, bit)
        for words in (
            ["summary", path],
            ["verify", path, f"--out={path}.out"],
            ["export", path, f"{path}.npz"],
            ["replay", path],
            ["forget", path],  # which alone writes
        ):
            status, out, err = command(*words)
            assert status in (0, 1, 2) and "Traceback" not in err, (bit, words, err)
            if words[0] != "verify" and status:
                assert len((out + err).splitlines()) == 1 and err.startswith("qmx: "), (bit, err)
            if words[0] == "replay":
                assert wrong_answers(path) == 0, bit
        for left in tmp_path.iterdir():
            left.unlink()


def test_an_index_that_leads_to_another_image(small, tmp_path):
    """Two keys of the index lead to each other's rows: neither answer is taken for the other."""
    path = tmp_path / "ledger.sqlite"
    shutil.copy(small, path)
    with Ledger(small, target="t") as ledger:
        keys = ledger.keys(images(3, 4))
    with sqlite3.connect(path) as db:
        (root,) = db.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_answers_1'"
        ).fetchone()
    db.close()
    content = bytearray(path.read_bytes())
    one, two = (content.index(key, 4096 * (root - 1)) + len(key) for key in keys)  # the rows follow
    content[one], content[two] = content[two], content[one]
    path.write_bytes(content)
    with Ledger(path, target="t") as ledger:
        for numbers in ((3,), (4,), (3, 4)):
            with pytest.raises(Damaged, match="the answer to another image"):
                ledger.read(images(*numbers))
        np.testing.assert_array_equal(ledger.read(images(5, 6)), logits_of(5, 6))


ODD = {
    "the dtype": "UPDATE answers SET dtype = 'float33' WHERE row = 1",
    "no dtype": "UPDATE answers SET dtype = x'00' WHERE row = 1",
    "the level": "UPDATE answers SET access = 'topk' WHERE row = 1",
    "a length": "UPDATE scores SET scores = x'010203' WHERE row = 1",
    "no scores": "UPDATE scores SET scores = x'' WHERE row = 1",
    "text for scores": "UPDATE scores SET scores = 'words' WHERE row = 1",
    "a number for scores": "UPDATE scores SET scores = 7 WHERE row = 1",
    "text for a key": "UPDATE answers SET key = 'words' WHERE row = 1",
    "a number for an image": "UPDATE answers SET image = 1.5 WHERE row = 1",
    "the purpose": "UPDATE requests SET purpose = 'fun'",
    "no UTF-8": "UPDATE requests SET purpose = CAST(x'ff' AS TEXT)",
    "bytes for a target": "UPDATE requests SET target = x'74'",
    "the checksum": "UPDATE answers SET checksum = 'words' WHERE row = 1",
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_damaged_rows(small, tmp_path, change):
    """Values that no ledger writes: a line with the cure, and `verify` saves the rest."""
    path = tmp_path / "ledger.sqlite"
    shutil.copy(small, path)
    with sqlite3.connect(path) as db:
        db.execute(change)
    db.close()
    ends = {}
    for words in (["summary", path], ["export", path, tmp_path / "t.npz"], ["replay", path]):
        status, out, err = command(*words)
        ends[words[0]] = status
        if status:
            assert status == 1 and not out and len(err.splitlines()) == 1, err
            assert "is damaged" in err and "python -m qmx.ledger verify" in err, err
    assert 1 in ends.values(), ends
    assert wrong_answers(path) == 0
    status, out, err = command("verify", path)
    assert "Traceback" not in err and ("is damaged" in out or "request" in change), out + err


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """(a ledger's file, its log) as a kill leaves them: ten commits that are in the log alone."""
    path = tmp_path_factory.mktemp("logged") / "ledger.sqlite"
    with Ledger(path, target="t"):
        pass  # the tables are in the file
    with Ledger(path, target="t") as ledger:
        for start in range(0, 50, 10):
            ledger.ask(Target(), images(*range(start, start + 10)))
        return path.read_bytes(), path.with_name(path.name + "-wal").read_bytes()


def with_log(tmp_path, file, log):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(file)
    path.with_name(path.name + "-wal").write_bytes(log)
    return path


def test_a_log_that_is_cut_is_whole(logged, tmp_path):
    """As a kill may leave it, at any place; SQLite reads what was committed."""
    file, log = logged
    ends = np.random.default_rng(0).integers(0, len(log), 25).tolist()
    for end in (0, 31, 32, 56, len(log) - 1, len(log), *ends):
        path = with_log(tmp_path, file, log[:end])
        assert command("verify", path, f"--out={path}.out")[:2] == (0, f"{path} is whole\n"), end


def test_a_log_that_is_damaged_in_its_middle(logged, tmp_path):
    """One bit anywhere before the last commits: SQLite passes over what is behind it, and `verify`
    says so and brings all back."""
    file, log = logged
    commits = [at for at in range(32, len(log), 24 + 4096) if any(log[at + 4 : at + 8])]
    for bit in np.random.default_rng(1).integers(0, 8 * commits[-2], 25).tolist():
        path = with_log(tmp_path, file, log)
        flip(path.with_name(path.name + "-wal"), bit)
        status, out, _ = command("verify", path, f"--out={path}.out")
        assert status == 1 and "SQLite passes over" in out, (bit, out)
        tail = "all of it" if bit < 256 else f"{sum(at > bit // 8 for at in commits)} commit(s)"
        assert tail in out, (bit, out)
        with Ledger(f"{path}.out", target="t") as ledger:
            assert ledger.count_missing(images(*range(50))) <= 10
        (tmp_path / "ledger.sqlite.out").unlink()
