"""Sending batches to the target, and keeping their answers whatever happens to the disk."""

import shutil
from collections.abc import Callable, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from qmx.ledger import refused, stored
from qmx.ledger.content import checked
from qmx.ledger.file import Damaged, File

Query = Callable[[np.ndarray], np.ndarray]
# Seconds between attempts to write answers that came; then the last again.
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
ROW = 8192  # bytes beside its scores that an answer may take in the file and its log
ROOM = 1 << 20  # bytes that are left for others


class Unavailable(OSError):
    """Raised by a query function: the target gave no answer, and asking again may help.

    Args:
      message: what happened, for people.
      wait: seconds to wait, if the target named them; else None.
    """

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class Refused(ValueError):
    """Raised by a query function: the target refuses these images, and may answer fewer of them."""


class Unwritten(OSError):
    """Given to `pause`: answers that came cannot be written yet."""


class Asking(NamedTuple):
    """Everything that the batches of one `Ledger.ask` have in common."""

    file: File
    target: str
    query: Query
    request: Callable[[int, int], int]  # (images, 1 if it repeats a failed one) -> its number
    access: str
    dtype: str
    waits: Sequence[float]
    pause: Callable[[float, OSError], None]
    say: Callable[[str], None]
    name: Callable[[int], str]  # of an image, by its row
    total: int  # images that this target was asked about, and will be by the end
    max_refused: float


class Batch(NamedTuple):
    """Images to send."""

    rows: list[int]  # in what `Ledger.ask` was given
    images: np.ndarray  # uint8[b, H, W, C]
    keys: list[bytes]
    sources: list[bytes]  # digests of the images that these are views of

    def part(self, start: int, stop: int) -> "Batch":
        """Some of the images."""
        some = slice(start, stop)
        return Batch(self.rows[some], self.images[some], self.keys[some], self.sources[some])


def ask(asking: Asking, batch: Batch, most: int, first: int = 0) -> int:
    """Bring the answers to a batch into the file, in parts where the target refuses it.

    A refused batch is halved, and each half asked about once, until it is answered or is one image.
    That image is written down as refused. If both halves of a batch are taken, it was too large.

    Args:
      most: images that a request may have.
      first: images that the first request may have; 0 is no limit.

    Returns:
      `most`, or fewer if the target takes fewer at a time.

    Raises:
      TooManyRefused: too many images have no answer.
    """
    size = len(batch.rows)
    parts = [batch.part(first, size), batch.part(0, first)] if 0 < first < size else [batch]
    # Each with the halves taken of its whole.
    todo: list[tuple[Batch, list[int]]] = [(part, []) for part in parts]
    while todo:
        part, taken = todo.pop()
        size = len(part.rows)
        if size > most:
            starts = range(0, size, most)
            todo += [(part.part(start, start + most), []) for start in reversed(starts)]
            continue
        request, outcome = _send(asking, part)
        if isinstance(outcome, Refused):
            if size > 1:
                halves: list[int] = []
                todo += [(part.part(size // 2, size), halves), (part.part(0, size // 2), halves)]
            else:
                _write_down(asking, request, part, str(outcome))
            continue
        _keep(asking, request, part, outcome)
        taken.append(size)
        if len(taken) == 2 and max(taken) < most:
            most = max(taken)
            asking.say(
                f"the target takes {most} images in a request, and not {sum(taken)}; set"
                f" target.batch_size={most}"
            )
    return most


def _send(asking: Asking, batch: Batch) -> tuple[int, np.ndarray | Refused]:
    """Number of the request that had an outcome, and this: f32[b, N], or the target's refusal.

    An answered request is still to be marked as answered.
    """
    size = len(batch.rows)
    classes = stored.classes(asking.file, asking.target)
    for attempt in range(len(asking.waits) + 1):
        check_room(asking.file, size, classes or 0)
        # Only answers wait for the disk.
        with asking.file.without_waiting_for_the_disk():
            request = asking.request(size, int(attempt > 0))
        try:
            return request, checked(asking.query(batch.images), size, classes)
        except Exception as error:
            asking.file.run("UPDATE requests SET failed = 1 WHERE id = ?", (request,))
            if isinstance(error, Refused):
                return request, error
            if not isinstance(error, Unavailable) or attempt == len(asking.waits):
                raise
            asking.pause(max(asking.waits[attempt], error.wait or 0), error)
    raise AssertionError("the last attempt returns or raises")


def _keep(asking: Asking, request: int, batch: Batch, scores: np.ndarray) -> None:
    """Write the answers to a batch; rows that are not finite as refused."""
    finite = np.isfinite(scores).all(1)
    good, bad = np.flatnonzero(finite), np.flatnonzero(~finite)
    without = {
        batch.keys[place]: (
            batch.sources[place],
            f"{asking.name(batch.rows[place])}: {refused.NOT_FINITE}",
        )
        for place in bad
    }

    def write() -> None:
        stored.keep(
            asking.file,
            request,
            [batch.keys[place] for place in good],
            [batch.sources[place] for place in good],
            scores[good],
            asking.access,
            asking.dtype,
            without,
        )

    _patiently(asking, len(batch.rows), write)
    if without:
        refused.check(asking.file, asking.target, asking.total, asking.max_refused)


def _write_down(asking: Asking, request: int, batch: Batch, why: str) -> None:
    """Write one image down as refused."""
    why = f"{asking.name(batch.rows[0])}: {why}"
    _patiently(
        asking,
        0,
        lambda: refused.keep(asking.file, request, batch.keys[0], batch.sources[0], why),
    )
    refused.check(asking.file, asking.target, asking.total, asking.max_refused)


def _patiently(asking: Asking, answers: int, write: Callable[[], None]) -> None:
    """Write answers that came, again and again until it works: they are paid for.

    Raises:
      Damaged: the file is damaged.
      BaseException: from `pause`, with a note of what is lost.
    """
    lost = f"{answers} answers that came are not written, and lost"
    for attempt in count():
        try:
            write()
            if attempt:
                asking.say(f"{asking.file.path} can be written again; nothing is lost")
            return
        except Damaged as error:
            raise Damaged(asking.file.path, f"{error.what}; {lost}") from None
        except OSError as error:
            why = Unwritten(f"{answers} answers that came cannot be written: {error}")
        if attempt == 0:
            asking.say(f"{why}; they wait in memory, and writing is tried until it works")
        try:
            asking.pause(PAUSES[min(attempt, len(PAUSES) - 1)], why)
        except BaseException as stop:
            stop.add_note(lost)
            raise


def check_room(file: File, answers: int, classes: int) -> None:
    """Raise OSError if the disk has no room for so many answers; looked at before they are paid."""
    need = answers * (8 * classes + ROW) + ROOM
    total, _, free = shutil.disk_usage(file.path.parent)
    if total and free < need:  # some file systems do not say
        raise OSError(
            f"{file.path}: the disk has {free / 1e6:.1f} MB left, and {answers} answers may take"
            f" {need / 1e6:.1f}; nothing was sent. Make room, and the same command goes on"
        )
