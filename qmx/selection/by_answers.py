"""Choice of the next images to ask about, by predictions for the others.

Each way is a pure function (probabilities f32[n, N] predicted for the pool, i64[m] images already
asked about, number) -> i64[number]. It returns the least certain of the other images, the least
certain first. Ties go by the pool's order. Nothing is random.
"""

from collections.abc import Callable

import numpy as np

Choice = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def margin(probabilities: np.ndarray, asked: np.ndarray, number: int) -> np.ndarray:
    """Images with the least margin between the two highest probabilities, i64[number].

    Scheffer et al. 2001, *Active Hidden Markov Models for Information Extraction*.
    """
    second, best = np.partition(probabilities.astype(np.float64), (-2, -1), axis=1)[:, -2:].T
    order = np.argsort(best - second, kind="stable")
    return order[~np.isin(order, asked)][:number]


def entropy(probabilities: np.ndarray, asked: np.ndarray, number: int) -> np.ndarray:
    """Images with the highest entropy, -sum p log p, i64[number].

    Shannon 1948. As a choice: Settles 2009, *Active Learning Literature Survey*, section 3.1; to
    copy models: Pal et al. 2020, *ActiveThief*.
    """
    from scipy.special import entr  # a sixth of the time of `import qmx`

    order = np.argsort(-entr(probabilities.astype(np.float64)).sum(1), kind="stable")
    return order[~np.isin(order, asked)][:number]


def shares(budget: int, rounds: int) -> list[int]:
    """Numbers of images to ask about, first and in each of `rounds` rounds, as equal as can be.

    No number is 0: a budget too small for all rounds has fewer of them.
    """
    return [len(part) for part in np.array_split(np.arange(budget), min(rounds + 1, budget))]


BY_ANSWERS: dict[str, Choice] = {"margin": margin, "entropy": entropy}
