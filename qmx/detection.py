"""Detectors of copying, over traffic in its order: PRADA, and a kernel two-sample test.

Each looks at the queries of one principal from time to time, and alarms where a number falls below
a bound. They take features of the images, and PRADA the classes that the target answered with; both
are the caller's choice.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np

# PRADA's, from its authors' code (SSGAalto/prada-protecting-against-dnn-model-stealing-attacks).
DELTA = 0.9  # of W, below which it alarms (src/main.py)
EVERY = 10  # queries between two looks (src/growing_set.py, as the next three)
OF_A_CLASS = 10  # distances that a class needs to be looked at
ENOUGH = 100  # distances that are too few to look at
OUTLIER = 3.0  # standard deviations from the mean, beyond which distances are left out

WINDOW = 100  # queries that are compared with honest ones; PRADA begins with as many
ALPHA = 0.01  # of the test, which alarms below it: on one honest window of two hundred
PERMUTATIONS = 199  # so that the smallest p is 0.005
REFERENCE = 500  # honest images that a window is compared with: a few hundred thousand distances
ORDERS = 10  # random orders in which traffic is looked at once more
SIDE = 32  # pixels of an image's side in `pixels`, at most; as CIFAR has


class Watched(NamedTuple):
    """Observations of a detector; it alarms where a value is below the bound."""

    at: np.ndarray  # i64[k], queries after which it looked
    value: np.ndarray  # f64[k]
    bound: float

    @property
    def alarm_at(self) -> int | None:
        """Queries after which it alarmed first; None if it never did."""
        alarms = self.at[self.value < self.bound]
        return int(alarms[0]) if len(alarms) else None


def pixels(
    images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], side: int = SIDE
) -> np.ndarray:
    """Standardised pixels, uint8[n, H, W, C] -> f32[n, D]; means over blocks of larger images, so
    that no side is longer than `side`."""
    n, height, width, channels = images.shape
    block = -(-max(height, width) // side)
    rows, columns = max(height // block, 1), max(width // block, 1)
    cut = images[:, : rows * block, : columns * block]
    parts = cut.reshape(n, rows, cut.shape[1] // rows, columns, cut.shape[2] // columns, channels)
    means = parts.mean((2, 4), dtype=np.float32) / 255
    low, scale = np.array(mean, np.float32), np.array(std, np.float32)
    return ((means - low) / scale).reshape(n, -1)


def prada(
    features: np.ndarray, classes: np.ndarray, *, delta: float = DELTA, every: int = EVERY
) -> Watched:
    """PRADA: are the distances between queries of a class distributed as those of honest ones?

    The distance of a query is that to the nearest one in the growing set of its class. It joins the
    set if it is further away than the set's members are from each other, all but the near ones. The
    value is W of Shapiro and Wilk's test over all distances: that of a normal distribution is 1.

    Args:
      features: f32[n, D], in the order of the queries.
      classes: i64[n], the target's answers.
      delta: W below which it alarms.
      every: queries between two looks.

    Source: Juuti et al. 2019, "PRADA: Protecting against DNN Model Stealing Attacks", and its
    authors' code, which looks after 1, 11, 21 queries and so on.
    """
    members: dict[int, list[int]] = {}
    # Of the distances at which they joined, 0 of the first: their mean, and the sum of the squares
    # about it.
    joined: dict[int, tuple[float, float]] = {}
    bound: dict[int, float] = {}
    nearest: dict[int, list[float]] = {}
    at, value = [], []
    for i, k in enumerate(np.asarray(classes).tolist()):
        if k not in members:
            members[k], joined[k], bound[k], nearest[k] = [i], (0.0, 0.0), 0.0, []
        else:
            distance = float(
                np.sqrt(np.square(features[members[k]] - features[i]).sum(1).min())  # of the set
            )
            nearest[k].append(distance)
            if distance > bound[k]:
                members[k].append(i)
                mean, squares = joined[k]
                off = distance - mean
                mean += off / len(members[k])
                joined[k] = mean, squares + off * (distance - mean)
                bound[k] = max(bound[k], mean - (joined[k][1] / len(members[k])) ** 0.5)
        if (i + 1) % every == 0:
            w = normality([some for some in nearest.values() if len(some) >= OF_A_CLASS])
            if w is not None:
                at.append(i + 1)
                value.append(w)
    return Watched(np.array(at, np.int64), np.array(value, np.float64), delta)


def normality(distances: list[list[float]]) -> float | None:
    """W of Shapiro and Wilk's test over all distances but the outliers; None of too few."""
    from scipy.stats import shapiro

    every = np.concatenate([np.zeros(0), *distances])
    if len(every) <= ENOUGH:
        return None
    kept = every[abs(every - every.mean()) < OUTLIER * every.std()]
    if len(kept) <= ENOUGH:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of p, which is not used, for more than 5,000 distances
        return float(shapiro(kept).statistic)


def mmd(
    features: np.ndarray,
    reference: np.ndarray,
    *,
    window: int = WINDOW,
    alpha: float = ALPHA,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Watched:
    """Two-sample tests of each window of queries against honest ones.

    The statistic is the unbiased squared maximum mean discrepancy with a Gaussian kernel, as wide
    as the median distance between the points of both samples. The value is its p among random
    partitions of these points.

    Args:
      features: f32[n, D], in the order of the queries.
      reference: f32[m, D], of honest images.
      window: queries of one test; a last one of fewer is not tested.
      alpha: p below which it alarms.

    Raises:
      ValueError: fewer than two images in a sample; an alpha that no p can be below.

    Source: Gretton et al. 2012, "A Kernel Two-Sample Test", equation 3 and section 8; p as in
    Phipson & Smyth 2010.
    """
    if min(window, len(reference)) < 2:
        raise ValueError(f"window {window} and {len(reference)} reference images: both need two")
    if alpha * (permutations + 1) <= 1:
        raise ValueError(
            f"alpha {alpha:g} needs permutations above {1 / alpha - 1:.0f}, or must itself be above"
            f" {1 / (permutations + 1):g}"
        )
    rng = np.random.default_rng(seed)
    own = np.arange(window + len(reference)) < window
    at, value = [], []
    for start in range(0, len(features) - window + 1, window):
        kernel = gaussian(np.concatenate([features[start : start + window], reference]))
        others = rng.permuted(np.tile(own, (permutations, 1)), axis=1)
        observed, *null = discrepancies(kernel, np.vstack([own, others]))
        at.append(start + window)
        value.append((1 + int((np.array(null) >= observed).sum())) / (1 + permutations))
    return Watched(np.array(at, np.int64), np.array(value, np.float64), alpha)


def gaussian(points: np.ndarray) -> np.ndarray:
    """Gaussian kernel f64[n, n] of points f32[n, D], as wide as their median distance."""
    points = points.astype(np.float64) - points.mean(0, dtype=np.float64)
    squares = np.square(points).sum(1)
    squares = np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0)
    width = np.median(np.sqrt(squares[np.triu_indices(len(points), 1)])) or 1.0
    return np.exp(-squares / (2 * width**2))


def discrepancies(kernel: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Unbiased squared MMD f64[p] of n points by their kernel f64[n, n], for each of p partitions:
    bool[p, n], true for the first sample, of which all have as many."""
    between = kernel - np.diag(np.diag(kernel))
    one = first.astype(np.float64)
    other = 1 - one
    m, n = one[0].sum(), other[0].sum()
    to_one, to_other = one @ between, other @ between
    within = (to_one * one).sum(1) / (m * (m - 1)) + (to_other * other).sum(1) / (n * (n - 1))
    return within - 2 * (to_one * other).sum(1) / (m * n)


def watch(
    features: np.ndarray,
    classes: np.ndarray,
    honest: np.ndarray,
    honest_classes: np.ndarray,
    *,
    delta: float = DELTA,
    alpha: float = ALPHA,
    window: int = WINDOW,
    orders: int = ORDERS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Both detectors over traffic as it was asked, over the same shuffled, and over honest traffic.

    Args:
      features, classes: of the traffic, see `prada`; f32[n, D] and i64[n].
      honest, honest_classes: of honest images, f32[m, D] and i64[m]. The two-sample test compares
        with a random half of them, at most `REFERENCE`, and the other half is its honest traffic.
      orders: random orders of the traffic and of the honest images.

    Returns:
      For each detector {"name", "bound", "asked", "shuffled", "honest"}: "asked" is {"queries",
      "looks", "alarms", "alarm_at"}, see `Watched`; the others are {"queries", "orders", "alarmed",
      "alarm_at"}, the number of orders with an alarm, and the first alarm of each order.

    Raises:
      ValueError: too few honest images for a window and a reference.
    """
    half = len(honest) // 2
    if half < window:
        raise ValueError(
            f"{len(honest)} honest images are too few; {2 * window} are needed, half of them to"
            f" compare with windows of {window} queries"
        )
    rng = np.random.default_rng(seed)
    shuffles = [rng.permutation(len(features)) for _ in range(orders)]
    halves = [rng.permutation(len(honest)) for _ in range(orders)]
    near = honest[halves[0][:half][:REFERENCE]]

    def test(rows: np.ndarray, reference: np.ndarray) -> Watched:
        return mmd(rows, reference, window=window, alpha=alpha, seed=seed)

    def distances(rows: np.ndarray, answers: np.ndarray) -> Watched:
        return prada(rows, answers, delta=delta)

    return [
        _summary(
            "PRADA",
            distances(features, classes),
            len(features),
            [distances(features[ids], classes[ids]) for ids in shuffles],
            len(honest),
            [distances(honest[ids], honest_classes[ids]) for ids in halves],
        ),
        _summary(
            "MMD",
            test(features, near),
            len(features),
            [test(features[ids], near) for ids in shuffles],
            len(honest) - half,
            [test(honest[ids[half:]], honest[ids[:half][:REFERENCE]]) for ids in halves],
        ),
    ]


def _summary(
    name: str,
    asked: Watched,
    queries: int,
    shuffled: list[Watched],
    honest_queries: int,
    honest: list[Watched],
) -> dict[str, Any]:
    def over(some: list[Watched], length: int) -> dict[str, Any]:
        first = [one.alarm_at for one in some]
        alarmed = sum(one is not None for one in first)
        return {"queries": length, "orders": len(some), "alarmed": alarmed, "alarm_at": first}

    return {
        "name": name,
        "bound": asked.bound,
        "asked": {
            "queries": queries,
            "looks": len(asked.at),
            "alarms": int((asked.value < asked.bound).sum()),
            "alarm_at": asked.alarm_at,
        },
        "shuffled": over(shuffled, queries),
        "honest": over(honest, honest_queries),
    }
