"""Event files for TensorBoard hold what metrics.jsonl holds, each step once, after a kill too."""

import json
import struct
import sys

import pytest
from conftest import ROOT
from ml_collections import FrozenConfigDict
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from test_workdir import FUNCTION, SMALL

from qmx import board, pipeline
from qmx.data import load
from qmx.main import parse
from qmx.ranges import value_problems
from qmx.settings import base
from qmx.train import Stopped


def events(path):
    """Every record of a file of events, its two sums checked."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        sums = struct.unpack("<I", data[8:12]), struct.unpack("<I", data[12 + length : 16 + length])
        assert sums == ((masked_crc32c(data[:8]),), (masked_crc32c(body),))
        found.append(Event.FromString(body))
        data = data[16 + length :]
    assert found[0].file_version == board.FIRST
    return found[1:]


def scalars(path):
    """[(step, {name: value})] of a file of events."""
    return [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for event in events(path)
    ]


def logged(path):
    """The same of metrics.jsonl, in single precision."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    single = struct.Struct("<f")
    return [
        (line.pop("step"), {k: single.unpack(single.pack(x))[0] for k, x in line.items()})
        for line in lines
    ]


def test_from_a_log(tmp_path):
    """The steps that are in the log already, and more."""
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 0.1}\n')
    (tmp_path / board.NAME).write_bytes(b"half a record")  # of a run that was killed
    with board.drawn(log) as add:
        add(3, {"loss": 1.0, "grad_norm": 4.0})
    assert scalars(tmp_path / board.NAME) == [*logged(log), (3, {"loss": 1.0, "grad_norm": 4.0})]
    assert all(event.wall_time > 1.7e9 for event in events(tmp_path / board.NAME))


def test_without_the_package(monkeypatch, command, tmp_path):
    """One line that names the extra, before anything; and none where it is switched off."""
    monkeypatch.setitem(sys.modules, board.PACKAGE, None)
    config = base()
    assert not list(value_problems(FrozenConfigDict(config)))
    config.tensorboard = True
    (line,) = value_problems(FrozenConfigDict(config))
    assert line.startswith("tensorboard needs") and "pip install 'qmx[tensorboard]'" in line
    words = "--config=configs/digits.py", f"--workdir={tmp_path}/w", "--config.tensorboard=True"
    status, out, err = command(*words)
    assert (status, out) == (2, "") and err == f"qmx: {line}\n" and not (tmp_path / "w").exists()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(board, stopped) -> a run of one student of a function, of eight steps."""
    (tmp_path / "own.py").write_text(FUNCTION)
    monkeypatch.chdir(ROOT)
    words = [*SMALL, "--config.distill.min_steps=8", f"--workdir={tmp_path}/w"]
    words += [f"--config.target.path={tmp_path}/own.py:f"]

    def start(drawn, stopped=lambda: False):
        config = parse(["qmx", *words, f"--config.tensorboard={drawn}"]).config
        (tmp_path / "w").mkdir(exist_ok=True)
        return pipeline.run(config, tmp_path / "w", load(**config.data), "all", stopped)

    return start


@pytest.mark.slow
def test_a_run(run, tmp_path):
    """Beside metrics.jsonl, the same steps and numbers, though it was stopped in between and began
    without; a file that is gone, or the key, makes nothing stale."""
    folder = tmp_path / "w/distill/none-random-logits-asked-40-seed0"
    log, drawn = folder / "metrics.jsonl", folder / board.NAME

    def steps():
        return len(log.read_text().splitlines()) if log.exists() else 0

    with pytest.raises(Stopped):
        run(False, lambda: steps() >= 2)
    assert 2 <= steps() < 5 and not drawn.exists()
    with pytest.raises(Stopped):
        run(True, lambda: steps() >= 5)
    assert scalars(drawn) == logged(log) and 5 <= steps() < 8
    run(True)
    assert scalars(drawn) == logged(log) and steps() == 8
    assert {"loss", "grad_norm", "agreement_top1"} <= scalars(drawn)[0][1].keys()

    drawn.unlink()
    before = (folder / "result.json").stat().st_mtime_ns
    for switch in (True, False):
        run(switch)
    assert (folder / "result.json").stat().st_mtime_ns == before and not drawn.exists()
