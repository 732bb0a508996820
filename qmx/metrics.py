"""Measures of a student (accuracy, fidelity, divergence) and of features."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from qmx.sharding import everywhere, put_batch, rows_here


def top_k(scores: np.ndarray, classes: np.ndarray, k: int) -> float:
    """Per cent of rows whose class is among the k highest scores; f32[n, N] and i32[n].

    A class ranks behind all that score higher or as high, so a constant score wins nothing.
    """
    if np.isnan(scores).any():
        raise ValueError("some scores are NaN, which would rank as anything")
    check_labels(classes, len(scores), scores.shape[1])
    own = np.take_along_axis(scores, classes[:, None], 1)
    rank = (scores >= own).sum(1)  # counts itself
    return 100.0 * float((rank <= k).mean())


def check_labels(labels: np.ndarray, rows: int, classes: int | None = None) -> None:
    """Raise ValueError unless there is a class, 0..N-1, for each row: NumPy would take -1 for the
    last one, and one for all."""
    if np.shape(labels) != (rows,):
        raise ValueError(f"there are {rows} rows and labels of shape {list(np.shape(labels))}")
    if rows and (labels.min() < 0 or (classes is not None and labels.max() >= classes)):
        raise ValueError(
            f"labels are {labels.min()} to {labels.max()}; classes are counted from 0"
            + (f" to {classes - 1}" if classes is not None else "")
        )


def compare(
    student: np.ndarray, target: np.ndarray, labels: np.ndarray | None
) -> dict[str, float | None]:
    """Accuracy of a student and its fidelity to the target, on the same images.

    Args:
      student: f32[n, N], logits.
      target: f32[n, N], unnormalised log-probabilities.
      labels: i32[n], true classes; None if they are not known.

    Returns:
      top1, top5: accuracy, in per cent; None without labels. fidelity_top1: how often both name
      the same class (also called agreement), in per cent. fidelity_top5: how often the target's
      first class is among the student's first five. kl_target_student: mean KL(target || student)
      in nats, both at temperature 1; infinite where the target's access hides all classes but one
      only if the student gives that class no probability.

    Raises:
      ValueError: the student's scores are not all finite, or an image has no answer (NaN).
    """
    if not np.isfinite(student).all():
        raise ValueError(
            f"the student's scores are not finite for {int((~np.isfinite(student)).any(1).sum())}"
            " images"
        )
    if student.shape != target.shape:
        raise ValueError(
            f"the student's scores are {list(student.shape)} and the target's {list(target.shape)};"
            " they must be of the same images and classes"
        )
    if unanswered := int(np.isnan(target).any(1).sum()):
        raise ValueError(f"the target has no answer to {unanswered} images; leave them out")
    from scipy.special import log_softmax  # it would take a sixth of the time of `import qmx`

    first = target.argmax(1)
    log_p, log_q = log_softmax(target, axis=1), log_softmax(student, axis=1)
    p = np.exp(log_p)
    kl = np.where(p > 0, p * (np.where(p > 0, log_p, 0) - log_q), 0).sum(1)
    return {
        "top1": None if labels is None else top_k(student, labels, 1),
        "top5": None if labels is None else top_k(student, labels, 5),
        "fidelity_top1": top_k(student, first, 1),
        "fidelity_top5": top_k(student, first, 5),
        "kl_target_student": float(kl.mean()),
    }


def fidelity_by_class(student: np.ndarray, target: np.ndarray, classes: int) -> list[float | None]:
    """Agreement of a student with the target on the images of each class, in per cent.

    Args:
      student: i32[n], the class that it names first for each image.
      target: i32[n], likewise.
      classes: N. A class that the target never names has None.
    """
    images = np.bincount(target, minlength=classes)
    same = np.bincount(target[student == target], minlength=classes)
    return [100.0 * int(k) / int(n) if n else None for k, n in zip(same, images, strict=True)]


def calibration_error(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of probabilities f[n, N] against true classes i32[n], in per cent.

    Mean over images of |accuracy - confidence| of the images of like confidence, in bins of equal
    width. Guo et al. 2017, *On Calibration of Modern Neural Networks*, equation 3, who take 15.
    """
    confidence, right = probs.max(1).astype(np.float64), probs.argmax(1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (low, high]
    gaps = np.bincount(place, right - confidence, minlength=bins)
    return 100.0 * float(np.abs(gaps).sum() / len(labels))


def knn(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    k: int = 5,
    temperature: float = 0.1,
) -> np.ndarray:
    """The class of each query by its k nearest features, weighted; f32[n, D], i32[n], f32[m, D] ->
    i32[m].

    Neighbours by cosine similarity s, each voting with exp(s / temperature). Wu et al. 2018
    (*Instance Discrimination*), section 3.4; the MoCo CIFAR notebook takes k 200.
    """
    check_labels(bank_labels, len(bank))
    queries, bank = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, bank)
    )
    classes = int(bank_labels.max()) + 1
    found = []
    for near, ids in nearest(bank, queries, min(k, len(bank))):
        # The nearest weighs 1: no overflow.
        weight = np.exp((near - near.max(1, keepdims=True)) / temperature)
        votes = np.zeros((len(ids), classes))
        np.add.at(votes, (np.arange(len(ids))[:, None], bank_labels[ids]), weight)
        found.append(votes.argmax(1))
    return np.concatenate(found).astype(np.int32)


def nearest(
    bank: np.ndarray, queries: np.ndarray, k: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The k most similar rows of a bank, best first, by chunks of the queries; f32[n, D], f32[m,
    D], k <= n.

    Yields:
      (dot products f32[c, k], rows of the bank i32[c, k]) of c queries after the other, m in all;
      exact.
    """
    devices = jax.device_count()
    # Each device searches its share of the bank; rows that fill it up are too far from everything.
    filler = np.zeros((-len(bank) % devices, bank.shape[1]), bank.dtype)
    shares = np.concatenate([bank, filler]).reshape(devices, -1, bank.shape[1])
    real = (np.arange(shares.shape[0] * shares.shape[1]) < len(bank)).reshape(devices, -1)
    here = rows_here(devices)
    on_device = put_batch({"bank": shares[here], "real": real[here]})
    step = 256  # bounds the memory for a large bank
    for start in range(0, len(queries), step):
        chunk = queries[start : start + step]
        padded = np.concatenate([chunk, np.zeros((step - len(chunk), chunk.shape[1]), chunk.dtype)])
        near, ids = (np.asarray(x)[: len(chunk)] for x in _nearest(k)(padded, on_device))
        yield near, ids


@cache
def _nearest(k: int) -> Callable:
    return jax.jit(partial(_k_nearest, k=k), out_shardings=everywhere())


def _k_nearest(
    queries: jax.Array, shares: dict[str, jax.Array], k: int
) -> tuple[jax.Array, jax.Array]:
    """The k most similar rows, best first: (similarity, number), each [q, k]; exact."""
    # F32[devices, n / devices, D], bool[devices, n / devices].
    bank, real = shares["bank"], shares["real"]
    similarity = jnp.einsum("qd,snd->sqn", queries, bank, precision="highest")
    similarity = jnp.where(real[:, None], similarity, -jnp.inf)
    # Of each share, then of all of them.
    near, place = jax.lax.top_k(similarity, min(k, bank.shape[1]))
    place = place + jnp.arange(bank.shape[0])[:, None, None] * bank.shape[1]
    near, place = (jnp.moveaxis(x, 0, 1).reshape(len(queries), -1) for x in (near, place))
    near, best = jax.lax.top_k(near, k)
    return near, jnp.take_along_axis(place, best, 1)


def held_out(size: int) -> np.ndarray:
    """bool[size]: the part of a pool on which encoders are looked at, a fifth, drawn.

    Of a large pool less, about as many images as ImageNet has for validation. It is drawn, for
    classes may come in turn.

    A researcher's monitor reads true labels, no student learns from it, and it stays within the
    pool, so that what is reported on the evaluation images is not looked at.
    """
    return np.random.default_rng(0).permutation(size) % max(5, -(-size // 50_000)) == 0


def held_out_knn(features: np.ndarray, labels: np.ndarray, k: int, temperature: float) -> float:
    """Accuracy of `knn` in per cent for the `held_out` part by the rest; f32[n, D], i32[n]."""
    asking = held_out(len(features))
    found = knn(features[~asking], labels[~asking], features[asking], k, temperature)
    return 100.0 * float((found == labels[asking]).mean())
