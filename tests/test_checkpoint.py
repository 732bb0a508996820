"""Saved states come back to the bit, or not at all; and stages are done once."""

import errno
import logging
import os
import random
import re
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import qmx
from qmx import optim
from qmx.checkpoint import Checkpoints, load_weights, save_weights
from qmx.contract import by_path
from qmx.files import write_text
from qmx.sharding import put_state
from qmx.train import TrainState
from qmx.workdir import Mismatch, NotDone, claim, differences, stage


def state(step):
    """A train state with every kind of leaf: optax's tuples, empty states, bfloat16, integers, a
    queue."""
    # No compressor shrinks it, so its bytes can be hit.
    noise = jax.random.normal(jax.random.key(step), (200, 100))
    params = {
        "backbone": {"kernel": noise, "half": jnp.ones(5, jnp.bfloat16)},
        "head": {"bias": jnp.arange(2.0) * step},
    }
    rate = optim.schedule("cosine", 0.1, epochs=1, steps=10)
    tx = optim.sgd({"backbone": rate, "head": rate})
    own = {"queue": jnp.arange(6.0).reshape(3, 2) + step, "pointer": jnp.int32(step), "nothing": {}}
    return put_state(TrainState(jnp.int32(step), params, own, tx.init(params)))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(by_path(a).items(), by_path(b).values(), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=path)


def saved(directory, *steps):
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(state(step))


def test_no_room(tmp_path, monkeypatch):
    """Once there is room again, saving goes on, as the line says."""
    with Checkpoints(tmp_path / "c") as checkpoints:
        with monkeypatch.context() as full:
            full.setattr("qmx.checkpoint.disk_usage", lambda path: SimpleNamespace(free=9))
            with pytest.raises(OSError, match="c: no room for a state .*, 9 are free; make room, "):
                checkpoints.save(state(1))
        checkpoints.save(state(1))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert_same(checkpoints.restore(state(0)), state(1))


def test_round_trip(tmp_path):
    """Queue, pointer, optimiser and step come back, in their dtypes and shardings, by a new
    object."""
    assert (
        Checkpoints(tmp_path / "none").restore(state(0)) is None
        and not (tmp_path / "none").exists()
    )
    saved(tmp_path / "c", 3, 5)
    assert_same(Checkpoints(tmp_path / "c").restore(state(0)), state(5))
    saved(tmp_path / "c", 7, 9)
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir()) == [
        7,
        9,
    ], "only the last two are kept"


def flip_bytes(directory):
    """Overwrite some bytes in the middle of the largest data file."""
    path = max(
        (p for p in directory.rglob("*") if p.is_file() and "/d/" in str(p)),
        key=lambda p: p.stat().st_size,
    )
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(b ^ 0xFF for b in data[middle : middle + 16])
    path.write_bytes(data)


def truncate(directory):
    for path in directory.rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_item(directory):
    for path in sorted((directory / "meta").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (directory / "meta").rmdir()


@pytest.mark.parametrize("damage", [flip_bytes, truncate, remove_item])
def test_damaged_checkpoint(tmp_path, caplog, damage):
    """The newest one is damaged: it is named, and the one before it is taken."""
    saved(tmp_path / "c", 3, 5)
    damage(tmp_path / "c/5")
    with caplog.at_level(logging.WARNING):
        assert_same(Checkpoints(tmp_path / "c").restore(state(0)), state(3))
    assert re.search(r"c/5 is damaged and passed over", caplog.text)
    assert not (tmp_path / "c/5").exists(), "no newer one is in the way of what is saved next"
    saved(tmp_path / "c", 4)
    assert_same(Checkpoints(tmp_path / "c").restore(state(0)), state(4))
    damage(tmp_path / "c/3")
    damage(tmp_path / "c/4")
    assert Checkpoints(tmp_path / "c").restore(state(0)) is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),  # a limit of open files gives this one
        ValueError(f"Error opening file: {os.strerror(errno.ESTALE)}"),  # as tensorstore says it
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ],
)
def test_what_passes_removes_nothing(tmp_path, monkeypatch, error):
    """It is raised, and the state is there afterwards."""

    def restore(*_, **__):
        raise error

    saved(tmp_path / "c", 3, 5)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "restore", restore)
        with pytest.raises(type(error)) as raised:
            Checkpoints(tmp_path / "c").restore(state(0))
    assert raised.value is error
    assert_same(Checkpoints(tmp_path / "c").restore(state(0)), state(5))


def test_saving_goes_on_meanwhile(tmp_path):
    """What is saved is the state at the call, though its buffers are donated and written over at
    once."""
    spoil = jax.jit(lambda ts: jax.tree.map(lambda x: x * 0, ts), donate_argnums=0)
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (3, 5):
            ts = state(step)
            checkpoints.save(ts)
            spoil(ts)
        assert checkpoints.newest() == tmp_path / "c/5"
        with pytest.raises(OSError, match="step 4 was not saved, for the newest there is .*c/5"):
            checkpoints.save(state(4))
    for step in (5, 3):
        assert_same(Checkpoints(tmp_path / "c").restore(state(0)), state(step))
        truncate(tmp_path / f"c/{step}")


SAVING = """
import sys
from pathlib import Path
from test_checkpoint import state
from qmx.checkpoint import Checkpoints
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    for step in range(1, 100000):
        checkpoints.save(state(step))
        print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_while_saving(start, tmp_path):
    """SIGKILL in the middle of saves: the newest good one is whole, and no older than the one
    before the last begun."""
    draw = random.Random(0)
    (tmp_path / "saving.py").write_text(SAVING)
    for kill in range(4):
        process = start(tmp_path / "saving.py", tmp_path / f"c{kill}")
        for _ in range(3):
            process.stdout.readline()
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        begun = int((process.communicate()[0].split() or ["3"])[-1])
        found = Checkpoints(tmp_path / f"c{kill}").restore(state(0))
        assert int(found.step) >= begun - 1
        assert_same(found, state(int(found.step)))


def test_another_networks_checkpoint(tmp_path):
    """A state of other shapes, types or leaves is not forced into this one, and stays: whoever
    changed his network finds it again."""
    saved(tmp_path / "c", 2, 3)
    bias = state(0).params["head"]["bias"]
    for head in ({"bias": jnp.zeros(7)}, {"bias": bias.astype(jnp.bfloat16)}, {"offset": bias}):
        other = put_state(state(0)._replace(params={**state(0).params, "head": head}))
        with Checkpoints(str(tmp_path / "c")) as checkpoints:
            with pytest.raises(ValueError, match="c/3 is of another state, .*params/head/bias is"):
                checkpoints.restore(other)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert_same(checkpoints.restore(state(0)), state(3))


def test_logs_of_others(tmp_path, caplog):
    """What orbax and tensorstore say is kept back, and nothing else."""
    saved(tmp_path / "c", 1)
    caplog.set_level("INFO", "absl")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).error("mine")
    logging.getLogger("asyncio").error("Task exception: tensorstore failed")
    assert [record.message for record in caplog.records] == ["mine", "mine"]


def test_weights(tmp_path):
    """Safetensors of nested dicts, strided arrays too, in the structure asked for; the digest is of
    the content."""
    tree = {
        "conv": {"kernel": np.arange(24.0, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)},
        "empty": {},
        "bias": jnp.ones(3, jnp.bfloat16),
    }
    digest = save_weights(tmp_path / "w.safetensors", tree)
    back = load_weights(tmp_path / "w.safetensors", tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(back["conv"]["kernel"], tree["conv"]["kernel"])
    assert save_weights(tmp_path / "again.safetensors", back) == digest
    changed = {**tree, "bias": jnp.ones(3, jnp.bfloat16).at[1].set(2)}
    assert save_weights(tmp_path / "other.safetensors", changed) != digest


def test_weights_are_strict(tmp_path):
    """A tensor missing, one left over, one of another shape: refused, all three named."""
    tree = {
        "a": np.zeros(3, np.float32),
        "b": np.zeros((2, 2), np.float32),
        "c": np.zeros(1, np.float32),
    }
    save_file(
        {"a": tree["a"], "b": np.zeros((2, 3), np.float32), "d": tree["c"]},
        tmp_path / "w.safetensors",
    )
    message = r"b is \(2, 3\) and should be \(2, 2\); c is missing.*; d is \(1,\) and .*absent"
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w.safetensors", tree)
    assert set(load_file(tmp_path / "w.safetensors")) == {"a", "b", "d"}


def test_stage_is_done_once(tmp_path):
    """The same inputs: the old result. Others: done again, and told why. Killed before its end:
    never done."""
    said, runs = [], []

    def work():
        runs.append(1)
        (tmp_path / "s").mkdir(exist_ok=True)
        return {"answer": len(runs)}

    inputs = {"config": {"epochs": 3, "view": (0.5, 1.0)}, "digest": "abc"}
    assert stage(tmp_path / "s", inputs, work, said.append) == {"answer": 1}
    assert stage(tmp_path / "s", inputs, work, said.append) == {"answer": 1} and not said
    inputs["config"]["epochs"] = 4
    assert stage(tmp_path / "s", inputs, work, said.append) == {"answer": 2}
    assert said == ["s is done again, because config.epochs: 3 there, 4 now"]

    def killed():
        raise KeyboardInterrupt

    inputs["digest"] = "abd"
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "s", inputs, killed, said.append)
    assert not (tmp_path / "s/result.json").exists()
    assert stage(tmp_path / "s", inputs, work, said.append) == {"answer": 3}


def test_half_a_stage(tmp_path):
    """What a killed stage left is there for the same inputs to go on from, and gone for any
    others."""
    found = []

    def work():
        found.append((tmp_path / "s/checkpoint").exists())
        (tmp_path / "s/checkpoint").write_text("half")
        raise KeyboardInterrupt

    for inputs, kept in (
        ({"lr": 1}, False),
        ({"lr": 1}, True),
        ({"lr": 2}, False),
        ({"lr": 2}, True),
    ):
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "s", inputs, work, print)
        assert found[-1] is kept
    with pytest.raises(NotDone, match="not now"):
        stage(tmp_path / "s", {"lr": 3}, work, print, refuse="not now")
    assert (tmp_path / "s/checkpoint").exists(), "a refusal throws nothing away"


def test_claim(tmp_path):
    """A workdir belongs to one config, unless told otherwise; refusing one changes nothing."""
    claim(tmp_path / "w", {"a": {"b": 1}, "c": (1, 2)}, update=False)
    claim(tmp_path / "w", {"a": {"b": 1}, "c": (1, 2)}, update=False)
    before = (tmp_path / "w/config.json").read_text()
    with pytest.raises(Mismatch, match=r"a.b: 1 there, 2 now \(and 1 more\)"):
        claim(tmp_path / "w", {"a": {"b": 2}, "c": (1,)}, update=False)
    assert (tmp_path / "w/config.json").read_text() == before
    claim(tmp_path / "w", {"a": {"b": 2}, "c": (1,)}, update=True)
    claim(tmp_path / "w", {"a": {"b": 2}, "c": (1,)}, update=False)
    assert differences({"x": 1}, {"y": 1}) == ["x: 1 there, null now", "y: null there, 1 now"]


def test_claim_of_another_version(tmp_path, monkeypatch):
    """A workdir of qmx 0.1, which wrote its version into the stages alone, is refused in one line,
    as is one of a later version; --update takes it over, and no stage is taken for done."""

    def work():
        return {"made": qmx.__version__}

    monkeypatch.setattr(qmx, "__version__", "0.1.0")
    for name in ("target", "pretrain/moco-seed0"):
        stage(tmp_path / "w" / name, {"lr": 1}, work, print)
    (tmp_path / "w/config.json").write_text('{\n "a": 1\n}\n')
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.undo()

    cure = r"take another --workdir, or give --update to keep the ledger's answers"
    line = rf"w was made by qmx 0\.1\.0, and this is qmx {re.escape(qmx.__version__)}; {cure}"
    with pytest.raises(Mismatch, match=line) as refusal:
        claim(tmp_path / "w", {"a": 1}, update=False)
    assert "\n" not in str(refusal.value)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    claim(tmp_path / "w", {"a": 1}, update=True)
    assert stage(tmp_path / "w/target", {"lr": 1}, work, print) == {"made": qmx.__version__}
    # The other stage may stay as it is, if the config has no use for it any more.
    claim(tmp_path / "w", {"a": 1}, update=False)

    monkeypatch.setattr(qmx, "__version__", "9.0")
    with pytest.raises(Mismatch, match="and this is qmx 9.0"):
        claim(tmp_path / "w", {"a": 1}, update=False)
    # Claimed by 0.1 and stopped before the first stage: nothing is there that could be lost.
    (tmp_path / "v").mkdir()
    (tmp_path / "v/config.json").write_text('{"a": 1}')
    claim(tmp_path / "v", {"a": 1}, update=False)


def test_files_are_whole(tmp_path):
    """A reader sees the old text or the new one, and no other file is left."""
    write_text(tmp_path / "f", "old")
    write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == [
        "f"
    ]
