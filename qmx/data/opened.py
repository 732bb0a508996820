"""Opening every photo that a run will read, before it spends anything."""

import hashlib
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qmx.data.folder import first_few
from qmx.data.photos import decode, in_threads, open_image
from qmx.data.sources import Dataset, Files, Photos
from qmx.files import write_arrays, write_bytes

AT_ONCE = 256  # photos between two calls of `update`
SECONDS = 10.0  # of work that a kill may cost
UNREADABLE = "unreadable.txt"
UNSEEN, GOOD, FLAT = 0, 1, 2  # what is remembered of a photo


def count(data: Dataset) -> int:
    """Number of photos that `open_photos` opens; 0 for images in memory."""
    return sum(len(files.rows) for files in sides(data))


def sides(data: Dataset) -> list[Files]:
    """The photos of the pool and of the evaluation images."""
    return [source.files for source in (data.pool, data.evaluation) if source.files]


def open_photos(
    data: Dataset, folder: Path | str, update: Callable[[int], None] = lambda done: None
) -> list[str]:
    """Open and decode every photo of the pool and of the evaluation images, in threads.

    Of photos that a cache was made of, which decoded them, only the headers are read. Photos that
    were found good are remembered in `folder`, as long as their folder's listing (names and sizes
    in bytes) stays as it is, and not opened again; a stopped call goes on from there.

    Args:
      data: images in memory have nothing to open.
      folder: is made if it is not there.
      update: is called with the number of photos that are done, out of `count(data)`.

    Returns:
      Lines to show the user: photos of one colour whose files hold more.

    Raises:
      ValueError: photos cannot be read. It has their number, the first few, and the cure:
        data.leave_out with the file `folder`/unreadable.txt, which holds the names of all of them
        and of those that are left out already.
    """
    folder, done = Path(folder), 0
    bad: list[str] = []  # titles
    flat: list[str] = []
    reason = ""
    for files in sides(data):
        problems = _open_side(files, folder, lambda more, before=done: update(before + more))  # type: ignore[misc]
        done += len(files.rows)
        flat += [files.photos.title(i) for i, problem in problems.items() if not problem]
        bad += [files.photos.title(i) for i, problem in problems.items() if problem]
        reason = reason or next(filter(None, problems.values()), "")
    if bad:
        path = folder / UNREADABLE
        names = "".join(f"{name}\n" for name in [*data.left_out, *bad])
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, names.encode(errors="surrogateescape"))
        others = f", and {first_few(bad[1:])}" if len(bad) > 1 else ""
        raise ValueError(
            f"{len(bad)} of {done} photos cannot be read: {reason}{others}; repair them, or leave"
            f" them out with data.leave_out={path}, which names them"
        )
    if not flat:
        return []
    return [
        f"{len(flat)} photos are of one colour as they are read, and their files hold more:"
        f" {first_few(flat)}; scale their values to the range of 8 or 16 bits"
    ]


def _open_side(files: Files, folder: Path, update: Callable[[int], None]) -> dict[int, str]:
    """The photos of a side that are not good: what is wrong with each, "" for one of one colour."""
    photos, whole = files.photos, not files.cached
    kind = "decoded" if whole else "headers"
    # Two folders may have the same listing.
    key = hashlib.sha256(f"{photos.where}\0{photos.digest}".encode("utf-8", "surrogateescape"))
    memory = folder / f"{kind}-{key.hexdigest()[:32]}.npz"
    state = _remembered(memory, photos.size)
    problems: dict[int, str] = {}
    left = files.rows[state[files.rows] == UNSEEN]
    known = len(files.rows) - len(left)

    def one(row: int, i: int) -> None:
        try:
            state[i] = FLAT if _is_flat(photos, i, whole) else GOOD
        except ValueError as error:
            problems[i] = str(error)

    def remember() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_arrays(memory, state=state)

    update(known)
    written = time.monotonic()
    try:
        for start in range(0, len(left), AT_ONCE):
            in_threads(one, left[start : start + AT_ONCE])
            update(known + min(start + AT_ONCE, len(left)))
            if time.monotonic() - written > SECONDS:  # a signal ends the program at once
                remember()
                written = time.monotonic()
    finally:
        if len(left):
            remember()
    problems |= {int(i): "" for i in files.rows if state[i] == FLAT}
    return dict(sorted(problems.items()))


def _is_flat(photos: Photos, i: int, whole: bool) -> bool:
    """True if photo i has one colour and its file more; ValueError if it cannot be read."""
    data, name = photos.load(i), photos.title(i)
    if not whole:
        open_image(data, name)
        return False
    if any(low != high for low, high in decode(data, name).getextrema()):  # type: ignore[misc]
        return False
    pixels = np.asarray(open_image(data, name))
    return bool((pixels != pixels[0, 0]).any())


def _remembered(path: Path, size: int) -> np.ndarray:
    """u8[size], what is remembered of each photo; nothing if the file is absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            state = file["state"]
        if state.shape == (size,) and state.dtype == np.uint8:
            return state
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return np.zeros(size, np.uint8)
