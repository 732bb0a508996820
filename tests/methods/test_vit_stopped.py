"""A vision transformer's fine-tuning, stopped and killed, goes on to the same bits."""

import json
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from test_fine_tuning import GIVEN, NAME, SMALL, file_of
from test_kill import wait_for

pytestmark = pytest.mark.slow

KNOWN = f"""
import sys

from qmx.main import main
from qmx.models.vit import VITS, Arch
from qmx.ranges import WORDS

VITS[{NAME!r}], WORDS["student.arch"] = {SMALL!r}, ({NAME!r}, "resnet8")
sys.exit(main(["qmx.main", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def start(environment, tmp_path_factory):
    """start(workdir) -> the command in a process of its own, with stochastic depth and AdamW."""
    files = tmp_path_factory.mktemp("vits")
    file_of(files / "student.safetensors", 3)
    file_of(files / "target.safetensors", 1, side=12)
    given = {**GIVEN, "uses": "('asked',)", "distill.min_steps": 400, "save_minutes": 0.01}
    given["pretrain.imported.path"] = files / "student.safetensors"
    given["target.path"] = files / "target.safetensors"

    def run(workdir):
        words = [f"--config.{key}={value}" for key, value in given.items()]
        words = ["--config=configs/digits.py:float32", f"--workdir={workdir}", *words]
        return subprocess.Popen(
            [sys.executable, "-c", KNOWN, *words],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    return run


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    process = start(workdir)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return workdir


PART = "distill/imported-random-logits-asked-40-seed0"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_goes_on(whole, start, tmp_path, number):
    """From the step at which it was stopped, or the last checkpoint before a kill: the student's
    file, the metrics and the table are the same."""
    part = tmp_path / "w" / PART
    process = start(tmp_path / "w")
    assert wait_for(process, part / "metrics.jsonl", lines=150)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (75 if number == signal.SIGTERM else -number)
    assert not (part / "result.json").exists()
    again = start(tmp_path / "w")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0 and f"goes on from {part}/checkpoints/" in err, err
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (part / name).read_bytes() == (whole / PART / name).read_bytes(), name
    rows = [
        json.loads((workdir / "results.json").read_text())["rows"]
        for workdir in (whole, tmp_path / "w")
    ]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1] and rows[0][0]["init"] == "imported"
