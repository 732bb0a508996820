"""Batches and state on the devices; that the result does not depend on their number is in test_invariance."""

import jax
import numpy as np
import pytest

from qmx import sharding


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
