"""Two processes of two devices each run as one: the same table, the same ledger, and no hang when one dies."""

import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

# Short trainings: rounding, which differs with the order of sums, is amplified some tenfold in each step.
SHORT = ["--config=configs/digits.py", "--config.seeds=(0,)", "--config.fractions=(0.05,1.0)",
         "--config.inits=('none','moco')", "--config.target.epochs=1", "--config.target.learning_rate=0.01",
         "--config.pretrain.moco.epochs=1", "--config.distill.epochs=0.1", "--config.distill.min_steps=3"]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def launch(environment):
    """launch(processes, devices, flags) -> the running commands."""

    def start(processes, devices, *words):
        flags = f"--xla_force_host_platform_device_count={devices}"
        several = [f"--coordinator=localhost:{free_port()}", f"--processes={processes}"] if processes > 1 else []
        return [subprocess.Popen([sys.executable, "-m", "qmx.main", *words, *several,
                                  *([f"--process={index}"] if several else [])],
                                 cwd=ROOT, env={**environment, "XLA_FLAGS": flags}, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True) for index in range(processes)]

    return start


def finish(processes, timeout=300):
    """(status, standard out, standard error) of each; none is left behind."""
    try:
        told = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(processes, told, strict=True)]


@pytest.fixture(scope="module")
def workdirs(launch, tmp_path_factory):
    """One process of four devices; two of two, from the same target on; two of two that train the target."""
    root = tmp_path_factory.mktemp("processes")
    report = finish(launch(1, 4, *SHORT, f"--workdir={root}/one"))
    assert report[0][0] == 0, report
    shutil.copytree(root / "one/target", root / "two/target")
    for name, words in (("two", ()), ("target", ("--stage=target",))):
        done = finish(launch(2, 2, *SHORT, *words, f"--workdir={root / name}"))
        assert [status for status, _, _ in done] == [0, 0], done
        reports = ["| queries" in out for _, out, _ in done]  # collectives on CPUs print lines of their own
        assert reports == [not words, False]
        assert "writing to" in done[0][2] and "writing to" not in done[1][2]
    return root


@pytest.mark.parametrize("root, stage", [
    ("target", "target"), ("two", "pretrain/moco-seed0"), ("two", "distill/none-random-logits-0.05-seed0"),
    ("two", "distill/none-random-logits-1-seed0")])
def test_same_losses(workdirs, root, stage):
    """R7: the first steps of every kind of training, to float32 rounding."""
    files = [workdirs / name / stage / "metrics.jsonl" for name in ("one", root)]
    losses = [[json.loads(line)["loss"] for line in file.read_text().splitlines()] for file in files]
    assert len(losses[0]) == len(losses[1]) >= 3
    np.testing.assert_allclose(losses[1][:3], losses[0][:3], rtol=1e-5, atol=1e-6)


def test_same_ledger(workdirs):
    """P1: the same images were asked, once each, all answers are in the one ledger and equal to rounding."""
    answers = []
    for root in (workdirs / "one", workdirs / "two"):
        with sqlite3.connect(root / "ledger.sqlite") as db:
            answers.append(dict(db.execute("SELECT key, scores FROM answers").fetchall()))
        account = json.loads((root / "results.json").read_text())["account"]
        assert account == {"calls": 1797, "images": 1797, "views": 1797, "unanswered": 0,
                           "purposes": {"train": 1437, "select": 0, "report": 360}}
    assert answers[0].keys() == answers[1].keys()
    for key, scores in answers[0].items():
        np.testing.assert_allclose(np.frombuffer(answers[1][key], "<f4"), np.frombuffer(scores, "<f4"), atol=1e-5)


def test_same_table(workdirs):
    """To a few images in 360, and the same monitor."""
    one, two = (json.loads((workdirs / name / "results.json").read_text()) for name in ("one", "two"))
    assert len(one["rows"]) == len(two["rows"]) == 4
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert abs(a["top1"] - b["top1"]) < 1.5 and a["queries"] == b["queries"]
    assert abs(one["monitors"][0]["knn_top1"] - two["monitors"][0]["knn_top1"]) < 1.5


def test_stop_and_go_on(launch, tmp_path):
    """SIGTERM to one of two stops both after the same step with status 75, and one process alone goes on from there."""
    longer = [*SHORT, "--stage=pretrain", "--config.pretrain.moco.epochs=40", f"--workdir={tmp_path}/w"]
    metrics = tmp_path / "w/pretrain/moco-seed0/metrics.jsonl"
    running = launch(2, 2, *longer)
    wait_for(running, metrics, 20)
    running[1].send_signal(signal.SIGTERM)
    done = finish(running)
    assert [status for status, _, _ in done] == [75, 75], done
    steps = {err.partition("stopped after step ")[2].split()[0] for _, _, err in done}
    assert len(steps) == 1
    status, _, err = finish(launch(1, 4, *longer))[0]
    assert status == 0 and f"goes on from step {steps.pop()}" in err, err


def test_a_dead_process_ends_the_other(launch, tmp_path):
    """Within a minute, with a message, and the same command goes on."""
    longer = [*SHORT, "--stage=pretrain", "--config.pretrain.moco.epochs=400", f"--workdir={tmp_path}/w"]
    running = launch(2, 2, *longer)
    wait_for(running, tmp_path / "w/pretrain/moco-seed0/metrics.jsonl", 5)
    running[1].kill()
    status, _, err = finish(running, timeout=60)[0]
    assert status not in (0, None) and err


def wait_for(processes, path, lines):
    deadline = time.monotonic() + 200
    while not (path.exists() and len(path.read_text().splitlines()) >= lines):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), [
            process.communicate() for process in processes if process.poll() is not None]
        time.sleep(0.01)


@pytest.mark.parametrize("words", [("--processes=2",), ("--process=0",), ("--coordinator=localhost:1",),
                                   ("--coordinator=localhost:1", "--processes=2", "--process=2")])
def test_half_a_cluster(launch, tmp_path, words):
    """Flags that do not go together: status 2 and one line, at once."""
    status, _, err = finish(launch(1, 2, *SHORT, *words, f"--workdir={tmp_path}/w"), timeout=60)[0]
    assert status == 2 and len(err.splitlines()) == 1 and "--coordinator" in err
    assert not (tmp_path / "w").exists()
