"""Features of small images without training: how their patches resemble words of the pool.

They cost seconds. Of small, centred images they tell more than the pixels do, and more than an
encoder of a few epochs. The two err on different images, so that propagation sees both.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qmx.selection.by_features import unit

WORDS, CELLS, COMPONENTS = 200, 3, 128  # ours; Coates et al. have up to 4,000 words and 2 cells
PATCH = 6  # side in pixels, the best of Coates et al.
SAMPLE, BATCH, PASSES = 50_000, 2048, 5  # of patches, from which the words are learned; ours
SEEN = SAMPLE // 12  # images at most that words and components are learned from; ours
NOISE = 10.0  # added to the variance of a patch's pixels, in 0..255; theirs
WHITENING = 0.1  # added to the variances of the patches' components; theirs
LEAST, MOST = 16, 32  # side in pixels, to which smaller and larger images are brought; ours
TINY = 1e-30  # for a pool whose images are all alike
BLOCK = 256  # images whose patches are in memory at a time


class Words(NamedTuple):
    """Patches that others are compared with, and how these are whitened; P = 36 C."""

    mean: np.ndarray  # f32[P]
    whitening: np.ndarray  # f32[P, P]
    rows: np.ndarray  # f32[K, P], of length 1


def patch_features(
    read: Callable[[np.ndarray], np.ndarray], size: int, mirrored: bool = False
) -> np.ndarray:
    """Features of all images, f32[n, D], D = 128 or the number of images if that is less.

    A patch of 6 x 6 pixels is normalised, whitened, and compared with 200 words, cluster centres of
    the pool's patches: max(0, m - d) for each, where d is the distance and m the mean over the
    words. These are averaged over nine cells of the image. The features are their principal
    components, each over the fourth root of its variance. Words and components are learned from up
    to 4,166 images of the pool.

    Source: Coates, Lee & Ng 2011, *An Analysis of Single-Layer Networks in Unsupervised Feature
    Learning*, sections 3.1 and 3.2 (the triangle activation). The components are ours.

    Args:
      read: ids i64[b] -> uint8[b, H, W, C]. Images above 32 pixels are shrunk by whole factors,
        those below 16 are enlarged.
      size: n.
      mirrored: an image shows the same as its mirror image, and has the mean of both: of every
        second patch in each direction, which takes half the time of all patches of one.
    """
    words = learn(read, size)
    step = 2 if mirrored else 1

    def likeness(ids: np.ndarray) -> np.ndarray:
        images = read(ids)
        both = [images, images[:, :, ::-1]] if mirrored else [images]
        return np.mean([np.asarray(compared(one, words, step), np.float64) for one in both], 0)

    def blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(ids), BLOCK):
            # One shape, so that one program serves all: the last block repeats its last image.
            some = ids[np.minimum(np.arange(start, start + BLOCK), len(ids) - 1)]
            yield likeness(some)[: len(ids) - start]

    sample = np.concatenate([*blocks(seen(size, np.random.default_rng(0)))])
    mean = sample.mean(0)
    variances, axes = np.linalg.eigh((sample - mean).T @ (sample - mean) / len(sample))
    kept = slice(None, -min(COMPONENTS, size) - 1, -1)
    axes = axes[:, kept] / np.maximum(variances[kept], max(1e-9 * variances[-1], TINY)) ** 0.25
    rows = [(block - mean) @ axes for block in blocks(np.arange(size))]
    return np.concatenate(rows).astype(np.float32)


def seen(size: int, rng: np.random.Generator) -> np.ndarray:
    """Images of the pool from which words and components are learned, i64[m], in order."""
    return np.sort(rng.permutation(size)[:SEEN])


def learn(read: Callable[[np.ndarray], np.ndarray], size: int) -> Words:
    """Words of a pool, the same at each call."""
    from sklearn.cluster import MiniBatchKMeans

    rng = np.random.default_rng(0)
    images = brought(read(seen(size, rng)))
    height, width = images.shape[1:3]
    which = rng.integers(len(images), size=SAMPLE)
    down, right = (rng.integers(extent - PATCH + 1, size=SAMPLE) for extent in (height, width))
    patches = np.lib.stride_tricks.sliding_window_view(images, (PATCH, PATCH), (1, 2))
    patches = normalised(patches[which, down, right].reshape(SAMPLE, -1).astype(np.float64))
    mean = patches.mean(0)
    variances, axes = np.linalg.eigh(np.cov((patches - mean).T))
    whitening = (axes / np.sqrt(np.maximum(variances, 0) + WHITENING)) @ axes.T
    clusters = MiniBatchKMeans(
        WORDS, batch_size=BATCH, max_iter=PASSES, n_init=1, random_state=0
    ).fit((patches - mean) @ whitening)
    rows = unit(clusters.cluster_centers_)
    return Words(*(np.asarray(x, np.float32) for x in (mean, whitening, rows)))


def normalised(patches: Any) -> Any:
    """Patches [..., P] less their mean, over their standard deviation."""
    centred = patches - patches.mean(-1, keepdims=True)
    return centred / (patches.var(-1, keepdims=True) + NOISE) ** 0.5


def compared(images: np.ndarray, words: Words, step: int = 1) -> jax.Array:
    """uint8[b, H, W, C] -> f32[b, 9 K]: likeness to each word, its mean over each of nine cells; of
    patches that are `step` pixels apart."""
    return _compared(jnp.asarray(brought(images)), *words, step)


@partial(jax.jit, static_argnums=4)
def _compared(
    images: jax.Array, mean: jax.Array, whitening: jax.Array, rows: jax.Array, step: int
) -> jax.Array:
    # [b, h, w, C x 36], the order that `learn` has.
    patches = jax.lax.conv_general_dilated_patches(
        images, (PATCH, PATCH), (step, step), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    patches = (normalised(patches) - mean) @ whitening
    squares = jnp.sum(patches**2, -1, keepdims=True) - 2 * patches @ rows.T + 1
    distances = jnp.sqrt(jnp.maximum(squares, 0))
    likeness = jnp.maximum(distances.mean(-1, keepdims=True) - distances, 0)
    means = [
        part.mean((1, 2))
        for row in jnp.array_split(likeness, CELLS, 1)
        for part in jnp.array_split(row, CELLS, 2)
    ]
    return jnp.concatenate(means, 1)


def brought(images: np.ndarray) -> np.ndarray:
    """uint8[b, H, W, C] -> f32[b, h, w, C], so that h and w are at most 32, and at least 16: means
    of squares, or between the pixels."""
    factor = -(-max(images.shape[1:3]) // MOST)
    height, width = (max(side // factor, 1) for side in images.shape[1:3])
    tall, wide = (min(factor, side) for side in images.shape[1:3])
    cut = images[:, : height * tall, : width * wide].astype(np.float32)
    small = cut.reshape(len(images), height, tall, width, wide, -1).mean((2, 4))
    sides = (max(height, LEAST), max(width, LEAST))
    if sides == (height, width):
        return small
    shape = (len(images), *sides, images.shape[3])
    return np.asarray(jax.image.resize(small, shape, "linear"))


def beside(features: np.ndarray, patches: np.ndarray, weight: float) -> np.ndarray:
    """Features f32[n, D] and those of patches f32[n, E] as f32[n, D + E], unit rows, of which the
    second have `weight` times the first's length."""
    return unit(np.concatenate([unit(features), weight * unit(patches)], axis=1)).astype(np.float32)
