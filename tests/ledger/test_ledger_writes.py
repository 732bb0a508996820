"""An answer that came is written, whatever stands in its way; and it waits for the disk."""

import sqlite3
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from numbered import images, logits_of, numbers_of, refuse
from test_ledger import Target, another_process

import qmx
from qmx.ledger import Damaged, Ledger, Unwritten, file, sending
from qmx.ledger.file import File


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def hasty(monkeypatch):
    """SQLite gives up after a twentieth of a second, and we try again as soon."""
    monkeypatch.setattr(file, "BUSY", 0.05)
    monkeypatch.setattr(sending, "PAUSES", (0.05, 0.1))


HOLDING = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
db.execute("ROLLBACK")
"""


def test_another_process_holds_the_file(path, hasty):
    """Longer than SQLite waits: the batch is sent once, and its answers are there in the end."""
    said, waits, holders = [], [], []

    def query(pixels):
        """The file is free when the request is written down, and held when the answer comes."""
        if numbers_of(pixels)[0] == 4:
            holders.append(another_process(HOLDING, path, stdin=subprocess.PIPE))
            assert holders[0].stdout.readline() == "held\n"
        return target(pixels)

    def pause(seconds, error):
        waits.append(seconds)
        assert isinstance(error, Unwritten) and "4 answers" in str(error), error
        if len(waits) == 4:
            holders[0].communicate("\n")
        time.sleep(seconds)

    target = Target()
    with Ledger(path, target="t") as ledger:
        answers = ledger.ask(query, images(*range(12)), batch_size=4, pause=pause, say=said.append)
        np.testing.assert_array_equal(answers, logits_of(*range(12)))
        assert target.sent == [*range(12)] and waits == [0.05, 0.1, 0.1, 0.1]
        assert ledger.account()[:6] == (12, 12, 12, 0, 0, 0)
    assert len(said) == 2 and "4 answers that came cannot be written: " in said[0], said
    assert (
        "locked; end the other program" in said[0] and "writing is tried until it works" in said[0]
    )
    assert "can be written again" in said[1]


def test_told_to_stop_while_the_file_is_held(path, hasty):
    """The error says how many answers are lost; the next session asks for no others."""

    def query(pixels):
        held.execute("BEGIN IMMEDIATE")
        return logits_of(*numbers_of(pixels))

    def stop(seconds, error):
        raise KeyboardInterrupt

    with Ledger(path, target="t") as ledger:
        ledger.ask(Target(), images(0, 1))
        held = sqlite3.connect(path, isolation_level=None)
        with pytest.raises(KeyboardInterrupt) as told:
            ledger.ask(query, images(0, 1, 2, 3, 4), pause=stop)
        assert told.value.__notes__ == ["3 answers that came are not written, and lost"]
    held.close()
    target = Target()
    with Ledger(path, target="t") as ledger:
        ledger.ask(target, images(0, 1, 2, 3, 4))
        assert target.sent == [2, 3, 4] and ledger.account().unanswered == 3


def test_a_damaged_file_says_what_is_lost(path):
    """No waiting helps there."""

    def query(pixels):
        with open(path, "r+b") as whole:
            whole.write(b"\xff" * path.stat().st_size)
        path.with_name(path.name + "-wal").write_bytes(b"")
        return np.ones((len(pixels), 4))

    with Ledger(path, target="t") as ledger:
        ledger.ask(Target(), images(*range(200)))
    with Ledger(path, target="t") as ledger:
        with pytest.raises((Damaged, OSError), match="2 answers that came are not written"):
            ledger.ask(query, images(500, 501), pause=lambda *_: pytest.fail("it waited"))


# Run in a name space of its own, where a small disk is mounted. A file takes the disk's room while
# the target thinks; after some attempts to write it is removed.
FILLING = """
import sys, time
from pathlib import Path
import numpy as np
from qmx.ledger import sending
from numbered import images, logits_of, numbers_of, refuse
from qmx.ledger import Ledger

disk, sent, waits = Path(sys.argv[1]), [], []
filler = disk / "filler"

def fill():
    try:
        with open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass

def query(pixels):
    sent.extend(numbers_of(pixels))
    if sent[-1] == 7:
        fill()
    return np.tile(logits_of(*numbers_of(pixels)), 5000)

def pause(seconds, error):
    waits.append(str(error))
    if len(waits) == 3:
        filler.unlink()

with Ledger(disk / "ledger.sqlite", target="t") as ledger:
    ask = lambda *numbers: ledger.ask(query, images(*numbers), batch_size=4, pause=pause)
    answers = ask(*range(12))
    assert (answers == np.tile(logits_of(*range(12)), 5000)).all()
    assert sent == [*range(12)] and ledger.account()[:6] == (12, 12, 12, 0, 0, 0)
    assert len(waits) == 3 and "full; make room on the disk" in waits[0], waits
    fill()
    try:
        ask(*range(12, 20))
    except OSError as error:
        assert "MB left" in str(error) and "nothing was sent" in str(error), error
    assert sent == [*range(12)] and ledger.account()[:6] == (12, 12, 12, 0, 0, 0)
    filler.unlink()
    ask(*range(12, 20))
with Ledger(disk / "ledger.sqlite", target="t") as ledger:
    assert (ledger.read(images(*range(20))) == np.tile(logits_of(*range(20)), 5000)).all()
print("well")
"""


def test_a_full_disk(on_small_disk):
    """A real one: what came is written once there is room, and without room nothing is sent."""
    done = on_small_disk(FILLING, Path(__file__).parent)
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr


def test_answers_wait_for_the_disk(path, monkeypatch):
    """A power cut loses none that was told of: FULL at each commit, whatever went before.

    NORMAL is for the record of a request. A request that fails, or cannot be written down, leaves
    FULL behind.
    """
    levels, whole = [], File.run

    def run(self, statement, parameters=()):
        if statement == "COMMIT":
            levels.extend(whole(self, "PRAGMA synchronous"))
        return whole(self, statement, parameters)

    monkeypatch.setattr(File, "run", run)
    monkeypatch.setattr(file, "BUSY", 0.05)
    with Ledger(path, target="t") as ledger:
        ledger.ask(Target(), images(0, 1), batch_size=1)
        with pytest.raises(ConnectionError):
            ledger.ask(Target(limit=0), images(2))
        held = sqlite3.connect(path, isolation_level=None)
        held.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match="locked; end the other program that writes there"):
            ledger.ask(refuse, images(2))
        held.execute("ROLLBACK")
        held.close()
        ledger.record(qmx.ledger.pixel_digests(images(7)), logits_of(7), "logits")
        ledger.ask(Target(), images(2, 7))
    assert len(levels) == 5 and {*levels} == {(2,)}  # 2 is FULL
