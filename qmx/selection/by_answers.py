"""Which images to ask about next, by what the answers so far say of the others.

Each way is a pure function (probabilities f32[n, N] predicted for the pool, i64[m] numbers of the
images that were asked about, number) -> i64[number], the images that are the least certain and were
not asked about, the least certain first; of equally uncertain ones those that come first in the
pool. Nothing is drawn.
"""

from collections.abc import Callable

import numpy as np

Choice = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def margin(probabilities: np.ndarray, asked: np.ndarray, number: int) -> np.ndarray:
    """The smallest differences between the two highest probabilities: f32[n, N], i64[m] ->
    i64[number].

    Scheffer et al. 2001, *Active Hidden Markov Models for Information Extraction*.
    """
    second, best = np.partition(probabilities.astype(np.float64), (-2, -1), axis=1)[:, -2:].T
    return _lowest(best - second, asked, number)


def entropy(probabilities: np.ndarray, asked: np.ndarray, number: int) -> np.ndarray:
    """The highest entropies, -sum p log p: f32[n, N], i64[m] -> i64[number].

    Shannon 1948; to choose by it Settles 2009, *Active Learning Literature Survey*, section 3.1,
    and, to copy models, Pal et al. 2020, *ActiveThief*.
    """
    from scipy.special import entr  # it would take a sixth of the time of `import qmx`

    return _lowest(-entr(probabilities.astype(np.float64)).sum(1), asked, number)


def _lowest(certainty: np.ndarray, asked: np.ndarray, number: int) -> np.ndarray:
    order = np.argsort(certainty, kind="stable")
    return order[~np.isin(order, asked)][:number]


def shares(budget: int, rounds: int) -> list[int]:
    """Numbers of images to ask about, first and in each of `rounds` rounds, as equal as can be.

    None is 0, so that a budget smaller than their number has fewer rounds.
    """
    return [len(part) for part in np.array_split(np.arange(budget), min(rounds + 1, budget))]


BY_ANSWERS: dict[str, Choice] = {"margin": margin, "entropy": entropy}
