"""Weakened scores, as an owner may hand them out: fewer of them, or perturbed ones.

A weakened level is a name and a number, as in "top5" or "rounded2". Each is a pure function of
probabilities, so answers that were paid for once serve all of them.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

REVERSE_SIGMOID_GAMMA = 0.2  # Lee et al. 2018, section 4; beta is the level's number


class Weakening(NamedTuple):
    """A kind of weakened level."""

    # (f64[n, N], number, keys) -> f64[n, N].
    apply: Callable[[np.ndarray, float, Sequence[bytes]], np.ndarray]
    whole: bool  # True if the number must be whole
    example: str


def top(p: np.ndarray, k: float, _: Sequence[bytes] = ()) -> np.ndarray:
    """The k highest probabilities, scaled to sum to 1; the others 0. Among equals the first win."""
    return normalised(np.where(_among_highest(p, int(k)), p, 0))


def top_spread(p: np.ndarray, k: float, _: Sequence[bytes] = ()) -> np.ndarray:
    """The k highest probabilities as they are; the other classes share the rest evenly."""
    kept = _among_highest(p, int(k))
    left = np.maximum(1 - np.where(kept, p, 0).sum(1, keepdims=True), 0)
    return np.where(kept, p, left / max(p.shape[1] - int(k), 1))


def rounded(p: np.ndarray, decimals: float, _: Sequence[bytes] = ()) -> np.ndarray:
    """Probabilities rounded to so many decimals, and scaled to sum to 1."""
    return normalised(np.round(p, int(decimals)))


def noise(p: np.ndarray, deviation: float, keys: Sequence[bytes]) -> np.ndarray:
    """Add Gaussian noise, cut at 0 and scale to sum to 1; an image gets the same noise each time.

    As the additive-noise baseline of Orekondy et al. 2020, *Prediction Poisoning*, section 5.1.

    Args:
      deviation: the standard deviation.
      keys: of the images; each seeds the noise of its image.
    """
    if len(keys) != len(p):
        raise ValueError(f"noise needs a key for each of {len(p)} answers and has {len(keys)}")
    drawn = np.stack(
        [np.random.default_rng(int.from_bytes(key[:16])).normal(size=p.shape[1]) for key in keys]
    )
    return normalised(np.maximum(p + deviation * drawn, 0))


def reverse_sigmoid(p: np.ndarray, beta: float, _: Sequence[bytes] = ()) -> np.ndarray:
    """p - beta (sigmoid(gamma logit(p)) - 1/2), scaled to sum to 1: many scores give one answer.

    Lee et al. 2018, *Defending Against Machine Learning Model Stealing Attacks Using Deceptive
    Perturbations*, section 3.
    """
    inner = np.clip(p, 1e-12, 1 - 1e-12)
    odds = REVERSE_SIGMOID_GAMMA * (np.log(inner) - np.log1p(-inner))
    return normalised(np.maximum(p - beta * (1 / (1 + np.exp(-odds)) - 0.5), 0))


WEAKENINGS = {
    "top": Weakening(top, True, "top5"),
    "top_spread": Weakening(top_spread, True, "top_spread5"),
    "rounded": Weakening(rounded, True, "rounded2"),
    "noise": Weakening(noise, False, "noise0.1"),
    "reverse_sigmoid": Weakening(reverse_sigmoid, False, "reverse_sigmoid0.5"),
}


def parse(level: str) -> tuple[Weakening, float] | None:
    """A weakened level's kind and number; None if there is no such level."""
    match = re.fullmatch(r"([a-z_]+?)(\d+(?:\.\d+)?)", level)
    kind = WEAKENINGS.get(match[1]) if match else None
    if match is None or kind is None:
        return None
    number = float(match[2])
    if kind.whole and (number != int(number) or (number == 0 and kind.apply is not rounded)):
        return None
    return kind, number


def normalised(p: np.ndarray) -> np.ndarray:
    """Rows scaled to sum to 1; a row of zeros becomes uniform."""
    total = p.sum(1, keepdims=True)
    return np.where(total > 0, p / np.where(total > 0, total, 1), 1 / p.shape[1])


def _among_highest(p: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-p, axis=1, kind="stable")[:, :k]
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, order, True, axis=1)
    return kept
