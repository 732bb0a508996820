"""Propagation of scores to the other images: no query, no training, a closed form."""

from typing import Any

import numpy as np

from qmx.metrics import nearest

TOLERANCE, ITERATIONS = 1e-6, 100  # of the conjugate gradients
FLOOR = 1e-6  # below a propagated score, so that a head can name a class of which nothing came


def propagate(
    features: np.ndarray,
    ids: np.ndarray,
    probabilities: np.ndarray,
    *,
    neighbours: int = 50,
    power: float = 3.0,
    alpha: float = 0.99,
    temperature: float = 1.0,
) -> np.ndarray:
    """Label propagation over the graph of nearest neighbours.

    Z = (I - alpha S)^-1 Y. S is the symmetric, normalised adjacency with weights
    max(cosine, 0)^power between each image and its nearest ones. Y are the answers, each class
    divided by its number of answers, so that a frequent class does not flood its neighbours. The
    number of a class is the sum of its probabilities, and at least one.

    Source: Zhou et al. 2004, *Learning with Local and Global Consistency*. The graph and the
    defaults are those of Iscen et al. 2019, *Label Propagation for Deep Semi-supervised Learning*,
    section 3. The division is that of their code, whose answers are labels (ahmetius/LP-DeepSSL,
    lp/db_semisuper.py).

    Args:
      features: f32[n, D], unit rows, of the whole pool.
      ids: i64[m], the images that were asked about.
      probabilities: f32[m, N], their answers.
      neighbours: k; all others if there are fewer.
      temperature: what the logarithms of the propagated scores are divided by; below 1 they come
        nearer to the labels that Iscen et al. make of them.

    Returns:
      f32[n, N], probabilities: the answers for `ids`, the propagated scores for the others, uniform
      for images that nothing reached.
    """
    if len(ids) != len(probabilities) or not probabilities.min() >= 0:
        raise ValueError(
            f"there are {len(ids)} ids and answers {list(probabilities.shape)} from"
            f" {probabilities.min():g} on; give a row of probabilities for each"
        )
    graph = graph_of(features, neighbours, power)
    return spread(graph, ids, probabilities, alpha, temperature)


def graph_of(features: np.ndarray, neighbours: int, power: float) -> Any:
    """S of `propagate`, sparse f64[n, n]: what takes the time, and depends on no answer."""
    from scipy.sparse import coo_array, diags_array

    size, k = len(features), min(neighbours, len(features) - 1)
    near, found = (np.concatenate(x) for x in zip(*nearest(features, features, k + 1), strict=True))
    rows = np.repeat(np.arange(size), k + 1)
    # An image is not its own neighbour.
    weights = np.where(
        found.ravel() == rows, 0, np.maximum(near.ravel().astype(np.float64), 0) ** power
    )
    graph = coo_array((weights, (rows, found.ravel())), (size, size)).tocsr()
    graph = graph + graph.T
    inverse_root = diags_array(1 / np.sqrt(np.maximum(graph.sum(1), 1e-12)))
    return inverse_root @ graph @ inverse_root


def spread(
    graph: Any, ids: np.ndarray, probabilities: np.ndarray, alpha: float, temperature: float
) -> np.ndarray:
    """`propagate` over the graph of `graph_of`."""
    from scipy.sparse import eye_array
    from scipy.sparse.linalg import cg

    size = graph.shape[0]
    system = eye_array(size) - alpha * graph
    answers = np.zeros((size, probabilities.shape[1]))
    answers[ids] = probabilities / np.maximum(probabilities.sum(0), 1)
    solved = [cg(system, column, rtol=TOLERANCE, maxiter=ITERATIONS)[0] for column in answers.T]
    reached = np.maximum(np.stack(solved, 1), 0)
    largest = np.maximum(reached.max(1, keepdims=True), 1e-300)
    reached = np.where(largest > 1e-12, (reached / largest) ** (1 / temperature), 0)
    total = reached.sum(1, keepdims=True)
    scores = np.where(total > 0, reached / np.maximum(total, 1), 1 / reached.shape[1])
    scores[ids] = probabilities
    return scores.astype(np.float32)


def with_head(scores: np.ndarray, ids: np.ndarray, told: np.ndarray, power: float) -> np.ndarray:
    """Propagated scores times what a head tells: two views of the same features that err on
    different images, for a line separates classes and a graph follows dense places.

    Args:
      scores: f32[n, N], of `propagate`.
      ids: i64[m], the images that were asked about; their scores stay.
      told: f32[n, N], logits of a head that was fitted to the answers (`qmx.heads`).
      power: of the head's probabilities, p_i ~ s_i q_i^power.

    Returns:
      f32[n, N], probabilities.
    """
    from scipy.special import log_softmax, softmax

    both = softmax(np.log(scores + FLOOR) + power * log_softmax(told, axis=1), axis=1)
    both[ids] = scores[ids]
    return both.astype(np.float32)
