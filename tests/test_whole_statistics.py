"""Statistics of whole images: PyTorch's of the same batches, and a student's after its training."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

import qmx
from qmx import models, networks
from qmx.augment import plain_view
from qmx.contract import Encoder, Network, chain
from qmx.data import load
from qmx.data.batches import batch_ids
from qmx.data.sources import in_memory
from qmx.whole_statistics import BATCH, BATCHES, measured


@pytest.mark.parametrize("size", [700, 90])  # a pool smaller than a batch is repeated
def test_the_last_batches_count(size):
    """As torch's batch norm moves its statistics in training; parameters and the given ones stay,
    and nothing is left of what they were."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, 2, 3, 1), np.uint8)
    flat = Network(lambda rng, x: ({}, {}), lambda p, s, x, *_: (x.reshape(len(x), -1), s))
    net = chain(flat=flat, head=models.classifier(4, standardize=True))
    view = plain_view((0.4,), (0.3,))
    params, stats = net.init(jax.random.key(0), jnp.zeros((2, 2, 3, 1)))
    far = jax.tree.map(lambda x: x + 7, stats)
    made = measured(net, Encoder(params, far), view, in_memory(image=images))

    norm = torch.nn.BatchNorm1d(6, affine=False)
    norm.running_mean += 7
    norm.running_var += 7
    for k in range(BATCHES):
        x = images[batch_ids(size, BATCH, 0, k, False)].reshape(BATCH, -1) / 255
        norm(torch.tensor((x - 0.4) / 0.3, dtype=torch.float32))
    (mean,), (var,) = (
        [
            x
            for path, x in jax.tree.leaves_with_path(made.stats)
            if name in jax.tree_util.keystr(path)
        ]
        for name in ("mean", "var")
    )
    np.testing.assert_allclose(mean, norm.running_mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(var, norm.running_var, rtol=1e-4)
    rows = (images.reshape(size, -1) / 255 - 0.4) / 0.3
    np.testing.assert_allclose(mean, rows.mean(0), atol=0.15)
    assert jax.tree.all(jax.tree.map(np.array_equal, made.params, params))


def test_without_batch_norms():
    """Nothing is read."""
    net = models.classifier(4)
    given = Encoder(*net.init(jax.random.key(0), jnp.zeros((2, 6))))
    assert measured(net, given, None, None) is given


@pytest.mark.slow
def test_a_students(finished, command, tmp_path):
    """Its training is the same; what is kept and compared has the statistics of the pool's images,
    which the target is not asked about."""
    shutil.copytree(finished, tmp_path / "w")
    words = [*TINY, f"--workdir={tmp_path}/w", "--config.inits=('none',)", "--config.also=()"]
    words += ["--config.distill.whole_statistics=True", "--update"]
    status, _, err = command(*words)
    assert status == 0, err
    name = "none-random-logits-asked-71-seed0"
    file = f"distill/{name}/student.safetensors"
    before, after = (qmx.load_encoder(folder / file) for folder in (finished, tmp_path / "w"))
    same = jax.tree.map(np.array_equal, before.variables.params, after.variables.params)
    assert jax.tree.all(same)

    data = load("digits")
    seen = networks.look(data)
    net, view = networks.classifier("one_block", "float32", seen), networks.evaluation_view(seen)
    want = measured(net, before.variables, view, data.pool)
    for x, y in zip(*map(jax.tree.leaves, (want.stats, after.variables.stats)), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)
    left = jax.tree.map(np.allclose, before.variables.stats, after.variables.stats)
    assert not any(jax.tree.leaves(left))

    named = np.load(tmp_path / f"w/evaluate/{name}/named.npz")["student"]
    scores = qmx.encode(after, data.evaluation.shown(np.arange(data.evaluation.size)))
    np.testing.assert_array_equal(named, scores.argmax(1))
    ledgers = [(folder / "ledger.sqlite").read_bytes() for folder in (finished, tmp_path / "w")]
    assert ledgers[0] == ledgers[1]
