"""Examples by number, and what a data set is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Source(NamedTuple):
    """Examples by number."""

    size: int
    # ids i64[b] -> what training cuts its views from: "image" uint8[b, H, W, C], "label" i32[b], and, where photos
    # are squashed onto one canvas, "size" f32[b, 2], their own height and width.
    read: Callable[[np.ndarray], dict[str, np.ndarray]]
    # ids i64[b] -> uint8[b, S, S, C], the exact pixels that a target is asked about and networks are evaluated on
    shown: Callable[[np.ndarray], np.ndarray]
    labels: np.ndarray  # i32[n]; empty where the arrays have none
    names: tuple[str, ...] = ()  # of the files, "n01440764/n01440764_10026.JPEG"; () where there are none
    beside: "Beside | None" = None  # what batches hold of another source too
    nbytes: int | None = None  # of all that `read` gives, where it is in memory; None where it comes from files

    def all(self) -> dict[str, np.ndarray]:
        """Every example as `read` gives it, in order. For what fits in memory."""
        return self.read(np.arange(self.size))


class Beside(NamedTuple):
    """Other examples that come with those of a source, in an order of their own; see `qmx.data.batches`."""

    source: Source
    ratio: int  # so many for each of the source's own


class Dataset(NamedTuple):
    """A pool to pretrain on and to ask about, and images to evaluate on, which are never in it."""

    name: str
    pool: Source
    evaluation: Source
    classes: int  # N
    shape: tuple[int, int, int]  # H, W, C of what `shown` gives
    mean: tuple[float, ...]  # of each channel, in 0..1, for the normalisation
    std: tuple[float, ...]
    digest: str  # SHA-256 of all images and labels, or of a listing of them; see the source
    class_names: tuple[str, ...] = ()  # wnids, where the source has them


def in_memory(**arrays: np.ndarray) -> Source:
    """A source over arrays of equal length; "image" is what is shown, "label" the labels, where there are such."""
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"arrays differ in length: {sizes}")
    return Source(
        size=next(iter(sizes.values())),
        read=lambda ids: {name: a[ids] for name, a in arrays.items()},
        shown=lambda ids: arrays["image"][ids],
        labels=np.asarray(arrays.get("label", ()), np.int32),
        nbytes=sum(array.nbytes for array in arrays.values()),
    )


def take(source: Source, ids: np.ndarray, **more: Any) -> Source:
    """The examples `ids` of a source, in that order, with `more` arrays of their length beside what is read."""
    return Source(
        size=len(ids),
        read=lambda rows: {**source.read(ids[rows]), **{name: a[rows] for name, a in more.items()}},
        shown=lambda rows: source.shown(ids[rows]),
        labels=source.labels[ids] if len(source.labels) else source.labels,
        names=tuple(source.names[i] for i in ids) if source.names else (),
        nbytes=_share(source, len(ids), more),
    )


def _share(source: Source, count: int, more: dict[str, Any]) -> int | None:
    """Bytes of `count` examples of a source in memory and of `more` beside each; None of one that is not."""
    if source.nbytes is None:
        return None
    beside = sum(array[np.arange(1)].nbytes for array in more.values() if count)
    return source.nbytes * count // max(source.size, 1) + beside * count
