"""Batches and state on the devices; that the result does not depend on their number is in
test_invariance."""

import jax
import numpy as np
import pytest

from qmx import sharding
from qmx.models.conv import convolve


def test_placement():
    """Batches are split along their first axis, state is everywhere in buffers of its own."""
    assert jax.device_count() > 1, "the tests run on several devices"
    batch = sharding.put_batch({"image": np.arange(8 * jax.device_count())})
    shards = batch["image"].addressable_shards
    assert [shard.data.shape for shard in shards] == [(8,)] * jax.device_count()
    np.testing.assert_array_equal(
        np.concatenate([shard.data for shard in shards]), np.arange(8 * jax.device_count())
    )
    host = jax.numpy.ones(4)
    state = sharding.put_state(host)
    assert state.sharding.is_fully_replicated
    jax.jit(lambda x: x + 1, donate_argnums=0)(state)
    np.testing.assert_array_equal(host, 1)  # still there


def test_batch_must_divide():
    """Refused with the nearest that works."""
    sharding.check_batch(4 * jax.device_count(), "batch_size")
    with pytest.raises(
        ValueError, match=f"batch_size {2 * jax.device_count() + 1} does not divide"
    ):
        sharding.check_batch(2 * jax.device_count() + 1, "batch_size")


@pytest.mark.parametrize("kernel, stride, groups", [(1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 2, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_convolutions_stay_where_they_are(dtype, kernel, stride, groups):
    """Each device convolves its own images: all that goes between them is the sum of the kernel's
    gradient."""
    with jax.enable_x64(dtype == "float64"):
        x = sharding.put_batch({"x": np.ones((64, 6, 6, 8), dtype)})["x"]
        weight = sharding.put_state(jax.numpy.ones((kernel, kernel, 8 // groups, 8), dtype))

        def gradients(x, weight):
            y, backward = jax.vjp(lambda x, weight: convolve(x, weight, stride, groups), x, weight)
            return backward(y)

        compiled = (
            jax.jit(gradients, out_shardings=(x.sharding, weight.sharding))
            .lower(x, weight)
            .compile()
            .as_text()
        )
    assert "all-reduce(" in compiled
    assert not [
        word for word in ("all-gather(", "all-to-all(", "collective-permute(") if word in compiled
    ]
