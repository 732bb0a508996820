"""Access levels: the part of an answer that is seen. Weaker ones derive from richer answers."""

from collections.abc import Sequence

import numpy as np

from qmx.ledger.weaken import WEAKENINGS, parse

# The levels that a target can be asked for, from the richest to the poorest. Each follows from any
# before it, and the weakened levels of qmx/ledger/weaken.py follow from the first two.
ACCESS = ("logits", "probs", "label")


def known(access: str) -> bool:
    """True if there is such a level, weakened ones included."""
    return access in ACCESS or parse(access) is not None


def names() -> list[str]:
    """Every level, with an example of each weakened one."""
    return [*ACCESS, *(kind.example for kind in WEAKENINGS.values())]


def check(access: str, weakened: bool = False) -> None:
    """Raise ValueError for an unknown level. Weakened levels can be read, but not asked for."""
    if access not in ACCESS and not (weakened and known(access)):
        raise ValueError(
            f"access {access!r} is unknown; choose one of"
            f" {', '.join(names() if weakened else ACCESS)}"
        )


def derivable(have: str, want: str) -> bool:
    """True if answers of level `want` follow from answers of level `have`, one of `ACCESS`."""
    check(have)
    check(want, weakened=True)
    return ACCESS.index(have) <= ACCESS.index(_needed(want))


def _needed(want: str) -> str:
    """The poorest level from which `want` can be derived."""
    return "probs" if parse(want) else want


def derive(scores: np.ndarray, have: str, want: str, keys: Sequence[bytes] = ()) -> np.ndarray:
    """Answers that an interface of level `want` would have given; f32[n, N] from f32[n, N].

    "logits": unnormalised log-probabilities, as they are. "probs": probabilities. "label": one-hot
    rows of the highest score; of equal scores, the first. Weakened levels: probabilities, see
    `qmx.ledger.weaken`. `keys` are those of the images; only "noise" reads them.

    Raises:
      ValueError: `have` is poorer than `want`, or one of them is unknown.
    """
    if not derivable(have, want):
        raise ValueError(
            f"the answers are {have}, from which {want} cannot be derived; ask with "
            f"access={_needed(want)!r}"
        )
    weakened = parse(want)
    if have == want:
        return scores
    if weakened:
        kind, number = weakened
        return kind.apply(derive(scores, have, "probs").astype(np.float64), number, keys).astype(
            np.float32
        )
    if want == "probs":
        from scipy.special import softmax  # a sixth of the time of `import qmx`

        return softmax(scores, axis=-1)
    return np.eye(scores.shape[-1], dtype=np.float32)[scores.argmax(-1)]


def received(answer: np.ndarray, rows: int, classes: int, access: str) -> np.ndarray:
    """Answers of somebody else's target to `rows` images, as the ledger keeps them, f32[rows, N].

    Args:
      answer: numbers [rows, N]; for "label" class numbers, [rows] or [rows, 1], or one-hot rows.
      classes: N; 0 takes as many as there are, from two on.

    Raises:
      ValueError: the number of images or classes is wrong, or the numbers do not fit the level:
        "probs" that are negative or do not sum to 1 in each row (within 5 %, because some
        interfaces round), or "logits" that are probabilities, rounded ones too. Rows that are not
        finite stay so.
    """
    if (
        access == "label"
        and np.issubdtype(answer.dtype, np.integer)
        and answer.shape in ((rows,), (rows, 1))
    ):
        numbers = answer.reshape(rows)
        if not classes:
            raise ValueError(
                "the target answers with class numbers, which do not say how many classes there"
                " are; target.classes names a file that does, one a line"
            )
        if ((numbers < 0) | (numbers >= classes)).any():
            raise ValueError(
                f"the target names classes from {numbers.min()} to {numbers.max()}, and there are "
                f"{classes}, from 0 on"
            )
        return np.eye(classes, dtype=np.float32)[numbers]
    if (
        answer.ndim != 2
        or len(answer) != rows
        or answer.shape[1] != (classes or max(answer.shape[1], 2))
    ):
        raise ValueError(
            f"the target answered {rows} images with the shape {list(answer.shape)}, and it must be"
            f" [{rows}, {classes or 'N'}], a number for each image and class; nothing of this batch"
            " is kept"
            + ("; target.classes names the classes of a target that has others" if classes else "")
        )
    with np.errstate(over="ignore"):
        scores = answer.astype(np.float32)
    finite = scores[np.isfinite(scores).all(1)]
    if not len(finite):
        return scores
    with np.errstate(over="ignore"):
        off = np.abs(finite.sum(1) - 1).max()
    if access == "label" and not (np.isin(finite, (0, 1)).all() and off == 0):
        raise ValueError(
            "the target's answers are no labels but scores; set target.access to logits or probs"
        )
    if access == "probs" and (finite.min() < 0 or off > 0.05):
        raise ValueError(
            f"the target's answers are no probabilities: the least is {finite.min():.4g}, and the"
            f" sum of a row is {off:.4g} away from 1; set target.access=logits if they are logits"
        )
    if access == "logits" and answer.shape[1] > 1 and _are_probabilities(finite):
        if off > 0.05:
            raise ValueError(
                "the target's answers are probabilities without the small ones, for a row sums to"
                f" {finite.sum(1).min():.2g}; share the rest among the other classes and set"
                " target.access=probs, or answer with the class and set target.access=label"
            )
        raise ValueError(
            "the target's answers are probabilities, for they are positive and each row sums to 1;"
            " set target.access=probs"
        )
    return scores


def _are_probabilities(scores: np.ndarray) -> bool:
    """True for rows that no logits would be, f32[n, N]: also where an interface rounds, by which
    1,000 classes lose 5 %, or leaves small ones out, which takes some rows to tell."""
    sums = scores.sum(1)
    off = np.abs(sums - 1).max()
    if scores.min() < 0 or scores.max() > 1.001 or sums.max() > 1.05:
        return False
    cut_off = len(scores) >= 10 and np.median(sums) >= 0.5
    # Of few numbers logits of a small network may be so by chance.
    return bool(off < 1e-3 or (off < 0.05 and scores.size >= 20) or cut_off)


def as_logits(scores: np.ndarray, access: str) -> np.ndarray:
    """Answers of a level as the unnormalised log-probabilities that the losses read, f32[n, N].

    A probability of 0 becomes -inf. In a one-hot label that is every class but one.
    """
    if access == "logits":
        return scores
    with np.errstate(divide="ignore"):
        return np.log(scores)


def one_hot_logits(labels: np.ndarray, classes: int) -> np.ndarray:
    """True labels i32[n] as scores f32[n, N]: 0 for the class, -inf for the others.

    Raises:
      ValueError: a label that is negative, which NumPy would count from the end.
    """
    if len(labels) and labels.min() < 0:
        raise ValueError(f"there is no class {labels.min()}; labels are counted from 0 on")
    return as_logits(np.eye(classes, dtype=np.float32)[labels], "label")
