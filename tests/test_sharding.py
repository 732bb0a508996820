"""The result does not depend on the number of devices."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

from qmx import sharding

STEPS = """
import json, sys
import jax, numpy as np
from qmx import augment, init_state, make_step, models, moco, optim, simsiam
from qmx.models.resnet import Arch, ResNet
from qmx.sharding import put_batch, put_state

arch = Arch((1, 1), bottleneck=False, width=8, stem="small")
view = augment.make_view(8, jitter=(0.4, 0.4, 0, 0), grey_p=0, mean=(0.5,), std=(0.25,))
net = lambda groups: models.from_linen(ResNet(arch, groups))
methods = {
    "moco": moco.make(net(4), models.moco_head(16), view, queue_size=64),
    "simsiam": simsiam.make(net(1), models.simsiam_projector(16, 2), models.simsiam_predictor(8), view),
}
images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
out = {"devices": jax.device_count()}
for name, method in methods.items():
    tx = optim.sgd(lambda step: 0.01, weight_decay=1e-4)
    ts = put_state(jax.jit(lambda rng: init_state(method, tx, rng, {"image": images[:32]}))(jax.random.key(0)))
    step, losses = make_step(method, tx), []
    for k in range(6):
        ts, metrics = step(ts, put_batch({"image": images[k % 2 * 32 :][:32]}), jax.random.key(1))
        losses.append(float(metrics["loss"]))
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf).ravel()[:20].tolist()
              for path, leaf in jax.tree_util.tree_leaves_with_path((ts.params, ts.state))}
    out[name] = {"losses": losses, "leaves": leaves, "compiled": step._cache_size()}
print(json.dumps(out))
"""


def run(devices):
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run([sys.executable, "-c", STEPS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_devices_do_not_matter():
    """R7, S8, M14: one device and four give the same losses, weights, statistics and queue; one compilation each."""
    one, four = run(1), run(4)
    assert (one["devices"], four["devices"]) == (1, 4)
    for name in ("moco", "simsiam"):
        np.testing.assert_allclose(four[name]["losses"], one[name]["losses"], rtol=1e-5, atol=1e-6)
        for path, leaf in one[name]["leaves"].items():
            np.testing.assert_allclose(four[name]["leaves"][path], leaf, rtol=1e-3, atol=1e-5, err_msg=name + path)
        assert one[name]["compiled"] == four[name]["compiled"] == 1


def test_placement():
    """Batches are split along their first axis, state is everywhere in buffers of its own."""
    assert jax.device_count() > 1, "the tests run on several devices"
    batch = sharding.put_batch({"image": np.arange(8 * jax.device_count())})
    shards = batch["image"].addressable_shards
    assert [shard.data.shape for shard in shards] == [(8,)] * jax.device_count()
    np.testing.assert_array_equal(np.concatenate([shard.data for shard in shards]), np.arange(8 * jax.device_count()))
    host = jax.numpy.ones(4)
    state = sharding.put_state(host)
    assert state.sharding.is_fully_replicated
    jax.jit(lambda x: x + 1, donate_argnums=0)(state)
    np.testing.assert_array_equal(host, 1)  # still there


def test_batch_must_divide():
    """Refused with the nearest that works."""
    sharding.check_batch(4 * jax.device_count(), "batch_size")
    with pytest.raises(ValueError, match=f"batch_size {2 * jax.device_count() + 1} does not divide"):
        sharding.check_batch(2 * jax.device_count() + 1, "batch_size")
