"""A write-ahead log that is damaged in its middle: SQLite reads what stands before, and says
nothing of the rest.

The format is https://www.sqlite.org/fileformat2.html, section 4.
"""

from pathlib import Path

import numpy as np

from qmx.ledger.pages import FRAME, HEAD, page_size

MAGIC = (0x377F0682, 0x377F0683)  # words are little-endian, big-endian where checksums are made


def passed_over(path: Path) -> str:
    """Damage of the log of a ledger's file, in words; "" if it is as a kill may leave it.

    A kill leaves at most one broken frame behind what was committed. So a committed frame after a
    broken one was whole once, and SQLite does not read it any more.
    """
    log = path.with_name(path.name + "-wal")
    # Not mapped: another program may cut the file.
    data = log.read_bytes() if log.exists() else b""
    if len(data) < HEAD + FRAME:
        return ""
    magic, size = int.from_bytes(data[:4]), page_size(b"", data)
    order, table = "<u4" if magic == MAGIC[0] else ">u4", coefficients(1 + size // 8)
    state = checksum(np.zeros(2, np.uint32), np.frombuffer(data[:24], order), table)
    if magic not in MAGIC or data[24:HEAD] != state.astype(">u4").tobytes():
        return f"the head of {log.name} is damaged, so that SQLite passes over all of it"
    broken, lost = 0, 0
    for number, at in enumerate(range(HEAD, len(data) - FRAME - size + 1, FRAME + size), 1):
        frame = data[at : at + FRAME + size]
        if frame[8:16] == data[16:24] and not broken:
            words = np.frombuffer(frame[:8] + frame[FRAME:], order)
            state = checksum(state, words, table)
            broken = 0 if frame[16:24] == state.astype(">u4").tobytes() else number
        elif not broken:
            broken = number
        elif frame[8:16] == data[16:24] and any(frame[4:8]):
            lost += 1
    if not lost:
        return ""
    return (
        f"frame {broken} of {log.name} is damaged, so that SQLite passes over {lost} commit(s)"
        " behind it"
    )


def coefficients(pairs: int) -> np.ndarray:
    """u32[pairs, 2, 2] of `checksum`, the last pair's first: A^j B."""
    step = np.array([[1, 1], [1, 2]], np.uint32)
    rows = [np.array([[1, 0], [1, 1]], np.uint32)]
    while len(rows) < pairs:
        rows.append(step @ rows[-1])
    return np.stack(rows)


def checksum(state: np.ndarray, words: np.ndarray, table: np.ndarray) -> np.ndarray:
    """SQLite's checksum u32[2] after some words u32[2 m], from what it was before (4.2).

    It is s0 += x0 + s1, s1 += x1 + s0 for each pair of words, modulo 2^32: linear, with A = [[1,
    1], [1, 2]] and B = [[1, 0], [1, 1]] it is A s + B x. So m pairs are one sum.
    """
    pairs = words.astype(np.uint32).reshape(-1, 2)
    few = table[: len(pairs)][::-1]
    # A^m, from A = B [[1, 1], [0, 1]].
    power = few[0] @ np.array([[1, 1], [0, 1]], np.uint32)
    return power @ state + (few @ pairs[..., None]).sum(0, dtype=np.uint32)[:, 0]
