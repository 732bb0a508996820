"""The benchmarks run, in a form that takes seconds."""

import json
import subprocess
import sys

from conftest import ROOT


def test_step_time(environment):
    """A row for each method and the inference, with positive times, PyTorch beside them."""
    out = subprocess.run(
        [sys.executable, "benchmarks/step_time.py", "--batch=8", "--queue=16", "--blocks=2", "--peer=torch",
         "--input", "--methods", "distill", "moco", "simsiam", "rotation", "infer"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == ["distill", "moco", "simsiam", "rotation", "infer"]
    assert all(row["ms"] > 0 and row["compile_seconds"] > 0 and row["eager"]["ratio"] > 0 for row in rows)


def test_input_pipeline(environment):
    """A rate for each way in which photos become batches."""
    out = subprocess.run([sys.executable, "benchmarks/input_pipeline.py", "--photos=12", "--repeats=1"],
                         cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    rates = json.loads(out.splitlines()[-1])["images_per_second"]
    assert rates.keys() == {"write_cache", "read_cache", "read_files", "target_input"} and min(rates.values()) > 0


def test_faults(environment):
    """After a kill the same command goes on to the same table."""
    done = subprocess.run([sys.executable, "benchmarks/faults.py", "--kills=1"], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kills"] == 1 and figures["runs"] == 1 and not figures["images_asked_twice"]


def test_overhead(environment):
    """A ratio for each pair, of trainings that both went to the end."""
    out = subprocess.run([sys.executable, "benchmarks/overhead.py", "--arch=resnet8", "--size=8", "--batch=16",
                          "--queue=32", "--epoch-steps=4", "--epochs=2", "--pairs=2"],
                         cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    figures = json.loads(out.splitlines()[-1])
    assert len(figures["seconds"]) == 2 and figures["ratio"] > 0 and figures["state_bytes"] > 100_000


def test_selection(environment):
    """A time for each way."""
    ways = ["balanced", "kcenter", "typiclust", "probcover", "propagate"]
    out = subprocess.run([sys.executable, "benchmarks/selection.py", "--images=300", "--dimension=8", "--budget=20",
                          "--classes=5", "--ways", *ways], cwd=ROOT, env=environment, capture_output=True, text=True,
                         check=True).stdout
    assert [*json.loads(out.splitlines()[-1])["seconds"]] == ways
