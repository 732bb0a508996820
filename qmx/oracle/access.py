"""How much of an answer is seen: weaker access levels, derived from a richer answer."""

from collections.abc import Sequence

import numpy as np

from qmx.oracle.weaken import WEAKENINGS, parse

# What a target is asked for, from the richest to the poorest; each can be derived from those before it, and from the
# first two also the weakened levels of qmx/oracle/weaken.py.
ACCESS = ("logits", "probs", "label")


def known(access: str) -> bool:
    """Whether there is such a level, weakened ones included."""
    return access in ACCESS or parse(access) is not None


def names() -> list[str]:
    """Every level, the weakened ones by an example."""
    return [*ACCESS, *(kind.example for kind in WEAKENINGS.values())]


def check(access: str, weakened: bool = False) -> None:
    """Raise ValueError for a level that does not exist; weakened ones are read and not asked for."""
    if access not in ACCESS and not (weakened and known(access)):
        raise ValueError(f"access {access!r} is unknown; choose one of {', '.join(names() if weakened else ACCESS)}")


def derive(scores: np.ndarray, have: str, want: str, keys: Sequence[bytes] = ()) -> np.ndarray:
    """What an interface of level `want` would have answered; f32[n, N] from f32[n, N].

    "logits": unnormalised log-probabilities, as they are. "probs": probabilities. "label": one-hot
    rows of the highest score, the first of several equal ones. Weakened levels: probabilities, see
    `qmx.oracle.weaken`; `keys` are the images', which only "noise" reads.

    Raises:
      ValueError: `have` is poorer than `want`, or one of them is unknown.
    """
    check(have)
    check(want, weakened=True)
    weakened = parse(want)
    needed = "probs" if weakened else want
    if ACCESS.index(have) > ACCESS.index(needed):
        raise ValueError(f"the answers are {have}, from which {want} cannot be derived; ask with access={needed!r}")
    if have == want:
        return scores
    if weakened:
        kind, number = weakened
        return kind.apply(derive(scores, have, "probs").astype(np.float64), number, keys).astype(np.float32)
    if want == "probs":
        from scipy.special import softmax  # it would take a sixth of the time of `import qmx`

        return softmax(scores, axis=-1)
    return np.eye(scores.shape[-1], dtype=np.float32)[scores.argmax(-1)]


def as_logits(scores: np.ndarray, access: str) -> np.ndarray:
    """Answers of a level as the unnormalised log-probabilities that the losses read, f32[n, N].

    The logarithm of a probability of 0, of each class but one in a one-hot label, is -inf.
    """
    if access == "logits":
        return scores
    with np.errstate(divide="ignore"):
        return np.log(scores)


def one_hot_logits(labels: np.ndarray, classes: int) -> np.ndarray:
    """True labels i32[n] as scores f32[n, N]: 0 for the class, -inf for the others."""
    return as_logits(np.eye(classes, dtype=np.float32)[labels], "label")
