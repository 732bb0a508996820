"""A vision transformer's fine-tuning, stopped and killed, goes on to the same bits."""

import json
import shutil
import signal
import time

import pytest
from small_vit import NAME, SMALL
from test_fine_tuning import GIVEN, file_of
from test_kill import wait_for

from qmx.models.vit import VITS

PART = "distill/imported-random-logits-asked-40-seed0"


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Of a run with stochastic depth and AdamW, which saves every fifth of a second."""
    monkeypatch.setitem(VITS, NAME, SMALL)
    file_of(tmp_path / "student.safetensors", 3)
    file_of(tmp_path / "target.safetensors", 1, side=12)
    given = {**GIVEN, "uses": "('asked',)", "distill.min_steps": 150, "save_minutes": 0.003}
    given["pretrain.imported.path"] = tmp_path / "student.safetensors"
    given["target.path"] = tmp_path / "target.safetensors"
    return [
        "--config=configs/digits.py:float32",
        *(f"--config.{key}={value}" for key, value in given.items()),
    ]


def saved(folder):
    """The steps of which there is a whole checkpoint; orbax writes it under another name."""
    return {int(path.name) for path in folder.glob("*") if path.name.isdigit()}


@pytest.mark.slow
def test_goes_on(words, start, command, tmp_path):
    """From the step at which it was stopped, and from the last checkpoint before a kill: the
    student's file, the metrics and the table are the same."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    status, _, err = command(*words, f"--workdir={whole}")
    assert status == 0, err
    shutil.copytree(whole, stopped)
    for stage in ("distill", "evaluate"):
        shutil.rmtree(stopped / stage)
    part, goes_on = stopped / PART, f"goes on from {stopped / PART}/checkpoints/"
    words.append(f"--workdir={stopped}")

    process = start(*words, "--stage=distill")
    assert wait_for(process, part / "metrics.jsonl", lines=20)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and not (part / "result.json").exists()

    before = saved(part / "checkpoints")
    process = start(*words, "--stage=distill")
    while not saved(part / "checkpoints") - before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and goes_on + str(max(before)) in err, err
    assert not (part / "result.json").exists()

    status, _, err = command(*words)
    assert status == 0 and goes_on in err, err
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (part / name).read_bytes() == (whole / PART / name).read_bytes(), name
    rows = [
        json.loads((workdir / "results.json").read_text())["rows"] for workdir in (whole, stopped)
    ]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1] and rows[0][0]["init"] == "imported"
