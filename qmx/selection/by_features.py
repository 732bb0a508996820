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
SAMPLE = 5000  # images on which the radius of the balls is chosen
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

    There are as many clusters as the budget, up to 500; a larger budget takes the next most typical
    points in turn. Hacohen et al. 2022, *Active Learning on a Budget*: typicality is the inverse of
    the mean distance to the 20 nearest neighbours in the cluster, or to half of the cluster if that
    is fewer. Larger clusters come first; those of 5 points or fewer come when the others are used
    up. Unlike avihu111/TypiClust, this does not compute typicalities again after each point taken.

    Cost: k-means, and n D times the size of a cluster.
    """
    clusters = k_means(features, min(budget, MAX_CLUSTERS), rng)
    distance = np.empty(len(features))
    for cluster in np.unique(clusters):
        members = np.flatnonzero(clusters == cluster)
        distance[members] = _mean_distance(features[members], min(NEIGHBOURS, len(members) // 2))
    order = np.argsort(distance, kind="stable")
    rank = np.empty(len(features), np.int64)
    rank[order] = rank_within(clusters[order])
    size = np.bincount(clusters)[clusters]
    return np.lexsort((clusters, -size, rank, size <= SMALL_CLUSTER))[:budget]


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
    left = np.setdiff1d(np.arange(len(features)), ids)
    return np.concatenate([np.array(ids, np.int64), rng.permutation(left)[: budget - len(ids)]])


def k_means(features: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """The cluster of each row, i64[n]."""
    from sklearn.cluster import KMeans, MiniBatchKMeans  # 1 s

    seed = int(rng.integers(2**31))
    if clusters <= LLOYD:
        return KMeans(clusters, n_init=10, random_state=seed).fit_predict(features).astype(np.int64)
    quick = MiniBatchKMeans(clusters, batch_size=BATCH, n_init=3, random_state=seed)
    return quick.fit_predict(features).astype(np.int64)


def _mean_distance(rows: np.ndarray, neighbours: int) -> np.ndarray:
    """Mean Euclidean distance of each row to its nearest neighbours among the others, f64[m]."""
    if neighbours == 0:
        return np.zeros(len(rows))
    found = []
    for start in range(0, len(rows), CHUNK):
        similarity = rows[start : start + CHUNK] @ rows.T
        # A row is not its own neighbour.
        similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))] = -np.inf
        best = -np.partition(-similarity, neighbours - 1, axis=1)[:, :neighbours]
        found.append(np.sqrt(np.maximum(2 - 2 * best, 0)).mean(1, dtype=np.float64))
    return np.concatenate(found)


def _radius(rows: np.ndarray, clusters: np.ndarray) -> float:
    """The least similarity at which 95 % of the balls hold rows of one cluster only."""
    stranger = np.empty(len(rows))  # similarity to the most similar row of another cluster
    for start in range(0, len(rows), CHUNK):
        similarity = rows[start : start + CHUNK] @ rows.T
        similarity[clusters[start : start + CHUNK, None] == clusters] = -np.inf
        stranger[start : start + CHUNK] = similarity.max(1)
    return max(
        float(np.nextafter(np.sort(stranger)[int(np.ceil(PURITY * len(rows))) - 1], 2)), -1.0
    )


BY_FEATURES: dict[str, Choice] = {
    "balanced": balanced,
    "kcenter": kcenter,
    "typiclust": typiclust,
    "probcover": probcover,
}
