"""What owners may do to scores: sums, support, ties, and each against its definition written
out."""

import math

import numpy as np
import pytest
from scipy.special import softmax

from qmx.ledger.access import as_logits, derive, known
from qmx.ledger.weaken import WEAKENINGS, parse, rounded, top, top_spread

SCORES = np.random.default_rng(0).normal(0, 3, (50, 12)).astype(np.float32)
KEYS = [bytes([row] * 32) for row in range(50)]
P = softmax(SCORES.astype(np.float64), axis=1)


def seen(level, scores=SCORES, have="logits"):
    return derive(scores, have, level, KEYS[: len(scores)])


@pytest.mark.parametrize("level", [kind.example for kind in WEAKENINGS.values()])
def test_distributions(level):
    """Each answer is a distribution, the same each time, and the same from logits as from
    probabilities."""
    found = seen(level)
    assert found.dtype == np.float32 and found.shape == SCORES.shape and (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(found, seen(level))
    np.testing.assert_allclose(
        found, seen(level, derive(SCORES, "logits", "probs"), "probs"), atol=1e-6
    )
    assert known(level) and not np.isnan(as_logits(found, level)).any()


def test_top():
    """The k highest in their proportions and nothing else; of equal ones the first; more than there
    are is all."""
    for row, p in zip(seen("top5"), P, strict=True):
        best = np.sort(np.argsort(-p)[:5])
        np.testing.assert_array_equal(np.flatnonzero(row), best)
        np.testing.assert_allclose(row[best], p[best] / p[best].sum(), rtol=1e-5)
    np.testing.assert_array_equal(top(np.full((1, 4), 0.25), 2), [[0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(seen("top99"), P, atol=1e-6)
    np.testing.assert_array_equal(seen("top1"), derive(SCORES, "logits", "label"))


def test_top_spread():
    """The k highest as they are, the rest sharing what is left."""
    np.testing.assert_allclose(
        top_spread(np.array([[0.5, 0.3, 0.15, 0.05]]), 2), [[0.5, 0.3, 0.1, 0.1]]
    )
    np.testing.assert_allclose(seen("top_spread12"), P, atol=1e-6)


def test_rounded():
    """Python's own rounding of each; where all round to nothing, nothing is said."""
    for row, p in zip(seen("rounded2"), P, strict=True):
        each = np.array([round(x, 2) for x in p])
        np.testing.assert_allclose(row, each / each.sum(), atol=1e-6)
    np.testing.assert_allclose(rounded(np.full((1, 1000), 0.001), 2), 0.001)


def test_noise():
    """Of the deviation that is named, of its own for each image whatever the batch, and cut at
    0."""
    flat = np.zeros((50, 1000), np.float32)
    drawn = derive(flat, "logits", "noise0.0001", KEYS) - 1e-3
    np.testing.assert_allclose(drawn.std(), 1e-4, rtol=0.02)
    np.testing.assert_array_equal(
        seen("noise0.1")[7:9], derive(SCORES[7:9], "logits", "noise0.1", KEYS[7:9])
    )
    assert (seen("noise0.1") == 0).any() and not np.array_equal(
        seen("noise0.1")[0], seen("noise0.1")[1]
    )
    with pytest.raises(ValueError, match="noise needs a key for each of 50 answers and has 0"):
        derive(SCORES, "logits", "noise0.1")


def test_reverse_sigmoid():
    """The paper's formula, one number at a time; the first class mostly stays the first, at less
    confidence."""
    for row, p in zip(seen("reverse_sigmoid0.5"), P, strict=True):
        each = [
            max(x - 0.5 * (1 / (1 + math.exp(-0.2 * math.log(x / (1 - x)))) - 0.5), 0) for x in p
        ]
        np.testing.assert_allclose(row, np.array(each) / sum(each), atol=1e-5)
    assert (seen("reverse_sigmoid0.5").max(1) < P.max(1)).all()
    np.testing.assert_allclose(seen("reverse_sigmoid0"), P, atol=1e-6)


@pytest.mark.parametrize(
    "level", ["top", "top0", "top1.5", "rounded", "noise", "topp5", "5", "top-5", "logits2", ""]
)
def test_unknown(level):
    """What is no level is refused, with those that are."""
    assert parse(level) is None and not known(level)
    with pytest.raises(
        ValueError, match="unknown; choose one of logits, probs, label, top5, top_spread5, rounded2"
    ):
        seen(level)


def test_from_labels():
    """A weakened level cannot be had of labels."""
    with pytest.raises(
        ValueError, match="label, from which top5 cannot be derived; ask with access='probs'"
    ):
        seen("top5", np.eye(12, dtype=np.float32), "label")
