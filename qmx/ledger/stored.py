"""Answers in the ledger's file: lookup by key, reading and writing."""

from typing import NamedTuple

import numpy as np

from qmx.ledger.access import ACCESS
from qmx.ledger.content import DTYPES, checksum, unpacked
from qmx.ledger.file import Damaged, File

FEW = 500  # below SQLite's oldest limit on parameters


class Known(NamedTuple):
    """An answer without its scores."""

    row: int
    access: str
    purpose: str


def find(file: File, keys: list[bytes]) -> dict[bytes, Known]:
    """Row, level and purpose of every key that has an answer."""
    answers, distinct = {}, sorted(set(keys))  # neighbours in the index
    for start in range(0, len(distinct), FEW):
        few = distinct[start : start + FEW]
        rows = file.run(
            "SELECT key, row, access, purpose FROM answers JOIN requests ON request = id "
            f"WHERE key IN ({','.join('?' * len(few))})",
            few,
        )
        answers.update({key: Known(row, access, purpose) for key, row, access, purpose in rows})
    return answers


def count(file: File, keys: list[bytes]) -> int:
    """Number of the keys, sorted and no two alike, that have an answer."""
    found = 0
    for start in range(0, len(keys), FEW):
        few = keys[start : start + FEW]
        ((number,),) = file.run(
            f"SELECT COUNT(*) FROM answers WHERE key IN ({','.join('?' * len(few))})", few
        )
        found += number
    return found


def read(file: File, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Levels str[n] and scores f32[n, N] of the answers in `rows`, at most `FEW`, in that order.

    Raises:
      Damaged: one of them is not as it was written.
    """
    answers = {}
    for row, key, image, access, dtype, written, scores in file.run(
        "SELECT row, key, image, access, dtype, checksum, scores FROM answers JOIN scores USING"
        f" (row) WHERE row IN ({','.join('?' * len(rows))})",
        rows,
    ):
        if checksum(key, image, access, dtype, scores) != written:
            raise Damaged(file.path, f"the answer in row {row} is not as it was written")
        answers[row] = access, dtype, scores
    if lost := len({*rows} - answers.keys()):
        raise Damaged(file.path, f"the scores of {lost} answers are not there")
    access, dtypes, scores = zip(*(answers[row] for row in rows), strict=True)
    return np.array(access), unpacked(scores, dtypes)


def keep(
    file: File,
    request: int,
    keys: list[bytes],
    images: list[bytes],
    scores: np.ndarray,
    access: str,
    dtype: str,
) -> None:
    """Write a request's answers, `packed` [n, N], whole and durable.

    A stored answer that is as rich stays as it is.
    """
    blobs, rank = [row.tobytes() for row in scores], ACCESS.index(access)

    def write() -> None:
        known = find(file, keys)  # inside the transaction: another process may have been quicker
        row, answers, rows = file.run("SELECT COALESCE(MAX(row), 0) FROM answers")[0][0], [], []
        for key, image, blob in zip(keys, images, blobs, strict=True):
            if key in known and ACCESS.index(known[key].access) <= rank:
                continue
            row += key not in known
            place = known[key].row if key in known else row
            answers.append(
                (
                    place,
                    key,
                    image,
                    request,
                    access,
                    dtype,
                    checksum(key, image, access, dtype, blob),
                )
            )
            rows.append((place, blob))
        file.run_many(
            "INSERT INTO answers (row, key, image, request, access, dtype, checksum) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (row) DO UPDATE SET image = excluded.image, "
            "access = excluded.access, dtype = excluded.dtype, checksum = excluded.checksum",
            answers,
        )
        file.run_many("INSERT OR REPLACE INTO scores (row, scores) VALUES (?, ?)", rows)
        file.run("UPDATE requests SET answered = 1 WHERE id = ?", [request])

    file.together(write)


def assign(file: File, rows: list[int], request: int) -> None:
    """Give answers to another request, so that they count for its purpose."""

    def write() -> None:
        file.run_many(
            "UPDATE answers SET request = ? WHERE row = ?", ((request, row) for row in rows)
        )
        file.run("UPDATE requests SET answered = 1 WHERE id = ?", [request])

    file.together(write)


def classes(file: File, target: str) -> int | None:
    """N of a target's answers; None if there are none yet."""
    first = file.run(
        "SELECT LENGTH(scores), dtype FROM answers JOIN scores USING (row) WHERE request IN "
        "(SELECT id FROM requests WHERE target = ?) LIMIT 1",
        [target],
    )
    return first[0][0] // np.dtype(DTYPES[first[0][1]]).itemsize if first else None
