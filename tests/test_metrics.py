"""Accuracy, fidelity, divergence and nearest neighbours, against numpy, scipy, scikit-learn and
torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from qmx import heads, models
from qmx.augment import plain_view
from qmx.contract import Network, chain
from qmx.data import load
from qmx.inference import predict
from qmx.ledger import Ledger
from qmx.ledger.access import one_hot_logits
from qmx.metrics import (
    calibration_error,
    compare,
    fidelity_by_class,
    held_out,
    held_out_knn,
    knn,
    top_k,
)
from qmx.settings import base
from qmx.stages.measured import first_classes
from qmx.targets.query import network_query

B = 8  # divides over as many devices as a test machine simulates


@pytest.fixture(scope="module")
def classifier():
    """A small network with running statistics, and its variables."""
    net = chain(backbone=models.backbone("resnet8"), head=models.classifier(10))
    params, stats = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return net, params, jax.tree.map(lambda leaf: leaf + 0.3, stats)  # as if it had been trained


VIEW = plain_view((0.3,), (0.4,))
DIGITS = load(**base().data).evaluation.all()["image"]


def brightness_network():
    """Says of an image its mean, and 1 more for each batch that it took part in (never, in
    evaluation)."""

    def apply(params, stats, x, train, rng=None):
        return x.mean((1, 2, 3))[:, None] * params["w"] + stats["seen"], {
            "seen": stats["seen"] + train
        }

    return Network(lambda rng, x: ({"w": jnp.ones(3)}, {"seen": jnp.zeros(())}), apply)


def test_images_without_an_answer():
    """They would rank as class 0, and cost no divergence."""
    scores = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    answers = scores.copy()
    answers[2] = np.nan
    with pytest.raises(ValueError, match="no answer to 1 images; leave them out"):
        compare(scores, answers, None)
    with pytest.raises(ValueError, match="1 images have no answer; leave them out"):
        heads.fit(scores, answers)
    with pytest.raises(ValueError, match="there is no class -1"):
        one_hot_logits(np.array([0, -1]), 3)


def test_classes_that_come_in_turn():
    """The part of a pool that is held out has all of them."""
    labels = np.arange(1000) % 10
    assert held_out_knn(np.eye(10, dtype=np.float32)[labels], labels, 5, 0.1) == 100
    asking = held_out(1000)
    assert asking.sum() == 200 and np.bincount(labels[asking]).min() > 8
    assert held_out(1_300_000).sum() == 50_000


def test_ties_of_honest_users():
    """Of equal scores the lower class comes first, as in the list that a user reads; of a student's
    none counts."""
    scores, labels = np.float32([[0, 1, 1], [1, 1, 0], [0, 0, 0]]), np.array([1, 1, 2])
    assert first_classes(scores, labels, 1) == pytest.approx(100 / 3)
    assert first_classes(scores, labels, 2) == pytest.approx(200 / 3)
    assert top_k(scores, labels, 1) == 0


# predict


@pytest.mark.parametrize("size", [1, B - 1, B, B + 1, 2 * B - 1, 2 * B, 2 * B + 1, 5 * B + 3])
def test_every_image_is_scored_once_and_in_order(size):
    """Sizes around the batch size; the rows that pad the last batch are nobody's."""
    images = np.random.default_rng(size).integers(0, 256, (size, 4, 4, 1), np.uint8)
    net = brightness_network()
    scores = predict(net, *net.init(None, None), plain_view((0.0,), (1.0,)), images, B)
    assert (
        scores.shape == (size, 3) and scores.dtype == np.float32 and isinstance(scores, np.ndarray)
    )
    np.testing.assert_allclose(
        scores, np.repeat((images / 255).mean((1, 2, 3))[:, None], 3, 1), rtol=1e-5
    )


def test_each_batch_has_one_shape():
    """One shape is traced, however many images there are."""
    traced = []
    net = brightness_network()

    def apply(params, stats, x, train, rng=None):
        traced.append((x.shape, train))
        return net.apply(params, stats, x, train)

    counted = Network(net.init, apply)
    view = plain_view((0.0,), (1.0,))
    for size in (3, B, 2 * B + 1):
        predict(counted, *net.init(None, None), view, np.zeros((size, 4, 4, 1), np.uint8), B)
    assert traced == [((B, 4, 4, 1), False)]


def test_a_score_does_not_depend_on_its_neighbours(classifier):
    """Evaluation uses running statistics: the same for any batch size and order."""
    net, params, stats = classifier
    images = DIGITS[:37]
    whole = predict(net, params, stats, VIEW, images, 64)
    assert np.ptp(whole) > 0.1
    np.testing.assert_allclose(
        predict(net, params, stats, VIEW, images, B), whole, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        predict(net, params, stats, VIEW, images[::-1], 64)[::-1], whole, rtol=1e-4, atol=1e-5
    )


def test_evaluation_leaves_the_network_as_it_was(classifier):
    """Params and running statistics are bitwise the same, and still there."""
    net, params, stats = classifier
    before = [np.array(leaf).tobytes() for leaf in jax.tree.leaves((params, stats))]
    for _ in range(2):
        predict(net, params, stats, VIEW, DIGITS[:21], B)
    assert [np.array(leaf).tobytes() for leaf in jax.tree.leaves((params, stats))] == before
    _, moved = jax.jit(lambda x: net.apply(params, stats, x, True))(DIGITS[:B] / np.float32(255))
    assert any(np.array(leaf).tobytes() not in before for leaf in jax.tree.leaves(moved))


def test_a_network_answers_the_ledger_as_it_predicts(classifier, tmp_path):
    net, params, stats = classifier
    with Ledger(tmp_path / "ledger.sqlite", target="t") as ledger:
        answers = ledger.ask(network_query(net, params, stats, VIEW, B), DIGITS[:11], batch_size=5)
    np.testing.assert_allclose(
        answers, predict(net, params, stats, VIEW, DIGITS[:11], 16), rtol=1e-4, atol=1e-5
    )


# top_k


def brute_top_k(scores, classes, k):
    right = 0
    for row, own in zip(scores, classes, strict=True):
        as_high = [c for c in range(len(row)) if c != own and row[c] >= row[own]]
        right += len(as_high) < k
    return 100 * right / len(scores)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
@pytest.mark.parametrize("levels", [None, 4])
def test_top_k_of_random_scores(k, levels):
    """Against a loop, with many ties too; without ties it is scikit-learn's."""
    rng = np.random.default_rng(k)
    scores = (
        rng.standard_normal((500, 10)).astype(np.float32)
        if levels is None
        else rng.integers(0, 4, (500, 10))
    )
    classes = rng.integers(0, 10, 500)
    np.testing.assert_allclose(top_k(scores, classes, k), brute_top_k(scores, classes, k))
    if levels is None:
        expected = (
            100 * top_k_accuracy_score(classes, scores, k=k, labels=range(10)) if k < 10 else 100
        )
        np.testing.assert_allclose(top_k(scores, classes, k), expected)


@pytest.mark.parametrize("value", [0.0, -7.5, 1e30, np.inf, -np.inf])
def test_a_constant_score_wins_nothing(value):
    """A network that says the same of every class knows none of them; nor does one that is sure of
    all."""
    scores, classes = np.full((40, 10), value, np.float32), np.arange(40) % 10
    assert top_k(scores, classes, 1) == top_k(scores, classes, 5) == top_k(scores, classes, 9) == 0


def test_a_tie_ranks_behind():
    scores = np.array([[3, 3, 1, 0], [3, 2, 2, 0], [3, 2, 2, 0]], np.float32)
    classes = np.array([0, 1, 0])
    np.testing.assert_allclose(
        [top_k(scores, classes, k) for k in (1, 2, 3)], [100 / 3, 200 / 3, 100]
    )


@pytest.mark.parametrize("where", ["own", "another", "all"])
@pytest.mark.parametrize("k", [1, 5])
def test_nan_is_never_right(where, k):
    """A network that diverged must not look good: its NaN is refused, or counts as wrong."""
    scores, classes = np.tile(np.arange(10, dtype=np.float32), (4, 1)), np.zeros(4, int)
    scores[:, {"own": [0], "another": list(range(1, 10)), "all": list(range(10))}[where]] = np.nan
    try:
        assert top_k(scores, classes, k) == 0
    except ValueError as error:
        assert "NaN" in str(error)


# compare


def random_pair(n, classes, seed, scale=2.0):
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal((n, classes))).astype(np.float32) for _ in range(2)]


def test_kl_has_its_analytic_value_and_direction():
    """KL(target || student), with target (1/2, 1/2) and student (3/4, 1/4): ln(4/3) / 2."""
    half, quarter = (
        np.log(np.array([[0.5, 0.5]], np.float32)),
        np.log(np.array([[0.75, 0.25]], np.float32)),
    )
    label = np.array([0])
    np.testing.assert_allclose(
        compare(quarter, half, label)["kl_target_student"], np.log(4 / 3) / 2, rtol=1e-6
    )
    other = 0.75 * np.log(1.5) - 0.25 * np.log(2)
    np.testing.assert_allclose(compare(half, quarter, label)["kl_target_student"], other, rtol=1e-6)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_kl_of_random_scores(classes):
    """Scipy's and torch's mean over rows; constants added to a row of logits change
    nothing."""
    student, target = random_pair(64, classes, classes)
    target += np.arange(64, dtype=np.float32)[:, None] / 8
    labels = np.zeros(64, int)
    found = compare(student, target, labels)["kl_target_student"]
    p, q = (softmax(x.astype(np.float64), axis=1) for x in (target, student))
    np.testing.assert_allclose(found, rel_entr(p, q).sum(1).mean(), rtol=1e-4)
    s, t = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), 1) for x in (student, target))
    theirs = torch.nn.functional.kl_div(s, t, log_target=True, reduction="batchmean")
    np.testing.assert_allclose(found, float(theirs), rtol=1e-4)
    np.testing.assert_allclose(compare(target, target, labels)["kl_target_student"], 0, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_kl_to_a_target_that_shows_labels_alone():
    """-log of what the student gives the shown class, and finite; no warning either."""
    student, _ = random_pair(64, 10, 0)
    shown = np.arange(64) % 10
    found = compare(student, one_hot_logits(shown, 10), shown)
    expected = -log_softmax(student.astype(np.float64), axis=1)[np.arange(64), shown].mean()
    np.testing.assert_allclose(found["kl_target_student"], expected, rtol=1e-5)
    assert found["fidelity_top1"] == found["top1"] and found["fidelity_top5"] == found["top5"]


@pytest.mark.filterwarnings("error")
def test_kl_of_extreme_scores_is_no_nan():
    target = np.array([[1e4, 0, -1e4], [0, 0, 0]], np.float32)
    student = np.array([[-1e4, 0, 1e4], [1e30, -1e30, 0]], np.float32)
    for one, two in ((student, target), (target, student)):
        assert compare(one, two, np.zeros(2, int))["kl_target_student"] > 1e4
    np.testing.assert_allclose(
        compare(target, target, np.zeros(2, int))["kl_target_student"], 0, atol=1e-6
    )


def test_accuracy_and_fidelity_of_random_scores():
    """Against loops: labels for accuracy, the target's first class for fidelity, the student's five
    for top-5."""
    student, target = random_pair(400, 10, 1)
    student[:150] = target[:150] + 0.3 * student[:150]
    labels = np.random.default_rng(2).integers(0, 10, 400)
    found = compare(student, target, labels)
    assert set(found) == {"top1", "top5", "fidelity_top1", "fidelity_top5", "kl_target_student"}
    np.testing.assert_allclose(found["top1"], 100 * (student.argmax(1) == labels).mean())
    np.testing.assert_allclose(
        found["fidelity_top1"], 100 * (student.argmax(1) == target.argmax(1)).mean()
    )
    five = np.argsort(-student, axis=1)[:, :5]
    np.testing.assert_allclose(
        found["top5"], 100 * np.mean([y in row for y, row in zip(labels, five, strict=True)])
    )
    np.testing.assert_allclose(
        found["fidelity_top5"],
        100 * np.mean([y in row for y, row in zip(target.argmax(1), five, strict=True)]),
    )
    assert all(isinstance(value, float) for value in found.values())


def test_a_perfect_copy_has_full_fidelity_whatever_its_accuracy():
    _, target = random_pair(50, 10, 3)
    found = compare(3 * target - 1, target, (target.argmax(1) + 1) % 10)
    assert (found["top1"], found["fidelity_top1"], found["fidelity_top5"]) == (0, 100, 100)


@pytest.mark.parametrize("seed", range(40))
def test_fidelity_is_within_its_bounds(seed):
    """max(0, a_s + a_t - 1) <= fidelity <= 1 - |a_t - a_s|, on pairs of all degrees of skill and
    likeness."""
    rng = np.random.default_rng(seed)
    n, classes = rng.integers(1, 300), rng.integers(2, 12)
    labels = rng.integers(0, classes, n)
    skill = np.eye(classes)[labels]
    student, target = (
        rng.uniform(0, 4) * skill + rng.standard_normal((n, classes)) for _ in range(2)
    )
    student = student + rng.uniform(0, 3) * target
    found = compare(student.astype(np.float32), target.astype(np.float32), labels)
    a_s, a_t, fidelity = (
        found["top1"],
        top_k(target.astype(np.float32), labels, 1),
        found["fidelity_top1"],
    )
    assert max(0, a_s + a_t - 100) - 1e-9 <= fidelity <= 100 - abs(a_t - a_s) + 1e-9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diverged_student_is_not_compared(bad):
    student, target = random_pair(20, 10, 4)
    student[3, 4] = bad
    with pytest.raises(ValueError, match="not finite for 1 images"):
        compare(student, target, np.zeros(20, int))


# knn


def features(seed=0, n=60, m=25, d=8, classes=5):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, d))
    bank_labels, labels = rng.integers(0, classes, n), rng.integers(0, classes, m)
    bank_labels[:classes] = np.arange(classes)
    lengths = rng.uniform(0.01, 100, (n + m, 1))
    x = lengths * (
        centres[np.concatenate([bank_labels, labels])] + 1.2 * rng.standard_normal((n + m, d))
    )
    return x[:n].astype(np.float32), bank_labels.astype(np.int32), x[n:].astype(np.float32)


def brute_knn(bank, bank_labels, queries, k, temperature):
    """The definition, in loops and float64; the weights relative to the nearest, so that nothing
    overflows."""
    found = []
    for query in queries.astype(np.float64):
        lengths = [
            max(np.linalg.norm(query) * np.linalg.norm(b), 1e-12) for b in bank.astype(np.float64)
        ]
        similarity = [
            query @ b / length for b, length in zip(bank.astype(np.float64), lengths, strict=True)
        ]
        nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
        votes = np.zeros(bank_labels.max() + 1)
        for i in nearest:
            votes[bank_labels[i]] += np.exp((similarity[i] - similarity[nearest[0]]) / temperature)
        found.append(votes.argmax())
    return np.array(found)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 60, 61, 200])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.1, 1.0, 100.0])
def test_knn_is_the_brute_force_one(k, temperature):
    """Cosine, exp(s / T), k up to the whole bank and beyond it; features of any length."""
    bank, labels, queries = features()
    found = knn(bank, labels, queries, k, temperature)
    assert found.dtype == np.int32 and found.shape == (25,)
    np.testing.assert_array_equal(found, brute_knn(bank, labels, queries, k, temperature))


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 0.005])
@pytest.mark.filterwarnings("error")
def test_knn_at_a_low_temperature(temperature):
    """Exp(1 / 0.005) is more than float32 holds. All features lie close together, as early in
    a training."""
    bank, labels, queries = features(1)
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) + 2 for x in (bank, queries))
    np.testing.assert_array_equal(
        knn(bank, labels, queries, 20, temperature),
        brute_knn(bank, labels, queries, 20, temperature),
    )


@pytest.mark.parametrize("k", [1, 3, 7, 20])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_knn_is_scikit_learns(k, temperature):
    """KNeighborsClassifier with the cosine metric; weighted, and unweighted at a high
    temperature."""
    bank, labels, queries = features(2, n=200, m=100)
    theirs = KNeighborsClassifier(
        k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature)
    )
    np.testing.assert_array_equal(
        knn(bank, labels, queries, k, temperature), theirs.fit(bank, labels).predict(queries)
    )

    uniform = KNeighborsClassifier(k, metric="cosine").fit(bank, labels)
    shares = np.sort(uniform.predict_proba(queries), axis=1)
    # An equal number of votes has no uniform answer.
    clear = shares[:, -1] - shares[:, -2] > 0.5 / k
    assert clear.sum() > 50
    np.testing.assert_array_equal(
        knn(bank, labels, queries, k, 1e4)[clear], uniform.predict(queries)[clear]
    )


def test_knn_in_several_chunks():
    """More queries than are compared at a time."""
    bank, labels, queries = features(3, n=50, m=2500)
    whole = knn(bank, labels, queries, 5)
    assert whole.shape == (2500,)
    parts = np.concatenate(
        [knn(bank, labels, queries[i : i + 100], 5) for i in range(0, 2500, 100)]
    )
    np.testing.assert_array_equal(whole, parts)


def test_a_feature_of_zeros_breaks_nothing():
    """As a neighbour it is at right angles to everything; as a query it gets some class."""
    bank, labels, queries = features(4)
    queries[3], bank[7] = 0, 0
    found = knn(bank, labels, queries, 5)
    assert found[3] in range(5)
    np.testing.assert_array_equal(
        np.delete(found, 3), np.delete(brute_knn(bank, labels, queries, 5, 0.1), 3)
    )


def test_the_monitor_asks_every_fifth_example_about_the_others():
    """No example is its own neighbour; against scikit-learn."""
    x, labels, _ = features(5, n=203)
    held_out = np.arange(203) % 5 == 0
    theirs = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1))
    theirs.fit(x[~held_out], labels[~held_out])
    np.testing.assert_allclose(
        held_out_knn(x, labels, 7, 0.1), 100 * theirs.score(x[held_out], labels[held_out])
    )

    noise = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32)
    assert held_out_knn(noise, np.arange(1000) % 10, 1, 0.1) < 25  # 100, were it its own


def test_calibration_error():
    """By hand in two bins, and bin by bin in a plain loop; bins are closed above."""
    probs = np.array([[0.9, 0.1], [0.95, 0.05], [0.4, 0.6], [0.35, 0.65]])
    # |1/2 - 0.925| of two images, |1 - 0.625| of the others.
    assert calibration_error(probs, np.array([0, 1, 1, 1]), bins=5) == pytest.approx(40.0)
    rng = np.random.default_rng(0)
    probs, labels = softmax(rng.normal(size=(300, 4)), axis=1), rng.integers(0, 4, 300)
    probs[:2] = np.eye(4)[:2]
    want = 0.0
    for k in range(15):
        inside = [p for p in range(300) if k / 15 < probs[p].max() <= (k + 1) / 15]
        right = sum(probs[p].argmax() == labels[p] for p in inside)
        want += abs(right - sum(probs[p].max() for p in inside)) / 300
    assert calibration_error(probs, labels) == pytest.approx(100 * want)


def test_fidelity_by_class():
    """Of each class that the target names, against a loop; a class that it never names has none."""
    student, target = np.random.default_rng(0).integers(0, 4, (2, 200))
    shares = fidelity_by_class(student, target, 5)
    for k in range(4):
        assert shares[k] == pytest.approx(100 * (student[target == k] == k).mean())
    assert shares[4] is None
