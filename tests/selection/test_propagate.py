"""Propagation of answers: against scikit-learn's, and what must hold of it."""

import numpy as np
import pytest
from sklearn.semi_supervised import LabelSpreading
from test_by_features import blobs

from qmx.selection.propagate import propagate, with_head


def one_hot(classes, count=4):
    return np.eye(count, dtype=np.float32)[classes]


def test_against_scikit_learn():
    """The same graph in LabelSpreading, which iterates where we solve, and does not divide a class
    by the number of its answers."""
    features, of = blobs(spread=0.3)
    ids = np.array([0, 5, 31, 65, 99])
    found = propagate(features, ids, one_hot(of[ids]), neighbours=10, power=3, alpha=0.9)

    def graph(x, _):
        cosine = (x @ x.T).astype(np.float64)
        np.fill_diagonal(cosine, -np.inf)
        near = cosine >= np.sort(cosine, axis=1)[:, -10][:, None]
        weights = np.where(near, np.maximum(cosine, 0), 0) ** 3
        return weights + weights.T

    labels = np.full(len(of), -1)
    labels[ids] = of[ids]
    theirs = LabelSpreading(kernel=graph, alpha=0.9, max_iter=5000, tol=1e-12).fit(features, labels)
    rest = np.setdiff1d(np.arange(len(of)), ids)
    want = theirs.label_distributions_[rest] / np.bincount(of[ids], minlength=4)
    np.testing.assert_allclose(found[rest], want / want.sum(1, keepdims=True), atol=1e-5)


def test_a_class_with_many_answers_floods_nobody():
    """Twenty answers of one class against one of another between equal blobs: the border stays
    where it is. A class of which there is no whole answer is not blown up."""
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(0, 0.6, 40), np.linspace(0.6, 1.2, 40)])
    features = np.stack([np.cos(x), np.sin(x)], 1).astype(np.float32)
    ids = np.concatenate([rng.permutation(40)[:20], [75]])
    answers = np.full((21, 3), 0.001, np.float32)
    answers[:20, 0], answers[20, 1] = 0.998, 0.998
    found = propagate(features, ids, answers, neighbours=5)
    classes = found.argmax(1)
    assert abs(int((classes == 1).sum()) - 40) <= 8 and not (classes == 2).any()


def test_what_holds():
    """Answers stay as they are; every row is a distribution; four answers label four blobs."""
    features, of = blobs()
    ids = np.array([3, 40, 70, 110])
    given = 0.8 * one_hot(of[ids]) + 0.05
    found = propagate(features, ids, given.astype(np.float32), neighbours=5)
    np.testing.assert_array_equal(found[ids], given.astype(np.float32))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(found.argmax(1), of)


def test_nothing_reached():
    """An image that no answer reaches is given every class alike; more neighbours than images are
    all of them."""
    features, _ = blobs(count=2, size=6, spread=0)
    found = propagate(features, np.array([0]), one_hot([1]), neighbours=3)
    np.testing.assert_allclose(found[:6], one_hot([1] * 6), atol=1e-6)
    np.testing.assert_allclose(found[6:], 0.25)
    assert propagate(features, np.array([0]), one_hot([1]), neighbours=500).shape == (12, 4)


@pytest.mark.parametrize("order", [0, 1])
def test_order_of_images(order):
    """The pool's order changes nothing."""
    features, of = blobs(spread=0.3)
    shuffle = np.random.default_rng(order).permutation(len(of))
    ids = np.array([0, 35, 65, 99])
    plain = propagate(features, ids, one_hot(of[ids]), neighbours=8)
    back = np.argsort(shuffle)
    found = propagate(features[shuffle], back[ids], one_hot(of[ids]), neighbours=8)
    np.testing.assert_allclose(found, plain[shuffle], atol=1e-4)


def test_temperature():
    """It divides the logarithms of what is propagated, and leaves the answers and what nothing
    reached alone."""
    features, of = blobs(spread=0.3)
    features = np.concatenate([np.pad(features, ((0, 0), (0, 1))), np.eye(1, 9, 8)])
    features = features.astype(np.float32)
    ids = np.array([0, 31, 65, 99])
    given = (0.8 * one_hot(of[ids]) + 0.05).astype(np.float32)
    plain = propagate(features, ids, given, neighbours=5, alpha=0.9)
    sharp = propagate(features, ids, given, neighbours=5, alpha=0.9, temperature=0.25)
    want = plain.astype(np.float64) ** 4
    want /= want.sum(1, keepdims=True)
    want[ids] = given
    np.testing.assert_allclose(sharp, want, atol=1e-5)
    np.testing.assert_array_equal(sharp[-1], 0.25)


def test_with_head():
    """Scores times the head's probabilities to the power; answers stay; the head alone tells where
    nothing reached, and can name a class of which a score is nothing."""
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(3), 6).astype(np.float32)
    scores[4], scores[5] = 1 / 3, (1, 0, 0)
    told = rng.normal(size=(6, 3)).astype(np.float32)
    told[5] = (0, 40, 0)
    ids = np.array([1, 2])
    found = with_head(scores, ids, told, 0.5)
    q = np.exp(told.astype(np.float64))
    q /= q.sum(1, keepdims=True)
    want = scores * np.sqrt(q)
    want /= want.sum(1, keepdims=True)
    np.testing.assert_allclose(found[[0, 3]], want[[0, 3]], atol=1e-5)
    np.testing.assert_array_equal(found[ids], scores[ids])
    np.testing.assert_allclose(found[4], np.sqrt(q[4]) / np.sqrt(q[4]).sum(), rtol=1e-5)
    assert found[5].argmax() == 1 and found.dtype == np.float32
