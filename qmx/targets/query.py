"""Query functions: `images uint8[b, H, W, C] -> scores f32[b, N]`."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from qmx.contract import Network, PyTree, View
from qmx.inference import predict

Query = Callable[[np.ndarray], np.ndarray]


class Outside(NamedTuple):
    """A target that somebody else runs."""

    query: Query
    name: str  # for people
    sha256: str  # the target's digest in the ledger
    preprocessing: str = "as-is"  # name for what its owner does to the images


# Our name -> the network's dtype, and jax's name for the precision of a GPU's products.
PRECISIONS = {
    "float64": ("float64", "highest"),
    "float32": ("float32", "highest"),
    "tf32": ("float32", "tensorfloat32"),
    "bfloat16": ("bfloat16", "bfloat16"),
}


def limiter(rate: float) -> Callable[[], None]:
    """A function that returns at most `rate` times in a second, by waiting; 0 is no limit."""
    free = time.monotonic()

    def wait() -> None:
        nonlocal free
        if rate:
            time.sleep(max(free - time.monotonic(), 0))
            free = time.monotonic() + 1 / rate

    return wait


def filled_up(count: int, size: int) -> np.ndarray:
    """Rows of `count` images in requests of exactly `size`, i64[r, size]; the last request is
    filled up with the last image."""
    return np.minimum(np.arange(-(-count // size) * size), count - 1).reshape(-1, size)


def network_query(
    network: Network,
    params: PyTree,
    stats: PyTree,
    view: View,
    batch_size: int = 256,
    precision: str = "float32",
) -> Query:
    """A query function around a network of our own; it answers with logits.

    Args:
      network: f32[B, S, S, C] -> f32[B, N].
      view: makes the network's input from {"image": uint8[B, H, W, C]}; its key is fixed.
      batch_size: the network is compiled for it; smaller batches are padded.
      precision: of products and convolutions, one of `PRECISIONS`.

    Raises:
      ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision {precision!r} is unknown; choose among {', '.join(PRECISIONS)}"
        )

    def query(images: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision(PRECISIONS[precision][1]):
            return predict(network, params, stats, view, images, batch_size)

    return query
