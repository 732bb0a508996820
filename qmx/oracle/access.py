"""How much of an answer is seen: weaker access levels, derived from a richer answer."""

import numpy as np
from scipy.special import softmax

# From the richest to the poorest; each can be derived from those before it.
ACCESS = ("logits", "probs", "label")


def check(access: str) -> None:
    """Raise ValueError for an access level that does not exist."""
    if access not in ACCESS:
        raise ValueError(f"access {access!r} is unknown; choose one of {', '.join(ACCESS)}")


def derive(scores: np.ndarray, have: str, want: str) -> np.ndarray:
    """What an interface of level `want` would have answered; f32[n, N] from f32[n, N].

    "logits": unnormalised log-probabilities, as they are. "probs": probabilities. "label": one-hot
    rows of the highest score, the first of several equal ones.

    Raises:
      ValueError: `have` is poorer than `want`, or one of them is unknown.
    """
    check(have)
    check(want)
    if ACCESS.index(have) > ACCESS.index(want):
        raise ValueError(f"the answers are {have}, from which {want} cannot be derived; ask with access={want!r}")
    if have == want:
        return scores
    if want == "probs":
        return softmax(scores, axis=-1)
    return np.eye(scores.shape[-1], dtype=np.float32)[scores.argmax(-1)]


def as_logits(scores: np.ndarray, access: str) -> np.ndarray:
    """Answers of a level as the unnormalised log-probabilities that the losses read, f32[n, N].

    The logarithm of a probability of 0, of each class but one in a one-hot label, is -inf.
    """
    check(access)
    if access == "logits":
        return scores
    with np.errstate(divide="ignore"):
        return np.log(scores)


def one_hot_logits(labels: np.ndarray, classes: int) -> np.ndarray:
    """True labels i32[n] as scores f32[n, N]: 0 for the class, -inf for the others."""
    return as_logits(np.eye(classes, dtype=np.float32)[labels], "label")
