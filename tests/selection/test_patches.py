"""Features of patches: against loops, PyTorch and scikit-learn, and what they are for."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from qmx.selection.patches import Words, beside, brought, compared, learn, patch_features
from qmx.selection.propagate import propagate

DIGITS = load_digits()


def digits(ids=slice(None)):
    return (DIGITS.images[ids] * 15).astype(np.uint8)[..., None]


def test_likeness_against_loops():
    """Of one image: each patch normalised, whitened and compared with each word, the means of nine
    cells."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 17, 20, 2), np.uint8)
    mean, rows = rng.normal(size=72), rng.normal(size=(5, 72))
    whitening, rows = rng.normal(size=(72, 72)) / 8, rows / np.linalg.norm(rows, axis=1)[:, None]
    words = Words(*(x.astype(np.float32) for x in (mean, whitening, rows)))
    likeness = np.zeros((12, 15, 5))
    for y in range(12):
        for x in range(15):
            patch = image[0, y : y + 6, x : x + 6].astype(float).transpose(2, 0, 1).ravel()
            patch = (patch - patch.mean()) / np.sqrt(patch.var() + 10)
            patch = (patch - mean) @ whitening
            distances = [np.linalg.norm(patch - row) for row in rows]
            likeness[y, x] = [max(np.mean(distances) - d, 0) for d in distances]
    cells = likeness.reshape(3, 4, 3, 5, 5).mean((1, 3)).reshape(-1)
    np.testing.assert_allclose(np.asarray(compared(image, words))[0], cells, rtol=1e-4, atol=1e-5)


def test_mirrored(few):
    """An image and its mirror image have the same features, of every second patch of both; by
    themselves they have not."""
    rng = np.random.default_rng(0)
    images = np.kron(rng.integers(0, 256, (60, 6, 6, 1), np.uint8), np.ones((1, 3, 3, 1), np.uint8))
    both = np.concatenate([images, images[:, :, ::-1]])
    alike, apart = (patch_features(lambda ids: both[ids], 120, mirrored) for mirrored in (1, 0))
    np.testing.assert_allclose(alike[:60], alike[60:], atol=1e-4 * alike.std())
    assert np.abs(apart[:60] - apart[60:]).mean() > 0.1 * apart.std()
    words = learn(lambda ids: both[ids], 120)
    every = np.asarray(compared(both, words, 2))
    grid = torch.as_tensor(brought(both)).unfold(1, 6, 2).unfold(2, 6, 2)
    assert grid.shape[1:3] == (7, 7) and every.shape == (120, 9 * len(words.rows))


def test_images_that_are_all_alike(few):
    images = np.full((3, 16, 16, 1), 9, np.uint8)
    assert not patch_features(lambda ids: images[ids], 3).any()


def test_words_are_of_whitened_patches():
    """200 words of length 1; patches that are whitened by them have nearly uncorrelated numbers."""
    images = digits()
    words = learn(lambda ids: images[ids], len(images))
    np.testing.assert_allclose(np.linalg.norm(words.rows, axis=1), np.ones(200), rtol=1e-5)
    np.testing.assert_allclose(words.whitening, words.whitening.T, atol=1e-4)
    grown = brought(images[:200])
    patches = [
        grown[:, y : y + 6, x : x + 6].reshape(200, -1) for y in (0, 4, 9) for x in (1, 5, 8)
    ]
    patches = np.concatenate(patches).astype(float)
    patches = patches - patches.mean(1, keepdims=True)
    patches /= np.sqrt(patches.var(1, keepdims=True) + 10)
    white = (patches - words.mean) @ words.whitening
    large = np.linalg.eigvalsh(np.cov(white.T))[-8:]
    assert 0.5 < large.min() and large.max() < 2
    assert np.linalg.eigvalsh(np.cov(patches.T))[-1] > 4  # as they are, one direction rules


@pytest.fixture
def few(monkeypatch):
    """Fewer words, learned from a tenth of the patches."""
    monkeypatch.setattr("qmx.selection.patches.SAMPLE", 5_000)
    monkeypatch.setattr("qmx.selection.patches.WORDS", 40)


def test_components_against_scikit_learn(few):
    """The same likenesses between images as by scikit-learn's PCA, whose components are divided by
    the fourth root of their variance; blocks change nothing, nor does a second call."""
    images = digits()[:300]
    found = patch_features(lambda ids: images[ids], 300).astype(np.float64)
    assert found.shape == (300, 128)
    raw = np.asarray(compared(images, learn(lambda ids: images[ids], 300)), np.float64)
    pca = PCA(128, svd_solver="full").fit(raw)
    want = pca.transform(raw) / (pca.explained_variance_ * 299 / 300) ** 0.25
    np.testing.assert_allclose(found @ found.T, want @ want.T, atol=1e-4 * (want**2).sum(1).max())
    again = patch_features(lambda ids: images[ids], 300)
    np.testing.assert_array_equal(again, found.astype(np.float32))


def test_fewer_images_than_components(few):
    images = digits()[:20]
    found = patch_features(lambda ids: images[ids], 20)
    assert found.shape == (20, 20) and np.isfinite(found).all()


@pytest.mark.parametrize(("height", "width", "out"), [(64, 64, (32, 32)), (100, 64, (25, 16))])
def test_large_images_are_shrunk(height, width, out):
    """Each pixel is the mean of a square of whole pixels."""
    images = np.random.default_rng(2).integers(0, 256, (2, height, width, 3), np.uint8)
    small, factor = brought(images), height // out[0]
    assert small.shape == (2, *out, 3)
    for row, column in ((0, 0), (out[0] - 1, out[1] - 1), (3, 5)):
        square = images[1, factor * row :, factor * column :][:factor, :factor].mean((0, 1))
        np.testing.assert_allclose(small[1, row, column], square, rtol=1e-6)


def test_small_images_are_enlarged():
    """As PyTorch does between pixels; a side that is long enough stays."""
    images = np.random.default_rng(3).integers(0, 256, (4, 8, 20, 1), np.uint8)
    planes = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(planes, (16, 20), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(brought(images)[..., 0], want[:, 0].numpy(), rtol=1e-5)


def test_weight_of_patches():
    """Cosines are those of both, weighted by its square; rows have length 1."""
    rng = np.random.default_rng(3)
    z, p = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=(40, 7)).astype(np.float32)
    rows = beside(z, p, 0.5)
    z, p = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, p))
    np.testing.assert_allclose(rows @ rows.T, (z @ z.T + 0.25 * p @ p.T) / 1.25, atol=1e-6)


@pytest.mark.slow
def test_they_tell_more_than_pixels_and_weak_features():
    """With two answers a class, more of the other digits are told than by the pixels, and than by
    features that know little; means of eight draws."""
    images, of = digits(), DIGITS.target
    rng = np.random.default_rng(0)
    patches = patch_features(lambda ids: images[ids], len(of))
    weak = (DIGITS.data @ rng.normal(size=(64, 6))).astype(np.float32)
    kinds = {
        "weak": beside(weak, patches, 0.0),
        "pixels": beside(weak, DIGITS.data - DIGITS.data.mean(0), 1e6),
        "patches": beside(weak, patches, 1e6),
        "both": beside(weak, patches, 1.0),
    }
    told = dict.fromkeys(kinds, 0.0)
    for _ in range(8):
        ids = np.concatenate([rng.permutation(np.flatnonzero(of == c))[:2] for c in range(10)])
        answers = np.eye(10, dtype=np.float32)[of[ids]]
        for name, rows in kinds.items():
            guesses = propagate(rows, ids, answers, neighbours=5).argmax(1)
            told[name] += (guesses == of).mean() / 8
    assert told["patches"] > told["pixels"] + 0.01, told
    assert told["both"] > told["weak"] + 0.1, told
