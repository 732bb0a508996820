"""Outputs of a network for every image, in batches, on all devices."""

from collections.abc import Iterable
from functools import lru_cache

import jax
import numpy as np

from qmx.contract import Network, PyTree, View
from qmx.sharding import enlarged, everywhere, put_batch, rows_here


@lru_cache(maxsize=8)
def _forward(network: Network, view: View):  # one compilation for each network and view
    return jax.jit(
        lambda params, stats, batch: network.apply(
            params, stats, view(jax.random.key(0), batch), False
        )[0],
        out_shardings=everywhere(),
    )


def predict(
    network: Network,
    params: PyTree,
    stats: PyTree,
    view: View,
    images: np.ndarray,
    batch_size: int = 256,
) -> np.ndarray:
    """Outputs of a network, one row for each image; uint8[n, H, W, C] -> f32[n, D].

    Each pair of a network and a view is compiled once: keep both, rather than make them for each
    call.
    """
    batches = (images[ids] for ids in ids_here(len(images), batch_size))
    return predict_batches(network, params, stats, view, batches)[: len(images)]


def ids_here(size: int, batch_size: int = 256) -> np.ndarray:
    """This process's rows of each batch of a pass over 0..size-1, i64[batches, rows].

    The last id fills the last batch up, so that there is one shape to compile and no image is left
    out; what is said of the filling stands at the end, to be cut off. A batch is enlarged until it
    divides over the devices.
    """
    batch_size = enlarged(batch_size)
    ids = np.minimum(np.arange(-(-size // batch_size) * batch_size), size - 1)
    return ids.reshape(-1, batch_size)[:, rows_here(batch_size)]


def predict_batches(
    network: Network, params: PyTree, stats: PyTree, view: View, batches: Iterable[np.ndarray]
) -> np.ndarray:
    """`predict` of whole batches, this process's rows of them; all rows in all processes."""
    rows: list[np.ndarray] = []
    ahead: jax.Array | None = None
    for images in batches:
        y = _forward(network, view)(params, stats, put_batch({"image": images}))
        if ahead is not None:  # fetched one late, so that the device works while the host reads
            rows.append(np.asarray(ahead))
        ahead = y
    if ahead is not None:
        rows.append(np.asarray(ahead))
    return np.concatenate(rows)
