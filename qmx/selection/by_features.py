"""Choice of the images to ask about, by features, which cost neither labels nor queries.

Each way is a pure function (features f32[n, D], budget, rng, classes) -> i64[budget], distinct
images. The rows of the features have length 1, so similarity is the cosine. `classes` is the
target's number of classes. The same generator gives the same choice.
"""

from collections.abc import Callable

import numpy as np

from qmx.selection.orders import rank_within

Choice = Callable[[np.ndarray, int, np.random.Generator, int], np.ndarray]

# avihu111/TypiClust, typiclust.py, with the paper (Hacohen et al. 2022, section 3.2).
MAX_CLUSTERS = 500
NEIGHBOURS = 20
SMALL_CLUSTER = 5
LLOYD = 50  # most clusters for Lloyd's algorithm; its mini-batch form makes more
BATCH = 5000  # images in a mini-batch

PURITY = 0.95  # of ProbCover's balls: Yehuda et al. 2022, section 4.2
HERD = 20_000  # images among which maxherding looks
COUNTED = 128  # candidates whose gains it counts at a time
SAMPLE = 5000  # images on which the radius of the balls is chosen
ROUNDING = 1e-5  # of a similarity in float32
CHUNK = 1024  # rows of a block of similarities, to limit the memory


def unit(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; f32[n, D] -> f32[n, D]. A row of zeros stays."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def balanced(
    features: np.ndarray, budget: int, rng: np.random.Generator, classes: int = 0
) -> np.ndarray:
    """Equal shares of k-means clusters, at random within each.

    There are as many clusters as the budget, up to 500. Cost: k-means, n D k for each pass.
    """
    clusters = k_means(features, min(budget, MAX_CLUSTERS), rng)
    order = rng.permutation(len(features))
    rank = np.empty(len(features), np.int64)
    rank[order] = rank_within(clusters[order])
    return np.lexsort((clusters, rank))[:budget]


def typiclust(
    features: np.ndarray, budget: int, rng: np.random.Generator, classes: int = 0
) -> np.ndarray:
    """The most typical point of each k-means cluster.

    There are as many clusters as the budget, up to 500; a larger budget goes round the clusters
    again, and what is typical is found anew without the points taken. Hacohen et al. 2022, *Active
    Learning on a Budget*: typicality is the inverse of the mean distance to the 20 nearest
    neighbours in the cluster, or to half of the cluster if that is fewer. Larger clusters come
    first; those of 5 points or fewer come when the others are used up.

    Cost: k-means, and n D times the size of a cluster.
    """
    clusters = k_means(features, min(budget, MAX_CLUSTERS), rng)
    size = np.bincount(clusters)[clusters]

    def in_turn(rank: np.ndarray) -> np.ndarray:
        return np.lexsort((clusters, -size, rank, size <= SMALL_CLUSTER))[:budget]

    shares = np.bincount(clusters[in_turn(rank_within(clusters))])
    rank = np.full(len(features), len(features))  # of those that are not taken
    for cluster in np.flatnonzero(shares):
        members = np.flatnonzero(clusters == cluster)
        taken = _typical(features[members], shares[cluster])
        rank[members[taken]] = np.arange(len(taken))
    return in_turn(rank)


def kcenter(
    features: np.ndarray, budget: int, rng: np.random.Generator, classes: int = 0
) -> np.ndarray:
    """Farthest first: each image is the least similar to those before it; the first is random.

    Gonzalez 1985; Sener and Savarese 2018, *A Core-Set Approach*, algorithm 1. A larger budget's
    choice begins with a smaller one's.

    Cost: n D for each image of the budget, and n numbers of memory.
    """
    ids = np.empty(budget, np.int64)
    # Similarity to the most similar image chosen so far.
    nearest = np.full(len(features), -np.inf, np.float32)
    for place in range(budget):
        ids[place] = rng.integers(len(features)) if place == 0 else nearest.argmin()
        np.maximum(nearest, features @ features[ids[place]], out=nearest)
        nearest[ids[: place + 1]] = np.inf
    return ids


def probcover(
    features: np.ndarray, budget: int, rng: np.random.Generator, classes: int
) -> np.ndarray:
    """Greedy covering by balls: the next ball holds the most images that no other ball holds.

    Yehuda et al. 2022, *Active Learning Through a Covering Lens*, algorithm 1. A ball is pure if it
    holds images of one k-means cluster only, of as many clusters as there are classes. The radius
    is the largest with 95 % pure balls (section 4.2). When all images are covered, the rest of the
    choice is random. A larger budget's choice begins with a smaller one's, as far as neither is
    random.

    Cost: n n D, and as many numbers of memory as there are pairs within a radius.
    """
    sample = np.sort(rng.permutation(len(features))[:SAMPLE])
    near = _radius(features[sample], k_means(features[sample], min(classes, len(sample)), rng))
    starts = range(0, len(features), CHUNK)
    inside = [
        np.flatnonzero(row >= near)
        for at in starts
        for row in features[at : at + CHUNK] @ features.T
    ]
    gain = np.array([len(ball) for ball in inside])
    covered = np.zeros(len(features), bool)
    ids: list[int] = []
    while len(ids) < budget and gain.max() > 0:
        ids.append(int(gain.argmax()))
        for new in inside[ids[-1]][~covered[inside[ids[-1]]]]:
            covered[new] = True
            gain[inside[new]] -= 1
        gain[ids[-1]] = 0  # a pair on the edge may be in one ball alone, by rounding
    left = np.setdiff1d(np.arange(len(features)), ids)
    return np.concatenate([np.array(ids, np.int64), rng.permutation(left)[: budget - len(ids)]])


def maxherding(
    features: np.ndarray, budget: int, rng: np.random.Generator, classes: int = 0
) -> np.ndarray:
    """Greedy covering without a radius: the next image brings the others nearest to a chosen one.

    Bae et al. 2024, *Generalized Coverage for More Robust Low-Budget Active Learning*, section 3:
    it raises most the mean over all images x of max exp(-|x - s|^2), s being the chosen ones.
    Images and candidates are 20,000 random ones, if there are more (BorealisAI/uherding takes
    35,000, in three times the time); what a budget has beyond these is random. A larger budget's
    choice begins with a smaller one's.

    Cost: m m D for m images looked at, and some 100 m D for each image of the budget.
    """
    order = rng.permutation(len(features))
    seen = features[order[:HERD]]
    covered = np.zeros(len(seen), np.float32)  # each image's kernel to the nearest chosen one

    def gains(places: np.ndarray) -> np.ndarray:
        near = kernel(seen[places])
        near -= covered  # in its place: memory for each step takes longer than the step
        return np.maximum(near, 0, out=near).sum(1, dtype=np.float64)

    def kernel(rows: np.ndarray) -> np.ndarray:
        near = rows @ seen.T
        near -= 1
        near *= 2
        return np.exp(near, out=near)

    starts = range(0, len(seen), COUNTED)
    gain = np.concatenate([gains(np.arange(len(seen))[at : at + COUNTED]) for at in starts])
    ids: list[int] = []
    while len(ids) < min(budget, len(seen)):
        # No gain grows as images are chosen, so that only the greatest must be counted again.
        counted = np.zeros(len(seen), bool)
        while not counted[best := int(gain.argmax())]:
            top = np.argpartition(-gain, min(COUNTED, len(seen)) - 1)[:COUNTED]
            top = top[~counted[top] & np.isfinite(gain[top])]
            if best not in top:  # of more than that are as great
                top = np.append(top, best)
            gain[top], counted[top] = gains(top), True
        ids.append(best)
        gain[best] = -np.inf
        np.maximum(covered, kernel(seen[best]), out=covered)
    return order[np.concatenate([np.array(ids, np.int64), np.arange(len(seen), budget)])]


def k_means(features: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """The cluster of each row, i64[n]."""
    from sklearn.cluster import KMeans, MiniBatchKMeans  # 1 s

    seed = int(rng.integers(2**31))
    if clusters <= LLOYD:
        return KMeans(clusters, n_init=10, random_state=seed).fit_predict(features).astype(np.int64)
    quick = MiniBatchKMeans(clusters, batch_size=BATCH, n_init=3, random_state=seed)
    return quick.fit_predict(features).astype(np.int64)


def _typical(rows: np.ndarray, count: int) -> np.ndarray:
    """The `count` most typical rows in turn, each without those before it, i64[count]."""
    distance = np.empty(len(rows))  # the mean one to a row's neighbours
    farthest = np.empty(len(rows), np.float32)  # the similarity of the last of them
    gone = np.zeros(len(rows), bool)
    taken: list[int] = []
    neighbours = -1
    while len(taken) < count:
        now = min(NEIGHBOURS, (len(rows) - len(taken)) // 2)
        # Only the neighbours of the last one have other neighbours, unless their number changes.
        changed = ~gone
        if now == neighbours:
            changed &= rows @ rows[taken[-1]] >= farthest - ROUNDING
        stale, neighbours = np.flatnonzero(changed), now
        for at in range(0, len(stale), CHUNK):
            some = stale[at : at + CHUNK]
            distance[some], farthest[some] = _to_neighbours(rows, some, gone, neighbours)
        taken.append(int(np.where(gone, np.inf, distance).argmin()))
        gone[taken[-1]] = True
    return np.array(taken, np.int64)


def _to_neighbours(
    rows: np.ndarray, some: np.ndarray, gone: np.ndarray, neighbours: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of some rows the mean Euclidean distance to their nearest others that are not gone, f64[m],
    and the similarity of the last of these, f32[m]."""
    if neighbours == 0:
        return np.zeros(len(some)), np.full(len(some), np.inf, np.float32)
    similarity = rows[some] @ rows.T
    similarity[:, gone] = -np.inf
    similarity[np.arange(len(some)), some] = -np.inf  # a row is not its own neighbour
    best = -np.partition(-similarity, neighbours - 1, axis=1)[:, :neighbours]
    return np.sqrt(np.maximum(2 - 2 * best, 0)).mean(1, dtype=np.float64), best[:, -1]


def _radius(rows: np.ndarray, clusters: np.ndarray) -> float:
    """The least similarity at which 95 % of the balls hold rows of one cluster only."""
    # Similarity to the most similar row of another cluster.
    stranger = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), CHUNK):
        similarity = rows[start : start + CHUNK] @ rows.T
        similarity[clusters[start : start + CHUNK, None] == clusters] = -np.inf
        stranger[start : start + CHUNK] = similarity.max(1)
    # One step of the similarities' own numbers: a float64's would be rounded away beside them.
    quantile = np.sort(stranger)[int(np.ceil(PURITY * len(rows))) - 1]
    return max(float(np.nextafter(quantile, np.float32(2))), -1.0)


# A smaller budget's choice begins a larger one's, which therefore serves all.
NESTED = ("maxherding",)
BY_FEATURES: dict[str, Choice] = {
    "balanced": balanced,
    "kcenter": kcenter,
    "typiclust": typiclust,
    "probcover": probcover,
    "maxherding": maxherding,
}
