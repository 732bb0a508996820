"""Heads on features that stay as they are: a student in seconds.

A linear layer, or two with a ReLU between them, by logistic regression on soft answers: the mean
cross-entropy from the target's softmax, and a decay of the weights, to the minimum by L-BFGS. The
decay and the temperature are those with which parts of the answers are told best by the others.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qmx.contract import PyTree

ITERATIONS = 100  # of L-BFGS, each a pass or two over the answers
CHOOSING = 30  # of them, from the last decay's minimum on, where a decay is only looked at
# What held-out scores are multiplied by, whichever is best, so that a decay is judged by what it
# tells and not by how sure it is. With few answers only the strongest is unsure enough, and tells
# the most frequent class alone. Labels of 20 garments: heads so chosen are right ten points more.
SCALES = 2.0 ** np.arange(-5, 3)
FEW = 10  # answers with which nothing is chosen: the middle decay and the first temperature


class Head(NamedTuple):
    """A head as it was fitted."""

    params: PyTree  # "fc", or "fc_0" and "fc": {"kernel", "bias"}, on the features as they are
    decay: float
    temperature: float
    # Cross-entropy from the target's answers to held-out ones, in nats, at the best of `SCALES`;
    # NaN if nothing was chosen.
    held_out: float


def spread(features: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean of features f32[n, D] and the root of their mean squared distance from it."""
    block = 65536  # rows in memory, of a file that is mapped
    starts = range(0, len(features), block)
    mean = sum(features[i : i + block].sum(0, dtype=np.float64) for i in starts) / len(features)
    squares = sum(
        np.square(features[i : i + block].astype(np.float64) - mean).sum() for i in starts
    )
    return mean, max(float(np.sqrt(squares / len(features))), 1e-12)


def forward(params: PyTree, features: Any) -> jax.Array:
    """f32[n, D] -> logits f32[n, N]."""
    x = features
    if "fc_0" in params:
        x = jax.nn.relu(_dense(params["fc_0"], x))
    return _dense(params["fc"], x)


def _dense(layer: PyTree, x: jax.Array) -> jax.Array:
    return jnp.matmul(x, layer["kernel"], precision="highest") + layer["bias"]


def _tree(flat: Any, sizes: tuple[int, ...]) -> PyTree:
    """A head of layers of these sizes (D, N, or D, hidden, N) from one vector."""
    layers, at = {}, 0
    for name, n, m in zip(("fc_0", "fc")[3 - len(sizes) :], sizes, sizes[1:], strict=False):
        kernel, bias = flat[at : at + n * m].reshape(n, m), flat[at + n * m : at + n * m + m]
        layers[name], at = {"kernel": kernel, "bias": bias}, at + n * m + m
    return layers


@partial(jax.jit, static_argnames=("sizes",))
def _gradient(
    flat: Any, features: Any, answers: Any, weight: Any, decay: Any, *, sizes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """(the loss, its gradient) of a head as one vector: one dispatch for each of many calls."""

    def loss(flat: jax.Array) -> jax.Array:
        params = _tree(flat, sizes)
        log_q = jax.nn.log_softmax(forward(params, features))
        losses = -(answers * log_q).sum(-1)
        squares = sum(jnp.square(layer["kernel"]).sum() for layer in params.values())
        return (losses * weight).sum() / weight.sum() + decay / 2 * squares

    return jax.value_and_grad(loss)(flat)


def _minimum(
    flat: np.ndarray, sizes: tuple[int, ...], *batch: Any, most: int = ITERATIONS
) -> np.ndarray:
    """The vector at which `_gradient` is nothing, from one to begin with."""
    from scipy.optimize import minimize

    dtype = flat.dtype

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _gradient(x.astype(dtype), *batch, sizes=sizes)
        return float(value), np.asarray(gradient, np.float64)

    options = {"maxiter": most, "maxfun": 2 * most, "ftol": 1e-6, "gtol": 1e-5}
    begin = flat.astype(np.float64)
    return minimize(fun, begin, jac=True, method="L-BFGS-B", options=options).x.astype(dtype)


def start(seed: int, entering: int, classes: int, hidden: int, dtype: Any) -> PyTree:
    """A head before it is fitted: zeros if linear, else He et al. 2015's."""
    rng = np.random.default_rng(seed)

    def layer(n: int, m: int, std: float) -> dict[str, np.ndarray]:
        return {"kernel": (std * rng.normal(size=(n, m))).astype(dtype), "bias": np.zeros(m, dtype)}

    if not hidden:
        return {"fc": layer(entering, classes, 0.0)}
    # Features have length 1, so that each of them has a variance of 1 / D.
    first = layer(entering, hidden, 2**0.5)
    return {"fc_0": first, "fc": layer(hidden, classes, (2 / hidden) ** 0.5)}


def fit(
    features: np.ndarray,
    logits: np.ndarray,
    *,
    mean: np.ndarray | float = 0.0,
    scale: float = 1.0,
    hidden: int = 0,
    folds: int = 5,
    decays: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    temperatures: Sequence[float] = (1.0, 2.0, 4.0),
    seed: int = 0,
    also: tuple[np.ndarray, np.ndarray] | None = None,
) -> Head:
    """Fit a head to a target's answers.

    Args:
      features: f32[n, D], of the images that were asked about.
      logits: f32[n, N], the target's, or log-probabilities.
      mean, scale: `spread` of the features, best over the whole pool.
      hidden: width of a hidden layer; 0 for a linear head.
      folds: parts of the answers, each told by the others, that choose among `decays` (of the
        weights on the scaled features) at the first of `temperatures`, and then among these.
      temperatures: what the target's logits are divided by; the head's are multiplied by it in the
        end, so that its softmax is the target's.
      seed: of the parts, and of a hidden layer.
      also: (features f32[m, D], logits f32[m, N]) to fit in the end in the place of the others, as
        answers that were spread over the pool; what is chosen is chosen by the others.

    Raises:
      ValueError: features that are not finite, or images without an answer (NaN).
    """
    if not np.isfinite(features).all():
        raise ValueError("some features are not finite")
    if unanswered := int(np.isnan(logits).any(1).sum()):
        raise ValueError(f"{unanswered} images have no answer; leave them out")
    dtype = jnp.promote_types(features.dtype, jnp.float32)

    def scaled(rows: np.ndarray) -> jax.Array:
        return jnp.asarray((rows - mean) / scale, dtype)

    def soft(rows: np.ndarray, temperature: float) -> jax.Array:
        return jax.nn.softmax(jnp.asarray(rows, dtype) / temperature)

    def begin(width: int) -> tuple[np.ndarray, tuple[int, ...]]:
        begun = start(seed, width, logits.shape[1], hidden, dtype)
        sizes = tuple(size for size in (width, hidden, logits.shape[1]) if size)
        return np.concatenate(
            [layer[key].ravel() for layer in begun.values() for key in layer]
        ), sizes

    x, n, basis = scaled(features), len(features), None
    if not hidden and n < features.shape[1]:
        # The decayed minimum is a combination of its rows (the representer theorem, Kimeldorf and
        # Wahba 1971): fewer weights, and L-BFGS takes the same steps among them.
        left, values, basis = np.linalg.svd(np.asarray(x), full_matrices=False)
        x = jnp.asarray(left * values, dtype)
    fresh, sizes = begin(x.shape[1])
    part = np.random.default_rng(seed).permutation(n) % folds
    truth = np.asarray(soft(logits, 1.0))
    # Of labels each temperature makes the same, so that none is chosen and none is multiplied by.
    hard = bool((truth.max(1) > 1 - 1e-6).all())

    def told(temperature: float, decays: Sequence[float]) -> list[float]:
        """Held-out cross-entropy for each decay, the largest first."""
        losses = np.zeros((len(decays), len(SCALES)))
        answers = soft(logits, temperature)
        for fold in range(min(folds, n)):
            held, found = part == fold, fresh
            for place, decay in enumerate(decays):
                begin = fresh if hidden else found  # the last one's is near
                weight = jnp.asarray(~held, dtype)
                found = _minimum(begin, sizes, x, answers, weight, decay, most=CHOOSING)
                rows = np.asarray(_scores(_tree(found, sizes), x))[held]
                losses[place] += [_cross_entropy(truth[held], scale * rows) for scale in SCALES]
        return [float(loss) for loss in losses.min(1) / n]

    ordered = sorted(decays, reverse=True)
    decay, temperature, best = ordered[len(ordered) // 2], temperatures[0], float("nan")
    if hard:
        temperature = 1.0
    if n >= FEW:
        losses = told(temperature, ordered)
        best, decay = min(zip(losses, ordered, strict=True))
        for other in temperatures[1:] if not hard else ():
            if (loss := told(other, [decay])[0]) < best:
                best, temperature = loss, other
    answers = logits
    if also is not None:
        x, answers, basis = scaled(also[0]), also[1], None
        fresh, sizes = begin(x.shape[1])
    weight = jnp.ones(len(x), dtype)
    found = _minimum(fresh, sizes, x, soft(answers, temperature), weight, decay)
    params = _tree(found, sizes)
    if basis is not None:
        params["fc"]["kernel"] = basis.T @ params["fc"]["kernel"]
    return Head(_plain(params, mean, scale, temperature), decay, temperature, best)


def _cross_entropy(truth: np.ndarray, logits: np.ndarray) -> float:
    """The sum over the rows, from probabilities f32[n, N] to logits f64[n, N]."""
    from scipy.special import log_softmax

    return float(-(truth * log_softmax(logits, axis=1)).sum())


def _plain(params: PyTree, mean: Any, scale: float, temperature: float) -> PyTree:
    """The same head on features that are not scaled, with the temperature in its last layer."""
    wide: dict[str, dict[str, np.ndarray]] = {
        name: {key: np.asarray(value, np.float64) for key, value in layer.items()}
        for name, layer in params.items()
    }
    first = wide["fc_0" if "fc_0" in wide else "fc"]
    first["kernel"] = first["kernel"] / scale
    first["bias"] = first["bias"] - np.broadcast_to(mean, len(first["kernel"])) @ first["kernel"]
    wide["fc"] = {key: temperature * value for key, value in wide["fc"].items()}
    dtype = np.asarray(params["fc"]["bias"]).dtype
    return jax.tree.map(lambda value: value.astype(dtype), wide)


_scores = jax.jit(forward)


def scores(params: PyTree, features: np.ndarray, block: int = 65536) -> np.ndarray:
    """A head's logits, f32[n, D] -> f32[n, N]."""
    parts = [features[i : i + block] for i in range(0, len(features), block)]
    return np.concatenate([np.asarray(_scores(params, part)) for part in parts])
