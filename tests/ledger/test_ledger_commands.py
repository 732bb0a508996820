"""`python -m qmx.ledger` on real files, whole and damaged; float16; two writers; a kill while it
writes."""

import io
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from numbered import images, logits_of, numbers_of, refuse
from test_ledger import Target, another_process

import qmx
from qmx.ledger import BudgetSpent, Damaged, Ledger
from qmx.ledger.__main__ import main
from qmx.ledger.table import load

PAGE = 4096


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def command(*words):
    """(exit status, standard out, standard error) of the ledger's command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([*map(str, words)])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


# Scores as float16


def test_float16_halves_the_file_and_rounds_once(tmp_path):
    """The answers are the nearest float16, the first time and later, beside float32 ones; each row
    keeps its own."""
    sizes = {}
    scores = np.random.default_rng(0).normal(0, 30, (300, 1000)).astype(np.float32)
    for dtype in ("float32", "float16"):
        path = tmp_path / dtype
        with Ledger(path, target="t", dtype=dtype) as ledger:
            bought = ledger.ask(
                lambda pixels: scores[: len(pixels)], images(*range(300)), batch_size=300
            )
        with Ledger(path, target="t", dtype="float32") as ledger:
            np.testing.assert_array_equal(bought, scores.astype(dtype).astype(np.float32))
            np.testing.assert_array_equal(ledger.read(images(*range(300))), bought)
            assert ledger.read(images(0)).dtype == np.float32
            new = ledger.ask(lambda pixels: scores[: len(pixels)] / 3, images(300, 5))
            np.testing.assert_array_equal(new, [scores[0] / 3, bought[5]])
        sizes[dtype] = path.stat().st_size
    assert 0.45 < sizes["float16"] / sizes["float32"] < 0.6


def test_a_score_beyond_float16_stays_float32(path):
    """It would be infinite. Its row alone is wider, and says so."""
    scores = np.array([[0, 0, 0, 1.0001], [0, 0, 1.0001, -70000]], np.float32)
    with Ledger(path, target="t", dtype="float16") as ledger:
        ledger.ask(lambda pixels: np.full((len(pixels), 4), 65504.0), images(0))
        answers = ledger.ask(lambda pixels: scores, images(1, 2))
        np.testing.assert_array_equal(answers, [scores[0].astype(np.float16), scores[1]])
        assert ledger.account()[:6] == (3, 3, 3, 0, 0, 0)
        np.testing.assert_array_equal(ledger.read(images(0)), np.full((1, 4), 65504.0))
    with sqlite3.connect(path) as db:
        assert [*db.execute("SELECT dtype FROM answers ORDER BY row")] == [
            ("float16",),
            ("float16",),
            ("float32",),
        ]
    db.close()
    assert command("verify", path)[0] == 0
    with pytest.raises(ValueError, match="float8"):
        Ledger(path, target="t", dtype="float8")


# Order, kills, two writers


def test_the_order_of_asking_does_not_matter(tmp_path):
    """One by one backwards, or in large batches: the same answers, and the same account but for
    nothing."""
    files = []
    for name, order, batch in (
        ("a", np.arange(700), 256),
        ("b", np.random.default_rng(1).permutation(700), 3),
    ):
        with Ledger(tmp_path / name, target="t") as ledger:
            for some in np.split(order, 7):
                ledger.ask(Target(), images(*some), batch_size=batch)
            files.append((ledger.read(images(*range(700))), ledger.account()))
    np.testing.assert_array_equal(files[0][0], files[1][0])
    assert files[0][1] == files[1][1]


WRITING = """
import sys
import numpy as np
from qmx.ledger import Ledger
from numbered import images, logits_of, numbers_of

path, start, stop, step = sys.argv[1], *map(int, sys.argv[2:])
with Ledger(path, target="t") as ledger:
    print("open", flush=True)
    for first in range(start, stop, step):
        some = range(first, min(first + step, stop))
        ledger.ask(
            lambda pixels: np.tile(logits_of(*numbers_of(pixels)), 500),
            images(*some),
            batch_size=step,
        )
print("done", flush=True)
"""


def test_killed_in_the_middle_of_writing(path):
    """SIGKILL while large answers are written as fast as they come, twice; the file is whole, and
    so is each batch."""
    for seen in (64, 320):
        with another_process(WRITING, path, 0, 60000, 64) as process:
            assert process.stdout.readline() == "open\n"
            with Ledger(path, target="t") as ledger:
                while ledger.account().images < seen:
                    time.sleep(0.001)
                process.kill()
    assert command("verify", path)[:2] == (0, f"{path} is whole\n")
    with Ledger(path, target="t") as ledger:
        account = ledger.account()
        assert (
            account.images % 64 == 0 and account.images >= 320 and account.calls == account.images
        )
        count = account.images
        np.testing.assert_array_equal(
            ledger.read(images(*range(count))), np.tile(logits_of(*range(count)), 500)
        )
        assert ledger.count_missing(images(*range(count, count + 10))) == 10


def test_two_processes_write_at_once(path):
    """Half of the images are wanted by both: every answer is there once, right, and nothing waits
    for ever."""
    with (
        another_process(WRITING, path, 0, 400, 16) as one,
        another_process(WRITING, path, 200, 600, 16) as two,
    ):
        assert one.stdout.read() == two.stdout.read() == "open\ndone\n"
    with Ledger(path, target="t") as ledger:
        np.testing.assert_array_equal(
            ledger.read(images(*range(600))), np.tile(logits_of(*range(600)), 500)
        )
        account = ledger.account()
    assert account.images == account.views == account.purposes["train"] == 600
    assert 600 <= account.calls <= 800 and not account.unanswered and not account.failed
    assert command("verify", path)[0] == 0


def test_a_budget_of_many(path):
    """The quick bound and the exact count agree: to the last image and no further."""
    with Ledger(path, target="t", budget=900) as ledger:
        ledger.ask(Target(), images(*range(5000, 5600)), purpose="report")
        for start in range(0, 900, 100):
            ledger.ask(Target(), images(*range(start, start + 100)))
            ledger.ask(refuse, images(*range(0, start + 100)))
        with pytest.raises(BudgetSpent, match="900 of 900 .* 1 more"):
            ledger.ask(refuse, images(900))
        with pytest.raises(BudgetSpent, match="900 of 900 .* 2 more"):
            ledger.ask(refuse, images(0, 5000, 5001), purpose="select")
        assert ledger.spent() == 900


# Damage


ANSWERS, CLASSES = 1200, 700


def large(numbers):
    return np.tile(logits_of(*numbers), CLASSES // 4)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A ledger of two targets whose trees are three levels deep."""
    path = tmp_path_factory.mktemp("sound") / "ledger.sqlite"
    for target, numbers in (("t" * 64, range(ANSWERS)), ("other", range(50))):
        with Ledger(path, target=target, preprocessing="resize") as ledger:
            ledger.ask(lambda pixels: large(numbers_of(pixels)), images(*numbers))
    return path


def pages_of(path, table, kind):
    """Numbers of a table's pages of a kind, "leaf" or "internal", by SQLite's own account."""
    with sqlite3.connect(path) as db:
        try:
            return [
                n
                for (n,) in db.execute(
                    "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = ?", [table, kind]
                )
            ]
        except sqlite3.OperationalError:
            pytest.skip("this SQLite was built without dbstat")


def spoil(path, pages, seed=0):
    with open(path, "r+b") as file:
        for page in pages:
            file.seek((page - 1) * PAGE)
            file.write(np.random.default_rng(seed + page).bytes(PAGE))


def recovered(path):
    """Verifies a damaged file, and returns how many of the first target's answers are back; those
    are right."""
    before = path.read_bytes()
    status, out, err = command("verify", path)
    assert status == 1 and f"{path} is damaged" in out and "Traceback" not in err, out + err
    assert path.read_bytes() == before
    copy = path.with_name(path.name + ".recovered")
    assert command("verify", copy)[:2] == (0, f"{copy} is whole\n")
    with Ledger(copy, target="t" * 64, preprocessing="resize") as ledger:
        missing = ledger.unanswered(images(*range(ANSWERS)))
        there = np.setdiff1d(np.arange(ANSWERS), missing)
        np.testing.assert_array_equal(ledger.read(images(*there)), large(there))
        assert ledger.account().images == len(there)
    assert f"{ANSWERS + 50} answers" in out or len(there) < ANSWERS
    return len(there)


@pytest.mark.parametrize(
    "table, kind, lost",
    [
        ("scores", "internal", 0),
        ("answers", "internal", 0),
        ("sqlite_autoindex_answers_1", "internal", 0),
        ("sqlite_autoindex_answers_1", "leaf", 0),
        ("answers_by_request", "leaf", 0),
    ],
)
def test_trees_in_ruins(sound, path, table, kind, lost):
    """Every page of a tree that holds no answer itself is garbage: all answers come back."""
    shutil.copy(sound, path)
    pages = pages_of(path, table, kind)
    assert pages
    spoil(path, pages)
    assert recovered(path) == ANSWERS - lost


def test_pages_of_garbage(sound, path):
    """Sixty pages here and there, interior ones and the head of the file among them: the rest comes
    back."""
    shutil.copy(sound, path)
    leaves = pages_of(path, "scores", "leaf")
    spoil(
        path,
        [
            1,
            *pages_of(path, "scores", "internal")[:2],
            *leaves[10:500:9],
            pages_of(path, "answers", "leaf")[3],
        ],
    )
    assert ANSWERS - 55 - 40 <= recovered(path) < ANSWERS - 50


def test_one_byte(sound, path):
    """A flipped bit within the scores is nothing that SQLite sees: verify does, and so does
    reading."""
    shutil.copy(sound, path)
    at = path.read_bytes().index(large([734]).astype("<f4").tobytes()[:64])
    with open(path, "r+b") as file:
        file.seek(at + 20)
        byte = file.read(1)[0]
        file.seek(at + 20)
        file.write(bytes([byte ^ 4]))
    with Ledger(path, target="t" * 64, preprocessing="resize") as ledger:
        np.testing.assert_array_equal(ledger.read(images(733, 735)), large([733, 735]))
        with pytest.raises(
            Damaged, match=r"ledger.sqlite is damaged .*python -m qmx.ledger verify .*ledger"
        ):
            ledger.read(images(733, 734))
    assert (
        "1 of 1250 answers are not as they were written"
        in command("verify", path, f"--out={path}.x")[1]
    )
    assert recovered(path) == ANSWERS - 1


@pytest.mark.parametrize("share", [0.95, 0.5])
def test_cut_off(sound, path, share):
    """What lies in the part that is left comes back; asking for the rest makes it whole."""
    shutil.copy(sound, path)
    os.truncate(path, int(path.stat().st_size * share) // 1000 * 1000)
    count = recovered(path)
    assert share * ANSWERS * 0.93 < count < ANSWERS
    assert "the file ends after" in command("verify", path, f"--out={path}.x")[1]
    with Ledger(f"{path}.recovered", target="t" * 64, preprocessing="resize") as ledger:
        target = Target()
        ledger.ask(lambda pixels: np.tile(target(pixels), CLASSES // 4), images(*range(ANSWERS)))
        assert len(target.sent) == ANSWERS - count
        np.testing.assert_array_equal(ledger.read(images(*range(ANSWERS))), large(range(ANSWERS)))


def test_lost_requests(sound, path):
    """Without the record of any request but those of one page, keys tell whose the answers are."""
    with Ledger(sound, target="u") as ledger:
        assert not ledger.account().images
    shutil.copy(sound, path)
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM requests WHERE id BETWEEN 3 AND 5")
    db.close()
    status, out, _ = command("verify", path)
    assert (
        status == 1
        and "688 of 1250 answers have lost their request" in out
        and "688 of them lost the record" in out
    )
    with Ledger(f"{path}.recovered", target="t" * 64, preprocessing="resize") as ledger:
        np.testing.assert_array_equal(ledger.read(images(*range(ANSWERS))), large(range(ANSWERS)))
        assert ledger.account().purposes["train"] == ANSWERS


def test_what_is_in_the_write_ahead_log_comes_back(path):
    """Answers that were committed and are not in the main file yet, of a process that was
    killed."""
    with another_process(WRITING, path, 0, 640, 64) as process:
        assert process.stdout.readline() == "open\n"
        with Ledger(path, target="t") as ledger:  # open, so that nobody tidies up
            process.wait()
            files = {name: Path(f"{path}{name}").read_bytes() for name in ("", "-wal")}
            assert len(files["-wal"]) > 100_000
    damaged = path.with_name("damaged.sqlite")
    for name, content in files.items():
        Path(f"{damaged}{name}").write_bytes(content)
    # From the first broken page on SQLite reads nothing of it.
    with open(f"{damaged}-wal", "r+b") as log:
        log.seek(32 + 24 + 200)
        log.write(b"garbage")
    files["-wal"] = Path(f"{damaged}-wal").read_bytes()
    status, out, _ = command("verify", damaged)
    assert status == 1, out
    with Ledger(f"{damaged}.recovered", target="t") as ledger:
        np.testing.assert_array_equal(
            ledger.read(images(*range(640))), np.tile(logits_of(*range(640)), 500)
        )
    assert Path(f"{damaged}-wal").read_bytes() == files["-wal"]


def test_the_cure_of_a_damaged_file(tmp_path):
    """The line for a shell that is printed puts the recovered file in its place; the log of a
    killed process beside the old one, which SQLite would write into the new one, is gone."""
    path = tmp_path / "a ledger.sqlite"
    with Ledger(path, target="t") as ledger:
        ledger.ask(lambda some: np.tile(logits_of(*numbers_of(some)), 500), images(*range(400)))
    leaves = pages_of(path, "scores", "leaf")
    with another_process(WRITING, path, 400, 60000, 32) as process:
        assert process.stdout.readline() == "open\n"
        with Ledger(path, target="t") as ledger:
            while ledger.account().images < 600:
                time.sleep(0.001)
            process.kill()
            process.wait()
            files = {name: Path(f"{path}{name}").read_bytes() for name in ("", "-wal")}
    for name, content in files.items():
        Path(f"{path}{name}").write_bytes(content)
    spoil(path, leaves[10:14])
    status, out, _ = command("verify", path)
    assert status == 1 and len(files["-wal"]) > 100_000, out
    cure = re.search("in its place: (.*)$", out, re.MULTILINE)[1]
    subprocess.run(["sh", "-c", cure], check=True)
    assert command("verify", path)[:2] == (0, f"{path} is whole\n")
    with Ledger(path, target="t") as ledger:
        missing = ledger.unanswered(images(*range(600)))
        there = np.setdiff1d(range(600), missing)
        assert 590 < len(there) < 600
        np.testing.assert_array_equal(ledger.read(images(*there)), np.tile(logits_of(*there), 500))


# Commands


def test_the_command(path):
    """As people call it: nothing but its output on standard out and error."""
    with Ledger(path, target="t") as ledger:
        ledger.ask(Target(), images(0))
    done = subprocess.run(
        [sys.executable, "-m", "qmx.ledger", "verify", path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(qmx.__file__).parents[1])},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path} is whole\n", "")


def test_summary_says_what_there_is(path):
    with Ledger(path, target="t", preprocessing="resize") as ledger:
        ledger.ask(Target(), images(0, 1, 2), purpose="report")
    with Ledger(path, target="u", dtype="float16") as ledger:
        ledger.ask(Target("label"), images(0, 1), access="label")
    status, out, err = command("summary", path)
    assert (status, err) == (0, "")
    assert out.splitlines()[1:] == [
        "target t",
        "  3 answers for report: logits of 4 classes in float32; preprocessing resize",
        "  asked: 3 distinct images (0 for train, 0 for select, 3 for report), 3 views, 3 calls",
        "  0 sent in requests that failed (0 sent again), 0 without an answer",
        "target u",
        "  2 answers for train: label of 4 classes in float16; preprocessing as-is",
        "  asked: 2 distinct images (2 for train, 0 for select, 0 for report), 2 views, 2 calls",
        "  0 sent in requests that failed (0 sent again), 0 without an answer",
    ]


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_export(path, tmp_path, kind):
    with Ledger(path, target="the first", preprocessing="resize") as ledger:
        scores = ledger.ask(Target(), images(0, 1, 2))
        ledger.ask(Target(), images(7), of=images(0))
        digests = [
            row.tobytes()
            for row in np.frombuffer(
                b"".join(qmx.ledger.pixel_digests(images(0, 1, 2))), np.uint8
            ).reshape(3, 32)
        ]
    with Ledger(path, target="the second") as ledger:
        ledger.ask(Target(), images(0))
    out = tmp_path / f"answers.{kind}"
    status, _, err = command("export", path, out)
    assert status == 2 and "2 targets" in err and "the first" in err and "--target" in err
    status, told, err = command("export", path, out, "--target=the f")
    assert status == 0 and "3 answers of 4 classes" in told and "1 answers to views" in told, err
    table = load(out)
    assert [row.tobytes() for row in table.image] == digests
    np.testing.assert_array_equal(table.scores, scores)
    assert (table.target, table.preprocessing, set(table.access)) == (
        "the first",
        "resize",
        {"logits"},
    )
    status, _, err = command("export", path, out, "--target=the f")
    assert status == 2 and "is there already" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["summary", "none.sqlite"], "none.sqlite: no such file"),
        (["verify", "text"], "damaged"),
        ([], "required"),
        (["export", "text", "out.csv"], "ends in .npz or .parquet"),
        (["summary", "foreign"], "cannot be used as a ledger"),
        (["verify", "foreign"], "cannot be used as a ledger"),
        (["fun", "x"], "invalid choice"),
        (["forget", "foreign"], "cannot be used as a ledger"),
        (["forget", "text"], "damaged"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, message):
    (tmp_path / "text").write_text("no database\n" * 500)
    with sqlite3.connect(tmp_path / "foreign") as db:
        db.execute("CREATE TABLE answers (question TEXT)")
    db.close()
    before = (tmp_path / "foreign").read_bytes()
    status, out, err = command(*words[:1], *(tmp_path / word for word in words[1:]))
    lines = (out + err).splitlines()
    if words[:1] == ["verify"] and words[1] == "text":
        assert status == 1 and "0 of 0 answers" in out
    else:
        assert status == 1 + (message != "damaged") and len(lines) == 1 and message in lines[0]
    assert (tmp_path / "foreign").read_bytes() == before
