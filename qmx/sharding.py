"""The mesh, and batches and state onto it. The only file that knows devices.

One axis, "data": batches are split along it, everything else is on every device. XLA places the
collectives; methods and networks never see a device, and the result does not depend on how many
there are.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qmx.contract import PyTree


@cache
def mesh() -> Mesh:
    """One axis "data" over all devices of all processes."""
    # Auto, because the default, Explicit, refuses reshapes that split the sharded batch.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def put_batch(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch -> the global batch, split over the devices."""
    split = NamedSharding(mesh(), PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(split, rows) for name, rows in batch.items()}


def put_state(tree: PyTree) -> PyTree:
    """A tree onto every device, in buffers of its own: the step donates them."""
    everywhere = NamedSharding(mesh(), PartitionSpec())
    # A copy first: with several devices, device_put keeps the caller's buffer even if told not to.
    return jax.tree.map(lambda x: jax.device_put(jnp.array(x, copy=True), everywhere), tree)


def check_batch(batch_size: int, name: str) -> None:
    """Raise ValueError unless a global batch of `batch_size` divides over the devices."""
    devices = jax.device_count()
    if batch_size % devices:
        raise ValueError(f"{name} {batch_size} does not divide over {devices} devices; "
                         f"use {max(batch_size // devices, 1) * devices}")
