"""Principal components of the images themselves, which propagation may see beside an encoder's
features.

Of small, centred images the pixels tell much of what an encoder of a few epochs has not learned,
and the two err on different images.
"""

from collections.abc import Callable, Iterator

import numpy as np

from qmx.selection.by_features import unit

COMPONENTS = 64  # as many as a digit of scikit-learn has pixels; ours
SIDE = 32  # of what larger images are shrunk to; ours
BLOCK = 4096  # images in memory at a time


def components(read: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
    """The first 64 principal components of images, f32[n, 64], or their pixels less the mean if
    they have no more than 64 numbers.

    Args:
      read: ids i64[b] -> uint8[b, H, W, C]. Images above 32 pixels are shrunk by whole factors.
      size: n.
    """

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, size, BLOCK):
            images = read(np.arange(start, min(start + BLOCK, size)))
            yield shrunk(images).reshape(len(images), -1)

    mean = sum(block.sum(0) for block in blocks()) / size
    if len(mean) <= COMPONENTS:
        return np.concatenate([block - mean for block in blocks()]).astype(np.float32)
    squares = sum((block - mean).T @ (block - mean) for block in blocks())
    axes = np.linalg.eigh(squares)[1][:, : -COMPONENTS - 1 : -1]
    return np.concatenate([(block - mean) @ axes for block in blocks()]).astype(np.float32)


def shrunk(images: np.ndarray) -> np.ndarray:
    """uint8[b, H, W, C] -> f64[b, h, w, C], means of squares, so that h and w are at most 32."""
    factor = -(-max(images.shape[1:3]) // SIDE)
    height, width = (max(side // factor, 1) for side in images.shape[1:3])
    tall, wide = (min(factor, side) for side in images.shape[1:3])
    cut = images[:, : height * tall, : width * wide].astype(np.float64)
    return cut.reshape(len(images), height, tall, width, wide, -1).mean((2, 4))


def beside(features: np.ndarray, pixels: np.ndarray, weight: float) -> np.ndarray:
    """Features f32[n, D] and components f32[n, E] as f32[n, D + E], unit rows, of which the second
    have `weight` times the first's length."""
    return unit(np.concatenate([unit(features), weight * unit(pixels)], axis=1)).astype(np.float32)
