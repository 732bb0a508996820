"""Photos that are left out by name, of the pool and of the evaluation images alike."""

import os
from pathlib import Path

import numpy as np

from qmx.data.sources import Photos


def read_names(path: str) -> list[str]:
    """The names in a text file, one a line; empty lines are skipped.

    Raises:
      ValueError: no such file, or it is not text.
    """
    try:
        # As bytes, for a name may hold what a text ends lines with.
        text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise ValueError(
            f"data.leave_out {path}: {error.strerror or error}; give a text file with the name of"
            " a photo on each line"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"data.leave_out {path} is not text; give a file with the name of a photo on each line"
        )
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def leave_out(path: str, *sides: Photos) -> list[tuple[np.ndarray, list[str]]]:
    """For each side the photos to keep, i64[m], and the names of those that are left out.

    Args:
      path: a text file. A line is a photo's name within its folder ("cat/1.jpg"), which leaves it
        out on every side, or its path or the name that messages have ("photos/val/cat/1.jpg",
        "SET/test, image 3"), which says the side. "" leaves nothing out.
      sides: the pool's and the evaluation's photos.

    Raises:
      ValueError: see `read_names`; a line that names no photo; a side of which nothing is left.
    """
    lines = read_names(path) if path else []
    wanted = {os.path.abspath(line): line for line in lines} | {line: line for line in lines}
    unknown, result = set(lines), []
    for photos in sides:
        kept, dropped = [], []
        folder = os.path.abspath(photos.where)
        for i in range(photos.size) if wanted else ():
            name = photos.names[i] if photos.names else photos.title(i)
            matches = {wanted.get(key) for key in (name, photos.title(i), f"{folder}/{name}")}
            if matches != {None}:
                dropped.append(i)
                unknown -= matches
            else:
                kept.append(i)
        if dropped and not kept:
            raise ValueError(f"data.leave_out {path} leaves no photo of {photos.where}")
        result.append(
            (
                np.array(kept, np.int64) if dropped else np.arange(photos.size),
                [photos.names[i] if photos.names else str(i) for i in dropped],
            )
        )
    if unknown:
        raise ValueError(
            f"data.leave_out {path}: {min(unknown)!r} is neither a photo of the pool nor of the"
            " evaluation images; correct or remove the line"
        )
    return result
