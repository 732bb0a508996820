"""Check of a ledger's file, and recovery of its whole answers into a new file."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from qmx.ledger.access import ACCESS
from qmx.ledger.accounts import PURPOSES, RECORDED
from qmx.ledger.content import is_whole, keys_of_digests
from qmx.ledger.file import REFUSED, SCHEMA, check_tables, is_out_of_reach, read_only, unusable
from qmx.ledger.log import passed_over
from qmx.ledger.pages import records

SHOWN = 5  # problems of one kind that are listed one by one

# All records of the file, whole or not. A row may have an older and a newer record.
FOUND = """
CREATE TEMP TABLE found_answers (row INTEGER, key BLOB, image BLOB, request INTEGER, access TEXT,
                                 dtype TEXT, checksum INTEGER);
CREATE TEMP TABLE found_scores (row INTEGER, scores BLOB);
"""


# Types of the values in a record.
ANSWER = (None, bytes, bytes, int, str, str, int)
REFUSAL = (bytes, bytes, int, str)


class Recovered(NamedTuple):
    """Result of a recovery from a damaged file."""

    path: Path
    answers: int  # recovered; each is as it was written
    of: int  # answers that the file once held: the highest row number
    asked: int  # images sent in answered requests whose records came back
    # Recovered answers without their request. The key gave their target; they count for "train".
    lost_requests: int


def problems(
    path: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Describe what is wrong with a ledger's file; nothing is written.

    Args:
      on_progress: called with (answers checked, answers) now and then.

    Raises:
      ValueError: the file is whole, but not a ledger.
    """
    lines = [line for line in (_cut(path), passed_over(path)) if line]
    try:
        db = read_only(path)
        try:
            try:
                check_tables(db)
            except sqlite3.OperationalError as error:
                if is_out_of_reach(error):
                    raise ValueError(unusable(path, error)) from None
                # The tables may lie behind the damage, or be called something else by it.
                if path.with_name(path.name + "-wal").exists() or _has_answers(path):
                    return [*lines, f"SQLite: {error}"]
                raise ValueError(f"{path} cannot be used as a ledger: {error}") from None
            found = [
                line
                for (text,) in db.execute("PRAGMA integrity_check(100)")
                for line in text.splitlines()
                if not line.startswith("***")
            ]
            lines += [f"SQLite: {line}" for line in found[:SHOWN] if line != "ok"]
            if len(found) > SHOWN:
                lines.append(f"SQLite: and {len(found) - SHOWN} more of this kind")
            lines += _wrong_answers(db, on_progress)
        finally:
            db.close()
    except sqlite3.DatabaseError as error:
        lines.append(f"SQLite: {error}")
    return lines


def recover(
    path: Path, out: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Recovered:
    """Write the whole answers of a damaged file into a new ledger; the old one is only read.

    It reads every page of the file, and so finds answers that no tree leads to any more. It keeps
    an answer if the answer and its scores have the checksum that was written with them.

    Args:
      on_progress: called with (pages read, pages) now and then.

    Raises:
      FileExistsError: `out` is there already.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already; move it away or give another --out")
    part = out.with_name(out.name + ".part")
    part.unlink(missing_ok=True)
    try:
        db = sqlite3.connect(part, isolation_level=None)
        db.executescript(
            SCHEMA.replace("WAL", "DELETE")
            + REFUSED.format("")
            + FOUND
            + "PRAGMA synchronous = OFF; BEGIN;"
        )
        highest = _collect(db, path, on_progress)
        lost = _keep_whole(db)
        answers = db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        asked = db.execute("SELECT COALESCE(SUM(views * answered), 0) FROM requests").fetchone()[0]
        db.execute("COMMIT")
        db.close()
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return Recovered(out, answers, highest, asked, lost)


def _cut(path: Path) -> str:
    """A line if the file is shorter than its head says; else ""."""
    with open(path, "rb") as file:
        head = file.read(32)
    if head[:15] != b"SQLite format 3":
        return ""
    size = int.from_bytes(head[16:18])
    whole = (65536 if size == 1 else size) * int.from_bytes(head[28:32])
    have = path.stat().st_size
    return f"the file ends after {have} of {whole} bytes" if have < whole else ""


def _has_answers(path: Path) -> bool:
    return any(_fits(values, *ANSWER) for _, values in records(path))


def _wrong_answers(db: sqlite3.Connection, on_progress: Callable[[int, int], None]) -> list[str]:
    total = db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
    wrong, checked = list[int](), 0
    for row, *content in db.execute(
        "SELECT row, key, image, access, dtype, checksum, scores FROM answers JOIN scores USING"
        " (row) ORDER BY row"
    ):
        checked += 1
        if not is_whole(*content):
            wrong.append(row)
        if checked % 4096 == 0:
            on_progress(checked, total)
    lines = []
    if wrong:
        shown = ", ".join(map(str, wrong[:SHOWN])) + (" and others" if len(wrong) > SHOWN else "")
        lines.append(f"{len(wrong)} of {total} answers are not as they were written (rows {shown})")
    if checked < total:
        lines.append(f"{total - checked} of {total} answers have lost their scores")
    homeless = db.execute(
        "SELECT COUNT(*) FROM answers WHERE request NOT IN (SELECT id FROM requests)"
    ).fetchone()[0]
    if homeless:
        lines.append(
            f"{homeless} of {total} answers have lost their request, which says whose answers"
            " they are"
        )
    return lines


def _collect(db: sqlite3.Connection, path: Path, on_progress: Callable[[int, int], None]) -> int:
    """Collect the records that look like ours; returns the highest row number of an answer."""
    log = path.with_name(path.name + "-wal")
    # A row takes more than a byte, so that a greater number is garbage.
    most, highest = path.stat().st_size + (log.stat().st_size if log.exists() else 0), 0
    for row, values in records(path, on_progress):
        if not 0 < row <= most:
            continue
        if _fits(values, None, str, str, str, int, int, int, int) and values[3] in (
            *PURPOSES,
            RECORDED,
        ):
            db.execute(
                "INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [row, *values[1:]],
            )
        elif _fits(values, *ANSWER):
            db.execute("INSERT INTO found_answers VALUES (?, ?, ?, ?, ?, ?, ?)", [row, *values[1:]])
            highest = max(highest, row)
        elif _fits(values, *REFUSAL) and len(values[0]) == len(values[1]) == 32:
            db.execute("INSERT OR REPLACE INTO refused VALUES (?, ?, ?, ?)", values)
        elif _fits(values, None, bytes):
            db.execute("INSERT INTO found_scores VALUES (?, ?)", [row, values[1]])
            highest = max(highest, row)
    db.execute("CREATE INDEX temp.by_row ON found_scores (row)")
    return highest


def _fits(values: list[Any], *kinds: type | None) -> bool:
    return len(values) == len(kinds) and all(
        value is None if kind is None else type(value) is kind
        for value, kind in zip(values, kinds, strict=True)
    )


def _keep_whole(db: sqlite3.Connection) -> int:
    """Keep answers whose checksum fits; returns the number of those without their request."""
    requests = {row[0] for row in db.execute("SELECT id FROM requests")}
    targets = db.execute("SELECT DISTINCT target, preprocessing FROM requests").fetchall()
    candidates = db.execute(
        "SELECT row, key, image, request, access, dtype, checksum, scores FROM found_answers "
        "JOIN found_scores USING (row)"
    )
    rows, lost, invented = dict[bytes, tuple[int, str]](), 0, set[int]()
    for _, key, image, request, access, dtype, written, scores in candidates:
        if not is_whole(key, image, access, dtype, written, scores):
            continue
        if request not in requests:
            owner = [names for names in targets if keys_of_digests([image], *names) == [key]]
            if not owner:
                continue  # its target is unknown
            db.execute(
                "INSERT INTO requests (id, target, preprocessing, purpose, views, retry, answered) "
                "VALUES (?, ?, ?, 'train', 0, 0, 1)",
                [request, *owner[0]],
            )
            requests.add(request)
            invented.add(request)
        place, known = rows.get(key, (len(rows) + 1, ""))
        if known and ACCESS.index(known) < ACCESS.index(access):
            continue
        lost += request in invented
        rows[key] = place, access
        db.execute("DELETE FROM refused WHERE key = ?", [key])
        db.execute(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",
            [place, key, image, request, access, dtype, written],
        )
        db.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", [place, scores])
    db.execute("DELETE FROM refused WHERE request NOT IN (SELECT id FROM requests)")
    return lost
