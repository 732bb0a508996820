"""Examples by number, and the parts of a data set."""

from collections.abc import Callable
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np


class Source(NamedTuple):
    """Examples by number."""

    size: int
    # ids i64[b] -> the input of training's views: "image" uint8[b, H, W, C], "label" i32[b] if
    # there are labels, and for photos squashed onto a canvas "size" f32[b, 2], their own height
    # and width.
    read: Callable[[np.ndarray], dict[str, np.ndarray]]
    # ids i64[b] -> uint8[b, S, S, C], the exact pixels for targets and evaluations
    shown: Callable[[np.ndarray], np.ndarray]
    labels: np.ndarray  # i32[n]; empty if there are none
    # Of the files, "n01440764/n01440764_10026.JPEG"; () if there are no files.
    names: tuple[str, ...] = ()
    beside: "Beside | None" = None  # another source, whose examples come in the same batches
    # The arrays in memory that `read` reads; None if it reads files.
    held: "Held | None" = None
    files: "Files | None" = None  # the photos that `read` and `shown` decode; None for arrays

    @property
    def labelled(self) -> bool:
        """True if the examples have labels."""
        return len(self.labels) > 0

    def all(self) -> dict[str, np.ndarray]:
        """Every example as `read` gives it, in order. All of them must fit in memory."""
        return self.read(np.arange(self.size))


class Held(NamedTuple):
    """Arrays in memory and a source's rows of them: `read(ids)` gives `arrays[name][rows[ids]]`."""

    arrays: dict[str, np.ndarray]  # of equal length
    rows: np.ndarray  # i64[n], each at most once


def title(where: str, i: int, name: str) -> str:
    """Name of a photo in messages: its file, or its number if it has no file."""
    return f"{where}/{name}" if name else f"{where}, image {i}"


class Photos(NamedTuple):
    """Photos by number, undecoded."""

    where: str  # the folder or the split, for messages
    # (number, name) -> the file's bytes; picklable; its ValueError names the photo.
    read: Callable[[int, str], bytes]
    names: tuple[str, ...]  # of the files; () if there are no files
    labels: np.ndarray  # i32[n]; empty if there are none
    class_names: tuple[str, ...]
    digest: str  # SHA-256 of the listing, see the source
    remake: str  # the arguments of qmx.data.cache that name these photos, as a shell takes them
    sizes: np.ndarray | None = None  # i64[n], of the files in bytes; None if there are no files

    @property
    def size(self) -> int:
        """Number of photos."""
        return max(len(self.names), len(self.labels))

    def title(self, i: int) -> str:
        """Name of photo i in messages."""
        return title(self.where, i, self.names[i] if self.names else "")

    def load(self, i: int) -> bytes:
        """The file of photo i."""
        return self.read(i, self.names[i] if self.names else "")


class Files(NamedTuple):
    """Photos and a source's rows of them: example k is photo rows[k]."""

    photos: Photos
    rows: np.ndarray  # i64[n]
    cached: bool  # a cache was made of them, so that each of them could be decoded


class Beside(NamedTuple):
    """Another source, read in its own order beside the first one; see `qmx.data.batches`."""

    source: Source
    ratio: int  # its examples for each one of the first source


class Dataset(NamedTuple):
    """A pool to pretrain on and to ask about, and separate images to evaluate on."""

    name: str
    pool: Source
    evaluation: Source  # of size 0 where there is but a pool
    classes: int  # N; 0 if neither labels nor the target's names say it
    shape: tuple[int, int, int]  # H, W, C of the images from `shown`
    mean: tuple[float, ...]  # of each channel, in 0..1, for the normalisation
    std: tuple[float, ...]
    # SHA-256 of each side's images and labels, or of their listing, see the source; and of the
    # settings of `shown`.
    pool_digest: str
    evaluation_digest: str
    class_names: tuple[str, ...] = ()  # wnids, where the source has them
    left_out: tuple[str, ...] = ()  # the photos that are left out by name
    # `pool_digest` before its classes were numbered as a target's; "" if they were not.
    before_numbering: str = ""

    @property
    def images_digest(self) -> str:
        """The pool's digest for stages that read no class, whatever target is named."""
        return self.before_numbering or self.pool_digest

    @property
    def digest(self) -> str:
        """SHA-256 of both sides."""
        return sha256(f"{self.pool_digest} {self.evaluation_digest}".encode()).hexdigest()


def in_memory(**arrays: np.ndarray) -> Source:
    """A source over arrays of equal length: "image", and "label" if there are labels."""
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"arrays differ in length: {sizes}")
    size = next(iter(sizes.values()))
    return Source(
        size=size,
        read=lambda ids: {name: a[ids] for name, a in arrays.items()},
        shown=lambda ids: arrays["image"][ids],
        labels=np.asarray(arrays.get("label", ()), np.int32),
        held=Held(arrays, np.arange(size)),
    )


def take(source: Source, ids: np.ndarray, **more: Any) -> Source:
    """The examples `ids` of a source, in that order; `read` adds the arrays `more` to them."""
    return Source(
        size=len(ids),
        read=lambda rows: {**source.read(ids[rows]), **{name: a[rows] for name, a in more.items()}},
        shown=lambda rows: source.shown(ids[rows]),
        labels=source.labels[ids] if len(source.labels) else source.labels,
        names=tuple(source.names[i] for i in ids) if source.names else (),
        held=_held(source, ids, more),
        files=source.files._replace(rows=source.files.rows[ids]) if source.files else None,
    )


def _held(source: Source, ids: np.ndarray, more: dict[str, Any]) -> Held | None:
    """Arrays of the whole source, so that all its subsets have one shape and compile once."""
    if source.held is None or len(np.unique(ids)) < len(ids):
        return None
    rows = source.held.rows[ids]
    length = len(next(iter(source.held.arrays.values())))
    arrays, everything = {**source.held.arrays}, np.arange(len(ids))
    for name, array in more.items():
        values = array[everything]
        arrays[name] = np.zeros((length, *values.shape[1:]), values.dtype)
        arrays[name][rows] = values
    return Held(arrays, rows)
