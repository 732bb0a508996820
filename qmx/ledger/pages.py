"""Records of an SQLite file page by page, without its trees, so that damage elsewhere hides none.

The format is https://www.sqlite.org/fileformat2.html; numbers in brackets are its sections.

SQLite's own `.recover` is no way out: it belongs to the shell, which is not on every machine, and
needs a table of internals (sqlite_dbdata) that distributions leave out. Debian 12's shell, 3.40.1,
recovers nothing, not even of a whole file, and says "SQL logic error".
"""

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PAGE = 4096  # bytes of a page, SQLite's default, for a file whose head is lost
HEAD, FRAME = 32, 24  # bytes before a log's first frame, and of each before its page (4.1)
LEAF = 13  # the first byte of a page that holds a table's rows (1.6)
LONGEST = 1 << 26  # bytes; a longer record is garbage
INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # by serial type (2.1)

Record = list[Any]
Fetch = Callable[[int], bytes]


def records(
    path: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[int, Record]]:
    """(row number, values) of every legible record in a file and in its write-ahead log.

    Values are None, int, str and bytes. Some may be old, damaged or garbage: only a checksum can
    tell. Newer records come later.

    Args:
      on_progress: called with (pages done, pages) now and then.
    """
    data, log = _mapped(path), _mapped(path.with_name(path.name + "-wal"))
    size = page_size(data, log)
    newer = {number: at for number, at in _frames(log, size)}
    total, done = -(-len(data) // size) + len(newer), 0

    def original(number: int) -> bytes:
        return data[(number - 1) * size : number * size]

    def newest(number: int) -> bytes:
        return log[newer[number] : newer[number] + size] if number in newer else original(number)

    for numbers, fetch in (
        (range(1, -(-len(data) // size) + 1), original),
        (sorted(newer), newest),
    ):
        for number in numbers:
            yield from _rows(fetch(number), 100 if number == 1 else 0, fetch, size)
            done += 1
            if done % 4096 == 0:
                on_progress(done, total)


def _mapped(path: Path) -> Any:
    if not path.exists() or not path.stat().st_size:
        return b""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def page_size(data: Any, log: Any) -> int:
    """Bytes of a page, by a file's head or its log's; `PAGE` if neither tells."""
    for code in [
        int.from_bytes(data[16:18]) if data[:15] == b"SQLite format 3" else 0,
        int.from_bytes(log[8:12]),
    ]:
        size = 65536 if code == 1 else code
        if 512 <= size <= 65536 and size & (size - 1) == 0:
            return size
    return PAGE


def _frames(log: Any, size: int) -> Iterator[tuple[int, int]]:
    """(page number, offset) of the frames of a write-ahead log's current run (4.1)."""
    salt = log[16:24]
    for at in range(HEAD, len(log) - size - FRAME + 1, size + FRAME):
        if log[at + 8 : at + 16] == salt:
            yield int.from_bytes(log[at : at + 4]), at + FRAME


def _rows(page: bytes, head: int, fetch: Fetch, size: int) -> Iterator[tuple[int, Record]]:
    """The records of a page that holds a table's rows (1.6), without those that make no sense."""
    if len(page) <= head or page[head] != LEAF:
        return
    for cell in range(min(int.from_bytes(page[head + 3 : head + 5]), size // 4)):
        try:
            at = int.from_bytes(page[head + 8 + 2 * cell : head + 10 + 2 * cell])
            length, at = _varint(page, at)
            row, at = _varint(page, at)
            yield row, _values(_payload(page, at, length, fetch, size))
        except (IndexError, ValueError):
            continue


def _payload(page: bytes, at: int, length: int, fetch: Fetch, size: int) -> bytes:
    """A record's bytes, including those on overflow pages (1.6)."""
    if length > LONGEST:
        raise ValueError
    if length <= size - 35:
        here = length
    else:
        least = (size - 12) * 32 // 255 - 23
        here = least + (length - least) % (size - 4)
        here = here if here <= size - 35 else least
    parts, left = [page[at : at + here]], length - here
    following = int.from_bytes(page[at + here : at + here + 4]) if left else 0
    while left:
        more = fetch(following) if following > 0 else b""
        if len(more) < 4:
            raise ValueError
        part = more[4 : 4 + min(left, size - 4)]
        parts.append(part)
        left -= len(part)
        following = int.from_bytes(more[:4])
        if left and not part:
            raise ValueError
    payload = b"".join(parts)
    if len(payload) != length:
        raise ValueError
    return payload


def _values(record: bytes) -> Record:
    """The values of a record (2.1)."""
    end, at = _varint(record, 0)
    kinds = []
    while at < end:
        kind, at = _varint(record, at)
        kinds.append(kind)
    values: Record = []
    for kind in kinds:
        if kind in (0, 8, 9):
            values.append({0: None, 8: 0, 9: 1}[kind])
            continue
        length = INTEGER_BYTES[kind] if kind in INTEGER_BYTES else (kind - 12) // 2
        if kind in (7, 10, 11) or at + length > len(record):
            raise ValueError
        part, at = record[at : at + length], at + length
        values.append(
            int.from_bytes(part, signed=True)
            if kind in INTEGER_BYTES
            else str(part, "utf-8")
            if kind % 2
            else bytes(part)
        )
    return values


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of one to nine bytes, and the offset after it (1.6)."""
    value = 0
    for place in range(at, at + 8):
        value = value << 7 | data[place] & 127
        if data[place] < 128:
            return value, place + 1
    return value << 8 | data[at + 8], at + 9
