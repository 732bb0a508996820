"""The benchmarks run, in a form that takes seconds; most of them with tests/one_block.py."""

import json
import runpy
import sys

import numpy as np
import pytest
from conftest import ROOT

from qmx.models.resnet import ARCHS

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def last_line(printed):
    """last_line(file, *words) -> the JSON that a benchmark ends with."""
    return lambda file, *words: json.loads(printed(file, *words)[-1])


@pytest.fixture
def threads():
    """PyTorch has as many threads afterwards as before."""
    import torch

    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.slow
def test_step_time(last_line, threads):
    """A row for each method and the inference, with positive times, PyTorch beside them.

    Distillation and MoCo are timed beside PyTorch in tests/test_gpu_benchmark.py.
    """
    rows = last_line(
        "step_time.py",
        "--arch=one_block",
        "--batch=8",
        "--queue=16",
        "--blocks=2",
        "--peer=torch",
        "--input",
        "--methods",
        "simsiam",
        "rotation",
        "infer",
    )["rows"]
    assert [row["method"] for row in rows] == ["simsiam", "rotation", "infer"]
    assert all(row["input"]["ratio"] > 0 for row in rows[:2]) and "input" not in rows[2]
    assert all(
        row["ms"] > 0 and row["compile_seconds"] > 0 and row["eager"]["ratio"] > 0 for row in rows
    )


@pytest.mark.slow
def test_convolutions(last_line):
    """A time of both sides for every part of each shape, and the sums that count a shape as often
    as it occurs."""
    figures = last_line(
        "convolutions.py",
        "--arch=one_block",
        "--size=8",
        "--channels=1",
        "--batch=4",
        "--blocks=1",
    )
    assert sum(row["times"] for row in figures["rows"]) == 3  # 1, and a block of 2
    for part, sums in figures["sums"].items():
        for side in (0, 1):
            wanted = sum(row["times"] * row["seconds"][part][side] for row in figures["rows"])
            assert sums[side] == pytest.approx(wanted)


def test_layers(monkeypatch):
    """The convolutions of a network of three stages: strides and shortcuts too."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from limits import layers

    found = layers(ARCHS["resnet8"], 8, 1)
    assert len(found) == 9  # 1 + 3 blocks of 2, and two shortcuts
    assert [conv.stride for conv in found].count(2) == 4
    assert [conv.kernel for conv in found].count(1) == 2


@pytest.mark.slow
def test_moco_cifar10(printed, tmp_path):
    """A row for each epoch, the neighbours asked where they should be, beside the notebook's
    figures."""
    rng = np.random.default_rng(0)
    for name, count in (("pool", 128), ("evaluation", 32)):
        np.savez(
            tmp_path / f"{name}.npz",
            image=rng.integers(0, 256, (count, 32, 32, 3), np.uint8),
            label=np.arange(count) % 10,
        )
    lines = printed(
        "moco_cifar10.py",
        f"--pool={tmp_path}/pool.npz",
        f"--evaluation={tmp_path}/evaluation.npz",
        "--epochs=2",
        "--batch=32",
        "--arch=one_block",
        "--dtype=bfloat16",
        "--evaluate-at",
        "2",
    )
    first, second = map(json.loads, lines)
    assert first["epoch"] == 1 and "knn_top1" not in first and first["reference_loss"] == 6.96
    assert (
        second["reference_knn_top1"] == 33.5
        and 0 <= second["knn_top1"] <= 100
        and second["loss"] > 0
    )


@pytest.mark.slow
def test_input_pipeline(last_line):
    """A rate for each part of the way from photos to views, for all together, and for the step that
    consumes them."""
    figures = last_line(
        "input_pipeline.py",
        "--photos=12",
        "--repeats=1",
        "--batch=4",
        "--size=8",
        "--step",
        "--arch=one_block",
    )
    rates = figures["images_per_second"]
    assert [*rates] == [
        "write_cache",
        "decode",
        "read_cache",
        "read_files",
        "target_input",
        "to_device",
        "views",
        "together",
        "step",
        "training",
    ]
    assert (
        min(rates.values()) > 0
        and figures["reading_over_step"] > 0
        and figures["training_over_step"] > 0
    )


@pytest.mark.slow
def test_target_throughput(last_line):
    """A rate for the target, for the ledger and for both, which is no higher than either."""
    rates = last_line(
        "target_throughput.py",
        "--arch=one_block",
        "--size=8",
        "--images=48",
        "--batch=16",
        "--repeats=1",
    )["images_per_second"]
    assert [*rates] == ["inference", "keys", "ledger", "together"] and min(rates.values()) > 0


@pytest.mark.slow
def test_scaling(last_line):
    """A row for each number of devices; the table's hours are images over rates, and nothing is
    invented."""
    figures = last_line(
        "scaling.py",
        "--devices",
        "2",
        "--size=8",
        "--batch=8",
        "--queue=16",
        "--steps=1",
        "--blocks=1",
        "--turns=1",
        "--words=none,moco",
        "--rates",
        "moco=1000",
        "query=500",
    )
    assert [row["devices"] for row in figures["rows"]] == [2]
    table = {row["part"]: row for row in figures["table"]}
    pretrained = table["pretrain moco"]
    # He et al. 2020: 200 epochs of whole batches.
    assert pretrained["steps"] == 200 * (1_281_167 // 256)
    assert pretrained["hours_on_1"] == pretrained["steps"] * 256 / 1000 / 3600
    assert table["query"]["hours_on_1"] == (1_281_167 + 50_000) / 500 / 3600
    assert {row["hours_on_8"] for row in figures["table"]} == {None}
    assert table["distill moco 100 %"]["hours_on_1"] is None and table["all"]["hours_on_1"] is None


def test_scaling_refuses(monkeypatch, tmp_path):
    """Rates of another network, of no known name, or that are no numbers: one line each, before
    anything is timed."""
    other = tmp_path / "step_time.json"
    other.write_text(json.dumps({"arguments": {"arch": "resnet8", "size": 8}, "rows": []}))
    for words in (["--rates-from", str(other)], ["--rates", "mocco=1"], ["--rates", "moco=fast"]):
        monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(BENCHMARKS / "scaling.py"), run_name="__main__")
        # Text, which Python prints to standard error before it ends with status 1.
        assert stop.value.code.startswith("scaling: --rates") and "\n" not in stop.value.code


@pytest.mark.slow
def test_start(last_line):
    """The three ratios, of which the first is one."""
    rows = last_line("start.py", "--runs=1")["rows"]
    assert (
        rows[0]["clock_ratio"] == 1
        and len(rows) == 3
        and all(row["processor_ratio"] > 0 for row in rows)
    )


@pytest.mark.slow
def test_growth(last_line):
    """A row for each size of each of what grows."""
    figures = last_line(
        "growth.py",
        "--arch=one_block",
        "--size=8",
        "--batch=8",
        "--queues",
        "16",
        "--steps=1",
        "--turns=1",
        "--batches",
        "8",
        "--images",
        "200",
        "400",
        "--budget=10",
    )
    assert [row["queue"] for row in figures["queue"]] == [16] and figures["memory"][0][
        "temp_bytes"
    ] > 0
    for part, size in (("ledger", "answers"), ("selection", "images")):
        assert [row[size] for row in figures[part]] == [200, 400]


@pytest.mark.slow
def test_faults(process):
    """After a kill the same command goes on to the same table."""
    status, out, err = process(
        "benchmarks/faults.py",
        "--parts=kills,together",
        "--kills=1",
        "--tries=1",
        # Few images, one student, no encoder.
        "--config=tests/one_block.py",
        "--config.data.limit=200",
        "--config.target.epochs=1",
        "--config.distill.epochs=0.1",
        "--config.distill.batch_size=16",
        "--config.inits=('none',)",
        "--config.also=()",
        "--config.save_minutes=0.02",
    )
    assert status == 0, out + err
    told = {}
    for line in out.splitlines():
        told |= json.loads(line) if line.startswith("{") else {}
    assert (told["kills"]["kills"], told["kills"]["runs"]) == (1, 1)
    assert not told["kills"]["images_asked_twice"]
    assert told["together"]["second_one_refused"] == 1


@pytest.mark.slow
def test_overhead(last_line):
    """A ratio for each pair, of trainings that both went to the end."""
    figures = last_line(
        "overhead.py",
        "--arch=one_block",
        "--size=8",
        "--batch=16",
        "--queue=512",
        "--epoch-steps=4",
        "--epochs=2",
        "--pairs=2",
    )
    assert (
        len(figures["seconds"]) == 2 and figures["ratio"] > 0 and figures["state_bytes"] > 100_000
    )


@pytest.mark.slow
def test_feeding(last_line):
    """A row for each training and way, the host's beside itself."""
    rows = last_line(
        "feeding.py",
        "--config=tests/one_block.py",
        "--steps=4",
        "--turns=1",
        "--at-once",
        "2",
    )["rows"]
    assert [(row["training"], row["from"]) for row in rows] == [
        (name, way) for name in ("moco", "student") for way in ("host", "device", "device 2")
    ]
    assert all(row["ms"] > 0 and row["processor_ms"] > 0 for row in rows) and rows[0]["ratio"] == 1


@pytest.mark.slow
def test_selection(last_line):
    """A time for each way."""
    ways = ["balanced", "kcenter", "typiclust", "probcover", "propagate"]
    figures = last_line(
        "selection.py",
        "--images=300",
        "--dimension=8",
        "--budget=20",
        "--classes=5",
        "--ways",
        *ways,
    )
    assert [*figures["seconds"]] == ways


@pytest.mark.slow
def test_ledger(last_line):
    """A time for each part."""
    figures = last_line("ledger.py", "--rows=5000", "--classes=10", "--budget")
    assert [*figures["parts"]] == ["write", "resume", "read"] and figures["file_bytes"] > 5000 * 20
