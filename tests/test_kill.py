"""Killed at any moment, the same command goes on, ends with the same table, and asks nothing
twice."""

import json
import signal
import time

import pytest
from conftest import TINY, table

pytestmark = pytest.mark.slow

MOMENTS = [
    "target/metrics.jsonl",
    "target/target.safetensors",
    "pretrain/rotation-seed0/metrics.jsonl",
    "pretrain/moco-seed0/encoder.safetensors",
    "ledger.sqlite",
    "ledger.sqlite-wal",
    "distill/moco-random-logits-asked-71-seed0/metrics.jsonl",
    "evaluate/none-random-logits-asked-1437-seed0/result.json",
    "results.json",
]


def wait_for(process, path, lines=0):
    """Until the file is there, with so many lines; returns False if the process ended before."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if path.exists() and (not lines or len(path.read_text().splitlines()) >= lines):
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError(f"{path} did not appear")


def test_kill(finished, start, process, tmp_path):
    """SIGKILL in every stage, each time as soon as a certain file appears."""
    workdir = tmp_path / "w"
    for moment in MOMENTS:
        running = start(*TINY, f"--workdir={workdir}")
        wait_for(running, workdir / moment)
        running.kill()
        running.communicate()
        assert running.returncode in (0, -signal.SIGKILL)
    status, _, err = process(*TINY, f"--workdir={workdir}")
    assert status == 0, err
    killed, undisturbed = table(workdir), table(finished)
    # A batch that was under way at a kill may be on record as sent; its images were never answered
    # before.
    assert killed["account"].pop("unanswered") % 1 == 0 == undisturbed["account"].pop("unanswered")
    assert killed == undisturbed
    assert killed["account"]["calls"] == killed["account"]["images"]


LONGER = [*TINY, "--stage=pretrain", "--config.inits=('moco',)", "--config.pretrain.moco.epochs=12"]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The encoder's directory of an undisturbed run that takes a second or two."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    assert command(*LONGER, f"--workdir={workdir}")[0] == 0
    return workdir / "pretrain/moco-seed0"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_and_go_on(whole, start, command, tmp_path, number):
    """SIGTERM and SIGINT finish the step, save, and end with 75; the same command goes on from
    there, and the encoder is the same to the bit."""
    parts = tmp_path / "w/pretrain/moco-seed0"
    process = start(*LONGER, f"--workdir={tmp_path}/w")
    assert wait_for(process, parts / "metrics.jsonl", lines=20)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert (
        "stopped after step" in err.splitlines()[-1]
        and "run the same command again" in err.splitlines()[-1]
    )
    status, _, err = command(*LONGER, f"--workdir={tmp_path}/w")
    assert status == 0 and f"goes on from {parts}/checkpoints/" in err

    digests = [json.loads((path / "result.json").read_text())["sha256"] for path in (whole, parts)]
    assert digests[0] == digests[1]
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
