"""Usual mistakes of who writes a training loop: each is a line that says what was expected."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qmx
from qmx import models
from qmx.augment import plain_view, weak_view
from qmx.losses import kl_target_student, soft_cross_entropy
from qmx.methods import fixmatch, moco
from qmx.metrics import compare, knn, top_k
from qmx.selection.propagate import propagate
from qmx.sharding import put_batch
from qmx.targets.query import network_query
from qmx.train import TrainState, fit

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
KEY = jax.random.key(0)


@pytest.mark.parametrize("view", [plain_view(), weak_view(8)], ids=["plain", "weak"])
@pytest.mark.parametrize(
    "images",
    [IMAGES / np.float32(255), IMAGES[..., 0], IMAGES[..., :1], IMAGES.transpose(0, 3, 1, 2)],
    ids=["floats", "no channels", "grey", "channels first"],
)
def test_images(view, images):
    """Floats in 0..1 would be seen as nearly black."""
    with pytest.raises(ValueError, match=r"a view takes uint8\[B, H, W, C\].* C = 3"):
        view(KEY, {"image": jnp.asarray(images)})


@pytest.mark.parametrize("loss", [kl_target_student, soft_cross_entropy])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (3, 4)])
def test_labels_in_the_place_of_scores(loss, shape):
    """They would be broadcast, and learned as something else."""
    with pytest.raises(ValueError, match=r"both must be \[B, N\], and of labels .*numpy.eye"):
        loss(jnp.zeros(shape), jnp.zeros((4, 4)))


def test_a_smaller_last_batch():
    """MoCo's keys would not lie behind those of the others."""
    net, head = models.backbone("resnet8_narrow"), models.moco_head(16)
    method = moco.make(net, head, weak_view(8), queue_size=16)
    params, state = jax.eval_shape(lambda: method.init(KEY, {"image": jnp.asarray(IMAGES)}))
    small = {"image": jnp.asarray(IMAGES[:3])}
    with pytest.raises(ValueError, match="queue_size 16 is not a multiple of batch_size 3"):
        jax.eval_shape(method.loss, params, state, small, KEY)


def test_fixmatch_without_a_pool():
    net, head = models.backbone("resnet8_narrow"), models.classifier(4)
    method = fixmatch.make(net, head, weak_view(8), weak_view(8))
    batch = {"image": jnp.asarray(IMAGES), "scores": jnp.zeros((4, 4))}
    params, state = jax.eval_shape(lambda: method.init(KEY, batch))
    with pytest.raises(ValueError, match="the batch has image, scores; it needs pool_image too"):
        jax.eval_shape(method.loss, params, state, batch, KEY)


def test_batches_that_end():
    """A generator of one epoch is no training of ten."""

    def step(ts, batch, rng):
        return ts._replace(step=ts.step + 1), {"loss": jnp.zeros(()), "grad_norm": jnp.zeros(())}

    begun = TrainState(jnp.int32(0), {}, {}, {})
    with pytest.raises(ValueError, match="the batches ended after step 3 of 10"):
        fit(step, begun, lambda start: iter([{}] * 3), KEY, steps=10)


def test_rows_that_do_not_divide():
    size = jax.device_count() + 1
    if size == 2:
        pytest.skip("every batch divides over one device")
    with pytest.raises(ValueError, match=rf"image: a batch of {size} does not divide over"):
        put_batch({"image": np.zeros((size, 2))})


def test_an_unknown_precision():
    with pytest.raises(ValueError, match="precision 'fp32' is unknown; choose among float64"):
        network_query(models.classifier(3), {}, {}, plain_view(), precision="fp32")


def test_a_module_that_keeps_something_else():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            self.variable("counters", "calls", lambda: jnp.zeros(()))
            return x

    with pytest.raises(ValueError, match="the module keeps 'counters'"):
        qmx.from_linen(Counting()).init(KEY, jnp.zeros((1, 2)))


def test_labels_that_are_none():
    """NumPy would take -1 for the last class, and one label for all."""
    scores = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    for labels in ([-1, 0, 0, 0, 0], [3, 0, 0, 0, 0], [0]):
        with pytest.raises(ValueError, match="labels"):
            top_k(scores, np.array(labels), 1)
    with pytest.raises(ValueError, match="classes are counted from 0"):
        knn(scores, np.array([-1, 0, 0, 0, 0]), scores)
    with pytest.raises(ValueError, match="of the same images and classes"):
        compare(scores, scores[:1], None)
    with pytest.raises(ValueError, match="give a row of probabilities for each"):
        propagate(scores, np.arange(2), scores[:2] - 9)
