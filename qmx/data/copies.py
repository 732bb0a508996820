"""Photos that are in the pool and among the evaluation images too, under whatever name.

    python -m qmx.data.copies POOL EVALUATION > copies.txt

prints the names of the evaluation photos that are in the pool, for data.leave_out.
"""

import argparse
import hashlib
import io
import os
import shlex
import sys

import numpy as np

from qmx.data import folder as folders
from qmx.data.photos import in_threads
from qmx.data.sources import Photos

TAIL = 4096  # bytes at the end of a file, which differ between almost all photos


def copies(
    pool: Photos, evaluation: Photos, kept: np.ndarray, eval_kept: np.ndarray
) -> list[tuple[int, int]]:
    """Pairs (evaluation photo, the same file in the pool), one for each such evaluation photo.

    Files of equal size are compared by SHA-256; of most of them only the end has to be read.
    Empty files are no copies.

    Args:
      pool, evaluation: photos of folders, which have sizes.
      kept, eval_kept: i64[n], the photos to compare.

    Raises:
      ValueError: names a file that cannot be read.
    """
    assert pool.sizes is not None and evaluation.sizes is not None
    of_pool = {int(i): (int(pool.sizes[i]), b"") for i in kept}
    of_evaluation = {
        int(i): (int(evaluation.sizes[i]), b"") for i in eval_kept if evaluation.sizes[i]
    }
    for whole in (False, True):
        both = set(of_pool.values()) & set(of_evaluation.values())
        of_pool = digests(pool, [i for i, key in of_pool.items() if key in both], whole)
        of_evaluation = digests(
            evaluation, [i for i, key in of_evaluation.items() if key in both], whole
        )
    first = {key: i for i, key in reversed(of_pool.items())}
    return [(i, first[key]) for i, key in sorted(of_evaluation.items()) if key in first]


def digests(photos: Photos, ids: list[int], whole: bool) -> dict[int, tuple[int, bytes]]:
    """(size, SHA-256) of photos by number; of their ends, unless `whole`."""
    assert photos.sizes is not None
    sizes, found = photos.sizes, {}

    def one(row: int, i: int) -> None:
        size = int(sizes[i])
        data = photos.load(i) if whole else tail(photos, i, size)
        found[i] = (size, hashlib.sha256(data).digest())

    in_threads(one, np.array(ids, np.int64))
    return {i: found[i] for i in ids}


def tail(photos: Photos, i: int, size: int) -> bytes:
    """The end of a file."""
    try:
        with open(os.path.join(photos.where, photos.names[i]), "rb") as file:
            file.seek(max(size - TAIL, 0))
            return file.read(TAIL)
    except OSError as error:
        raise ValueError(f"{photos.title(i)}: {error.strerror or error}") from None


def refuse(pool: Photos, evaluation: Photos, kept: np.ndarray, eval_kept: np.ndarray) -> None:
    """Raise ValueError, with a pair of names, if an evaluation photo is in the pool too."""
    pairs = copies(pool, evaluation, kept, eval_kept)
    if pairs:
        i, j = pairs[0]
        raise ValueError(
            f"{len(pairs)} of {len(eval_kept)} evaluation images are in the pool too:"
            f" {evaluation.title(i)} is {pool.title(j)}; remove them from one side, or list them"
            f" with python -m qmx.data.copies {shlex.join([pool.where, evaluation.where])} >"
            " copies.txt and leave them out with data.leave_out=copies.txt"
        )


def main(argv: list[str]) -> int:
    """Run the command; returns 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(
        "python -m qmx.data.copies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pool", help="a folder of class folders")
    parser.add_argument("evaluation", help="another one")
    keys = parser.parse_args(argv)
    try:
        _, pool, evaluation = folders.photos(keys.pool, keys.evaluation)
        pairs = copies(pool, evaluation, np.arange(pool.size), np.arange(evaluation.size))
    except ValueError as error:
        print(f"qmx.data.copies: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names that are no UTF-8
    for i, _ in pairs:
        print(evaluation.title(i))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
