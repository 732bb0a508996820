"""Answers in the ledger's file: lookup by key, reading and writing."""

from typing import NamedTuple

import numpy as np

from qmx.ledger.access import ACCESS
from qmx.ledger.content import checksum, count_classes, is_whole, packed, unpacked
from qmx.ledger.file import Damaged, File

FEW = 500  # below SQLite's oldest limit on parameters


class Known(NamedTuple):
    """An answer without its scores."""

    row: int
    access: str
    purpose: str


def find(file: File, keys: list[bytes]) -> dict[bytes, Known]:
    """Row, level and purpose of every key that has an answer.

    Raises:
      Damaged: a level is none.
    """
    answers, distinct = {}, sorted(set(keys))  # neighbours in the index
    for start in range(0, len(distinct), FEW):
        few = distinct[start : start + FEW]
        rows = file.run(
            "SELECT key, row, access, purpose FROM answers JOIN requests ON request = id "
            f"WHERE key IN ({','.join('?' * len(few))})",
            few,
        )
        answers.update({key: Known(row, access, purpose) for key, row, access, purpose in rows})
    if unknown := {answer.access for answer in answers.values()}.difference(ACCESS):
        raise Damaged(file.path, f"an answer has the unknown access {unknown.pop()!r}")
    return answers


def missing(
    keys: list[bytes], known: dict[bytes, Known], without: set[bytes], access: str
) -> list[int]:
    """The first row of each key that has no answer, or a poorer one than `access`.

    Refused ones are left out.
    """
    rank = ACCESS.index(access)
    return sorted(
        {
            key: row
            for row, key in reversed(list(enumerate(keys)))
            if (key not in known or ACCESS.index(known[key].access) > rank) and key not in without
        }.values()
    )


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


def read(
    file: File, rows: list[int], keys: list[bytes], classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Levels str[n] and scores f32[n, N] of the answers in `rows`, at most `FEW`, in that order.

    Args:
      keys: of the answers, n. The index that gave the rows may be damaged, so each row's own key is
        looked at.
      classes: N.

    Raises:
      Damaged: one of them is not as it was written, or is the answer to another key.
    """
    answers = {}
    for row, *content in file.run(
        "SELECT row, key, image, access, dtype, checksum, scores FROM answers JOIN scores USING"
        f" (row) WHERE row IN ({','.join('?' * len(rows))})",
        rows,
    ):
        key, _, access, dtype, _, scores = content
        if not is_whole(*content) or count_classes(len(scores), dtype) != classes:
            raise Damaged(file.path, f"the answer in row {row} is not as it was written")
        answers[row] = key, access, dtype, scores
    if lost := len({*rows} - answers.keys()):
        raise Damaged(file.path, f"the scores of {lost} answers are not there")
    for row, key in zip(rows, keys, strict=True):
        if answers[row][0] != key:
            raise Damaged(file.path, f"its index leads to row {row}, the answer to another image")
    _, access, dtypes, scores = zip(*(answers[row] for row in rows), strict=True)
    return np.array(access), unpacked(scores, dtypes)


def differing(file: File, keys: list[bytes], scores: np.ndarray, access: str) -> int:
    """Number of keys that have an answer of just this level, and another one than in f32[n, N],
    beyond what float16 rounds."""
    known = find(file, keys)
    rows = [i for i, key in enumerate(keys) if key in known and known[key].access == access]
    found = 0
    for start in range(0, len(rows), FEW):
        some = rows[start : start + FEW]
        own, now = [keys[i] for i in some], scores[some]
        had = read(file, [known[key].row for key in own], own, scores.shape[1])[1]
        slack = 2e-3 * np.maximum(np.abs(now).max(1, keepdims=True), 1e-3)
        found += int((np.abs(had - now) > slack).any(1).sum())
    return found


def keep(
    file: File,
    request: int,
    keys: list[bytes],
    images: list[bytes],
    scores: np.ndarray,
    access: str,
    dtype: str,
    refused: dict[bytes, tuple[bytes, str]] | None = None,
) -> None:
    """Write a request's answers, finite f32[n, N], whole and durable.

    A stored answer that is as rich stays as it is.

    Args:
      refused: the image and the reason for each key that was sent and got no answer.
    """
    blobs, rank = packed(scores, dtype), ACCESS.index(access)

    def write() -> None:
        known = find(file, keys)  # inside the transaction: another process may have been quicker
        row, answers, rows = file.run("SELECT COALESCE(MAX(row), 0) FROM answers")[0][0], [], []
        for key, image, (stored, blob) in zip(keys, images, blobs, strict=True):
            if key in known and ACCESS.index(known[key].access) <= rank:
                continue
            row += key not in known
            place = known[key].row if key in known else row
            written = checksum(key, image, access, stored, blob)
            answers.append((place, key, image, request, access, stored, written))
            rows.append((place, blob))
        file.run_many(
            "INSERT INTO answers (row, key, image, request, access, dtype, checksum) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (row) DO UPDATE SET image = excluded.image, "
            "access = excluded.access, dtype = excluded.dtype, checksum = excluded.checksum",
            answers,
        )
        file.run_many("INSERT OR REPLACE INTO scores (row, scores) VALUES (?, ?)", rows)
        file.run_many(
            "INSERT OR REPLACE INTO refused (key, image, request, why) VALUES (?, ?, ?, ?)",
            [(key, image, request, why) for key, (image, why) in (refused or {}).items()],
        )
        file.run_many("DELETE FROM refused WHERE key = ?", [(answer[1],) for answer in answers])
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
    """N of a target's answers; None if there are none yet.

    Raises:
      Damaged: the first answer's length or dtype makes no sense.
    """
    first = file.run(
        "SELECT LENGTH(scores), dtype FROM answers JOIN scores USING (row) WHERE request IN "
        "(SELECT id FROM requests WHERE target = ?) LIMIT 1",
        [target],
    )
    if not first:
        return None
    if (number := count_classes(*first[0])) is None:
        raise Damaged(file.path, f"an answer has {first[0][0]} bytes of {first[0][1]!r}")
    return number
