"""Choosing what to ask by features: against plain loops, and on blobs whose answer is plain to
see."""

import numpy as np
import pytest

from qmx.selection import by_features
from qmx.selection.by_features import (
    BY_FEATURES,
    NESTED,
    _radius,
    balanced,
    k_means,
    kcenter,
    maxherding,
    probcover,
    typiclust,
    unit,
)
from qmx.stages.select import _chosen


def blobs(count=4, size=30, spread=0.05, seed=0, dimension=8):
    """Unit rows around `count` orthogonal directions, and the blob of each."""
    rng = np.random.default_rng(seed)
    centres = np.eye(dimension)[:count]
    of = np.repeat(np.arange(count), size)
    return (
        unit((centres[of] + spread * rng.normal(size=(len(of), dimension))).astype(np.float32)),
        of,
    )


def chosen(way, features, budget, seed=0):
    return BY_FEATURES[way](features, budget, np.random.default_rng(seed), 4)


@pytest.mark.parametrize("way", BY_FEATURES)
@pytest.mark.parametrize("budget", [1, 4, 57, 120])
def test_any_budget(way, budget):
    """As many as asked for, each once, and the same each time, up to the whole pool."""
    features, _ = blobs()
    ids = chosen(way, features, budget)
    assert ids.dtype == np.int64 and len(ids) == budget == len(set(ids.tolist()))
    assert ids.min() >= 0 and ids.max() < len(features)
    np.testing.assert_array_equal(ids, chosen(way, features, budget))


@pytest.mark.parametrize("way", BY_FEATURES)
def test_one_of_each(way):
    """Four blobs, four queries: each blob once. At random that happens in one draw of ten."""
    features, of = blobs()
    for seed in range(5):
        assert sorted(of[chosen(way, features, 4, seed)]) == [0, 1, 2, 3], seed


def test_balanced_shares():
    """Where the blobs are of unequal size, each is asked about once; and clusters share equally, up
    to one."""
    features, of = blobs()
    kept = np.concatenate([np.flatnonzero(of == blob)[: 6 + 8 * blob] for blob in range(4)])
    clusters = k_means(features[kept], 4, np.random.default_rng(0))
    ids = balanced(features[kept], 4, np.random.default_rng(0))
    assert sorted(clusters[ids]) == [0, 1, 2, 3]
    many = balanced(features, 60, np.random.default_rng(1))
    _, counts = np.unique(k_means(features, 60, np.random.default_rng(1))[many], return_counts=True)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("clusters, budget", [(4, 4), (4, 50), (7, 120)])
def test_typiclust_against_a_loop(monkeypatch, clusters, budget):
    """In each cluster the next one has the least mean distance to its 20 nearest of those that are
    left, or to half of them, by a plain loop."""
    monkeypatch.setattr(by_features, "MAX_CLUSTERS", clusters)
    features, _ = blobs(spread=0.2, size=60)
    of = k_means(features, clusters, np.random.default_rng(0))
    left = np.ones(len(features), bool)
    for i in typiclust(features, budget, np.random.default_rng(0)):
        members = np.flatnonzero((of == of[i]) & left)
        distances = np.linalg.norm(features[members][:, None] - features[members], axis=-1)
        nearest = np.sort(distances, axis=1)[:, 1 : min(20, len(members) // 2) + 1]
        mean = nearest.sum(1) / max(nearest.shape[1], 1)
        np.testing.assert_allclose(mean[members == i], mean.min(), rtol=1e-5)
        left[i] = False


def test_typiclust_leaves_outliers():
    """Clusters of five images and fewer are asked about last."""
    features, _ = blobs(count=3)
    outliers = unit(np.eye(8, dtype=np.float32)[[6, 6, 7, 7]] + np.float32(0.01))
    ids = typiclust(np.concatenate([features, outliers]), 5, np.random.default_rng(0))
    assert ids[:3].max() < 90


def test_kcenter_against_a_loop():
    """Each image is the farthest from those before it, and a smaller budget's choice begins a
    larger one's."""
    features, _ = blobs(spread=0.3)
    ids = kcenter(features, 40, np.random.default_rng(3))
    for place in range(1, 40):
        distance = np.linalg.norm(features[:, None] - features[ids[:place]], axis=-1).min(1)
        np.testing.assert_allclose(distance[ids[place]], distance.max(), rtol=1e-4)
    np.testing.assert_array_equal(kcenter(features, 7, np.random.default_rng(3)), ids[:7])


def test_probcover_covers():
    """Each image's ball adds at least as many images as any other's would, with the radius that the
    choice implies."""
    features, of = blobs(spread=0.02)
    ids = probcover(features, 4, np.random.default_rng(0), 4)
    similarity = features @ features.T
    stranger = np.where(of[:, None] == of, -1, similarity).max(1)
    inside = similarity > np.quantile(stranger, 0.95)
    covered = np.zeros(len(features), bool)
    for i in ids:
        gain = (inside & ~covered).sum(1)
        assert gain[i] == gain.max()
        covered |= inside[i]
    assert covered.all()


@pytest.mark.parametrize("size", [20, 100, 1000])
def test_balls_of_probcover_are_pure(size):
    """At least 95 % of them hold images of one cluster, with the rounding of the similarities."""
    rng = np.random.default_rng(size)
    rows, of = unit(rng.normal(size=(size, 6)).astype(np.float32)), rng.integers(3, size=size)
    similarity, radius = rows @ rows.T, _radius(rows, of)
    stranger = np.where(of[:, None] == of, -2, similarity).max(1)
    assert 0.95 <= (stranger < radius).mean() < 0.95 + 1 / size + 1e-9


def test_maxherding_against_a_loop():
    """Each image raises most the mean of the kernels to the nearest chosen one, by scikit-learn's
    kernel and every gain counted anew; and a smaller budget's choice begins a larger one's."""
    from sklearn.metrics.pairwise import rbf_kernel

    features, _ = blobs(spread=0.3)
    ids = maxherding(features, 60, np.random.default_rng(3))
    kernel = rbf_kernel(features.astype(np.float64), gamma=1.0)
    covered = np.zeros(len(features))
    for place, i in enumerate(ids):
        gain = np.maximum(kernel - covered, 0).sum(1)
        gain[ids[:place]] = -1
        np.testing.assert_allclose(gain[i], gain.max(), rtol=1e-5)
        covered = np.maximum(covered, kernel[i])
    np.testing.assert_array_equal(maxherding(features, 7, np.random.default_rng(3)), ids[:7])


@pytest.mark.parametrize("equal", [300, 1000])  # 128 gains are counted at a time
def test_maxherding_of_equal_images(equal):
    """Blank photos, or an encoder that says the same of all."""
    features = unit(np.random.default_rng(0).normal(size=(1000, 4))).astype(np.float32)
    features[:equal] = features[0]
    ids = maxherding(features, 200, np.random.default_rng(0))
    assert len(set(ids)) == 200
    assert (ids < equal).sum() == (1 if equal < 1000 else 200)


def test_maxherding_of_many(monkeypatch):
    """Of a larger pool it looks at some, which the seed draws; the rest of a budget is random."""
    monkeypatch.setattr(by_features, "HERD", 30)
    features, _ = blobs(spread=0.3)
    ids = maxherding(features, 50, np.random.default_rng(0))
    seen = np.random.default_rng(0).permutation(len(features))
    assert set(ids[:30]) == set(seen[:30])
    np.testing.assert_array_equal(ids[30:], seen[30:50])
    assert set(ids[:10]) != set(maxherding(features, 10, np.random.default_rng(1)))


def test_duplicates():
    """The same image many times over: other images are chosen as long as there are such, and never
    one twice."""
    features = np.concatenate([np.tile(blobs(1, 1)[0], (50, 1)), blobs(4, 5)[0]])
    for way in BY_FEATURES:
        ids = chosen(way, features, 60)
        assert len(set(ids.tolist())) == 60, way


def test_typiclust_takes_large_clusters_first(monkeypatch):
    """The cluster with the fewest images so far, of those the largest; small ones come last. As
    the reference, by a plain loop over the clusters, also when the budget goes round several times.
    """
    monkeypatch.setattr(by_features, "MAX_CLUSTERS", 5)
    features, of = blobs(count=5, size=40)
    features = np.concatenate(
        [features[of == blob][:size] for blob, size in enumerate((12, 40, 4, 31, 20))]
    )
    clusters = k_means(features, 5, np.random.default_rng(2))
    sizes = np.bincount(clusters)
    assert sorted(sizes) == [4, 12, 20, 31, 40]
    ids = typiclust(features, 20, np.random.default_rng(2))
    taken = np.zeros(5, int)
    for number in clusters[ids]:
        best = min(range(5), key=lambda c: (sizes[c] <= 5, taken[c], -sizes[c]))
        assert number == best, (number, best, taken)
        taken[number] += 1
    assert sizes[clusters[ids[:4]]].tolist() == [40, 31, 20, 12]


@pytest.mark.parametrize("way", NESTED)
def test_one_choice_serves_smaller_budgets(way, tmp_path):
    """It is made once for the largest budget: a smaller one's begins it."""
    features, _ = blobs(spread=0.3)
    np.save(tmp_path / "features.npy", features)
    made_of = tmp_path / "features.npy", "a digest", None, 0.0, way
    whole, half = (_chosen(*made_of, budget, 3, 4) for budget in (60, 30))
    np.testing.assert_array_equal(whole[:30], half)
    assert len({*whole.tolist()}) == 60
