"""Which images to ask about, by features that cost neither labels nor queries.

Each way is a pure function (features f32[n, D], budget, rng, classes) -> i64[budget], distinct
numbers of images. Features have unit rows, so that nearness is the cosine's. `classes` is the
target's number of them. The same generator gives the same choice.
"""

from collections.abc import Callable

import numpy as np

from qmx.selection.orders import rank_within

Choice = Callable[[np.ndarray, int, np.random.Generator, int], np.ndarray]

# avihu111/TypiClust, typiclust.py, with the paper (Hacohen et al. 2022, section 3.2).
MAX_CLUSTERS = 500
NEIGHBOURS = 20
SMALL_CLUSTER = 5
LLOYD = 50  # up to so many clusters by Lloyd's algorithm, more by its mini-batch form
BATCH = 5000  # images in a mini-batch

PURITY = 0.95  # of ProbCover's balls: Yehuda et al. 2022, section 4.2
SAMPLE = 5000  # images on which the radius of the balls is chosen
CHUNK = 1024  # rows of a block of similarities, which bounds the memory


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1; f32[n, D] -> f32[n, D]. A row of zeros stays."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def balanced(
    features: np.ndarray, budget: int, rng: np.random.Generator, classes: int = 0
) -> np.ndarray:
    """Equal shares of k-means clusters, as many as the budget up to 500; within each at random.

    Cost: that of k-means, n D k for each of its passes.
    """
    clusters = k_means(features, min(budget, MAX_CLUSTERS), rng)
    order = rng.permutation(len(features))
    rank = np.empty(len(features), np.int64)
    rank[order] = rank_within(clusters[order])
    return np.lexsort((clusters, rank))[:budget]


def typiclust(
    features: np.ndarray, budget: int, rng: np.random.Generator, classes: int = 0
) -> np.ndarray:
    """The densest point of each of as many k-means clusters as the budget; above 500 the next
    densest in turn.

    Hacohen et al. 2022, *Active Learning on a Budget*: typicality is the inverse of the mean
    distance to the 20 nearest neighbours within the cluster, or to half of a smaller cluster;
    larger clusters come first, and those of 5 and fewer only when the others have nothing left.
    Other than in avihu111/TypiClust, a cluster's typicalities are not computed anew after each
    point that was taken from it.

    Cost: that of k-means, and n D times the size of a cluster.
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
    """Farthest first: each image the least like those before it, the first one at random.

    Gonzalez 1985; Sener and Savarese 2018, *A Core-Set Approach*, algorithm 1. A smaller budget's
    choice begins a larger one's.

    Cost: n D for each image of the budget, and n numbers of memory.
    """
    ids = np.empty(budget, np.int64)
    # Similarity to the most similar chosen one.
    nearest = np.full(len(features), -np.inf, np.float32)
    for place in range(budget):
        ids[place] = rng.integers(len(features)) if place == 0 else nearest.argmin()
        np.maximum(nearest, features @ features[ids[place]], out=nearest)
        nearest[ids[: place + 1]] = np.inf
    return ids


def probcover(
    features: np.ndarray, budget: int, rng: np.random.Generator, classes: int
) -> np.ndarray:
    """Greedy covering by balls: each image the one whose ball holds most images that no ball holds
    yet.

    Yehuda et al. 2022, *Active Learning Through a Covering Lens*, algorithm 1. The radius is the
    largest whose balls are pure in 95 % of the cases, by k-means with as many clusters as there are
    classes (section 4.2). Once all is covered the rest is drawn at random. A smaller budget's
    choice begins a larger one's, as far as neither is drawn.

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
        # Itself.
        similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))] = -np.inf
        best = -np.partition(-similarity, neighbours - 1, axis=1)[:, :neighbours]
        found.append(np.sqrt(np.maximum(2 - 2 * best, 0)).mean(1, dtype=np.float64))
    return np.concatenate(found)


def _radius(rows: np.ndarray, clusters: np.ndarray) -> float:
    """The least similarity down to which the balls of 95 % of the rows hold rows of their own
    cluster alone."""
    stranger = np.empty(len(rows))  # each row's most similar one of another cluster
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
