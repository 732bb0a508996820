"""A full disk, a read-only place, numbers that go wrong, an impatient user: one line, and nothing
is damaged."""

import contextlib
import re
import resource
import shutil
import signal

import pytest
from conftest import TINY, table
from test_kill import wait_for

MOCO = [*TINY, "--stage=pretrain", "--config.inits=('moco',)"]
ROOM = 6000  # bytes that a file may have in the tests of a full disk


def one_line(err):
    """The line that is left of standard error without the progress."""
    mistakes = [line for line in err.splitlines() if line.startswith("qmx: ")]
    assert len(mistakes) == 1 and mistakes[0] == err.splitlines()[-1] and "Traceback" not in err, (
        err
    )
    return mistakes[0]


@contextlib.contextmanager
def little_room():
    """No file that this process writes may be larger than `ROOM`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["target", "pretrain", "select", "query", "distill", "report"])
def test_full_disk(finished, command, tmp_path, stage):
    """No file can grow: the stage says so in a line; with room again the same command ends with the
    same table."""
    workdir = tmp_path / "w"
    shutil.copytree(
        finished,
        workdir,
        ignore=shutil.ignore_patterns(
            *(("ledger.sqlite*", "account.json") if stage == "query" else ())
        ),
    )
    for path in (workdir / stage,) if stage != "report" else workdir.glob("*.png"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with little_room():
        status, _, err = command(*TINY, f"--workdir={workdir}", f"--stage={stage}")
    assert status == 2, err
    assert re.search("too large|disk", one_line(err))
    status, _, err = command(*TINY, f"--workdir={workdir}")
    assert status == 0, err
    assert table(workdir) == table(finished)


@pytest.mark.slow
def test_full_disk_while_saving(start, command, tmp_path):
    """A checkpoint that does not fit ends the training and is named (a disk that has no room is
    noticed before). The same command goes on."""
    words = [*MOCO, f"--workdir={tmp_path}/w", "--config.save_minutes=0.0001"]
    process = start(*words)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50000, 50000))  # long before it saves
    _, err = process.communicate()
    assert process.returncode == 2, err
    assert re.search(
        "^qmx: .*checkpoints: a state could not be saved: .*too large", err, re.MULTILINE
    )
    assert "Traceback" not in err
    status, _, err = command(*words)
    assert status == 0 and "damaged" not in err, err


def test_read_only(command):
    """A place where nobody may write, not even root."""
    status, _, err = command(*TINY, "--workdir=/sys/qmx")
    assert status == 2 and "/sys/qmx" in one_line(err)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save_minutes", "saved"),
    [
        (0.0001, r"the last good state is .*/pretrain/moco-seed0/checkpoints/\d+"),
        (10, "no state was saved before"),
    ],
)
def test_numbers_that_go_wrong(command, tmp_path, save_minutes, saved):
    """The run stops at the step, and says which training it was and what is left of it."""
    status, _, err = command(
        *MOCO,
        f"--workdir={tmp_path}/w",
        "--config.pretrain.moco.learning_rate=1e12",
        f"--config.save_minutes={save_minutes}",
    )
    line = one_line(err)
    assert status == 2
    found = re.search(
        r"pretrain moco seed 0: the .* is (nan|inf) at step (\d+) of 11; .*lower learning rate",
        line,
    )
    assert found and re.search(saved, line), line
    kept = {
        int(path.name) for path in (tmp_path / "w/pretrain/moco-seed0/checkpoints").glob("[0-9]*")
    }
    assert all(step < int(found[2]) for step in kept) and bool(kept) == (save_minutes < 1)


@pytest.mark.slow
def test_second_signal(start, tmp_path):
    """The first one is taken note of; the second one, of either kind, ends the program at once."""
    process = start(*MOCO, "--config.pretrain.moco.epochs=400", f"--workdir={tmp_path}/w")
    # It compiles now, for seconds.
    assert wait_for(process, tmp_path / "w/pretrain/moco-seed0/inputs.json")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    # Which of the two came last.
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)


@pytest.mark.slow
def test_stop_while_asking(finished, start, command, tmp_path):
    """SIGTERM in the query stage: 75 after a batch; the answers until then are not asked for
    again."""
    workdir = tmp_path / "w"
    shutil.copytree(
        finished,
        workdir,
        ignore=shutil.ignore_patterns(
            *("ledger.sqlite*", "account.json", "query", "distill", "evaluate")
        ),
    )
    process = start(*TINY, f"--workdir={workdir}")
    assert wait_for(process, workdir / "query/inputs.json")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert re.search(
        r"query for report stopped after \d+ of 360 images; run the same command", one_line(err)
    )
    status, _, err = command(*TINY, f"--workdir={workdir}")
    assert status == 0 and table(workdir) == table(finished), err
