"""Pixels beside features: against scikit-learn's components, and through the command's stage."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from qmx.selection.pixels import beside, components, shrunk
from qmx.selection.propagate import propagate


def test_components_against_scikit_learn():
    """More numbers than components: the same distances as scikit-learn's PCA; blocks change
    nothing."""
    images = np.random.default_rng(0).integers(0, 256, (300, 12, 10, 1), np.uint8)
    images[:, :6] = images[:, 6:] // 2  # some directions count more than others
    found = components(lambda ids: images[ids], len(images))
    flat = images.reshape(300, -1).astype(np.float64)
    want = PCA(64, svd_solver="full").fit_transform(flat)
    found = found.astype(np.float64)  # from f32, of lengths about 650
    np.testing.assert_allclose(found @ found.T, want @ want.T, atol=1e-6 * 650**2)


def test_few_pixels_stay_as_they_are():
    images = np.random.default_rng(1).integers(0, 256, (50, 8, 8, 1), np.uint8)
    found = components(lambda ids: images[ids], len(images))
    flat = images.reshape(50, -1).astype(np.float64)
    np.testing.assert_allclose(found, flat - flat.mean(0), rtol=1e-6)


@pytest.mark.parametrize(("height", "width", "out"), [(64, 64, (32, 32)), (100, 30, (25, 7))])
def test_large_images_are_shrunk(height, width, out):
    """Each pixel is the mean of a square of whole pixels."""
    images = np.random.default_rng(2).integers(0, 256, (2, height, width, 3), np.uint8)
    small, factor = shrunk(images), height // out[0]
    assert small.shape == (2, *out, 3)
    for row, column in ((0, 0), (out[0] - 1, out[1] - 1), (3, 5)):
        square = images[1, factor * row :, factor * column :][:factor, :factor].mean((0, 1))
        np.testing.assert_allclose(small[1, row, column], square)


def test_weight_of_pixels():
    """Cosines are those of both, weighted by its square; rows have length 1."""
    rng = np.random.default_rng(3)
    z, p = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=(40, 7)).astype(np.float32)
    rows = beside(z, p, 0.5)
    z, p = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, p))
    np.testing.assert_allclose(rows @ rows.T, (z @ z.T + 0.25 * p @ p.T) / 1.25, atol=1e-6)


def test_pixels_help_weak_features():
    """Features that know little of digits, and the pixels beside them, with five answers a class:
    more of the others are told."""
    data = load_digits()
    images, of = data.images.astype(np.uint8)[..., None], data.target
    rng = np.random.default_rng(0)
    weak = data.data @ rng.normal(size=(64, 6))
    weak = weak / np.linalg.norm(weak, axis=1, keepdims=True)
    ids = np.concatenate([np.flatnonzero(of == digit)[:5] for digit in range(10)])
    rows = beside(weak, components(lambda i: images[i], len(of)), 1.0)
    told = [
        (propagate(x, ids, np.eye(10, dtype=np.float32)[of[ids]], neighbours=5).argmax(1) == of)
        for x in (weak.astype(np.float32), rows)
    ]
    assert told[1].mean() > told[0].mean() + 0.1
