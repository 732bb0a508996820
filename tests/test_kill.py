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


def test_stop_and_go_on(start, command, tmp_path):
    """SIGTERM and SIGINT finish the step, save, and end with 75; the same command goes on from
    there each time, and the encoder is that of an undisturbed run to the bit."""
    whole, parts = (tmp_path / name / "pretrain/moco-seed0" for name in ("whole", "w"))
    assert command(*LONGER, f"--workdir={tmp_path}/whole")[0] == 0
    again = ""  # what the next call says first
    for number, lines in ((signal.SIGTERM, 20), (signal.SIGINT, 60)):
        process = start(*LONGER, f"--workdir={tmp_path}/w")
        assert wait_for(process, parts / "metrics.jsonl", lines)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75 and again in err, err
        last = err.splitlines()[-1]
        assert "stopped after step" in last and "run the same command again" in last
        step = int(last.partition("stopped after step ")[2].split()[0])
        assert step >= lines
        again = f"goes on from {parts}/checkpoints/{step}\n"
    status, _, err = command(*LONGER, f"--workdir={tmp_path}/w")
    assert status == 0 and again in err, err

    digests = [json.loads((path / "result.json").read_text())["sha256"] for path in (whole, parts)]
    assert digests[0] == digests[1]
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
