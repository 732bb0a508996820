"""The ledger's file: its tables, how it is opened, and its errors in words."""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# WAL with synchronous=FULL: a committed answer survives the process and the power. A checkpoint
# after 64 MB and not after 4: keys are random, so that each batch changes as many pages of their
# index as it has rows, and the more batches a checkpoint holds, the more of those pages it writes
# once. The cache holds the index of a million keys.
SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA wal_autocheckpoint = 16000;
PRAGMA cache_size = -65536;
CREATE TABLE IF NOT EXISTS requests (
  id INTEGER PRIMARY KEY,
  target TEXT NOT NULL,
  preprocessing TEXT NOT NULL,
  purpose TEXT NOT NULL,
  views INTEGER NOT NULL,               -- sent
  retry INTEGER NOT NULL,               -- 1 if it repeats one that failed
  answered INTEGER NOT NULL DEFAULT 0,  -- both are 0 while in flight, and for ever if it was lost
  failed INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS answers (
  row INTEGER PRIMARY KEY,
  key BLOB NOT NULL UNIQUE,             -- of the pixels sent, the target and the preprocessing
  image BLOB NOT NULL,                  -- SHA-256 of the image that the pixels are a view of
  request INTEGER NOT NULL REFERENCES requests (id),
  access TEXT NOT NULL,
  dtype TEXT NOT NULL,                  -- of the scores
  checksum INTEGER NOT NULL             -- see qmx/ledger/content.py
);
CREATE INDEX IF NOT EXISTS answers_by_request ON answers (request);
CREATE TABLE IF NOT EXISTS scores (     -- apart: answers can be found without reading them
  row INTEGER PRIMARY KEY,              -- that of answers
  scores BLOB NOT NULL                  -- little-endian
);
"""

COLUMNS = {
    "requests": "id, target, preprocessing, purpose, views, retry, answered, failed",
    "answers": "row, key, image, request, access, dtype, checksum",
    "scores": "row, scores",
}


class Damaged(ValueError):
    """A ledger's file that cannot be read as it was written."""

    def __init__(self, path: Path, what: object):
        super().__init__(
            f"{path} is damaged ({what}); python -m qmx.ledger verify {path} says how far, and "
            "recovers the answers that are whole"
        )


class File:
    """One connection to a ledger's file, whose errors are told in words."""

    def __init__(self, path: Path, db: sqlite3.Connection):
        self.path, self._db = path, db

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._db.close()

    def run(self, statement: str, parameters: Iterable[Any] = ()) -> list[tuple]:
        """All rows of a statement.

        Raises:
          Damaged: the file is not as SQLite wrote it.
          OSError: it cannot be read or written, as when the disk is full.
        """
        return self._told(lambda: self._db.execute(statement, tuple(parameters)).fetchall())

    def stream(self, statement: str, parameters: Iterable[Any], size: int) -> Iterator[list[tuple]]:
        """`run`, so many rows at a time."""
        cursor = self._told(lambda: self._db.execute(statement, tuple(parameters)))
        while rows := self._told(lambda: cursor.fetchmany(size)):
            yield rows

    def insert(self, table: str, row: dict[str, Any]) -> int:
        """One new row; returns its number."""
        statement = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
        number = self._told(lambda: self._db.execute(statement, tuple(row.values())).lastrowid)
        assert number is not None
        return number

    def run_many(self, statement: str, parameters: Iterable[tuple]) -> None:
        """A statement once for each of the parameters."""
        self._told(lambda: self._db.executemany(statement, parameters))

    def together(self, work: Callable[[], None]) -> None:
        """Make all that `work` writes durable by the time this returns, or write none of it."""
        self.run("BEGIN IMMEDIATE")
        try:
            work()
            self.run("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _told(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise Damaged(self.path, error) from None


def opened(path: Path) -> File:
    """A ledger to read and write; made if missing.

    Raises:
      ValueError: the file is not a ledger.
    """
    try:
        # A writer elsewhere is waited for; half a minute is longer than any of our commits.
        db = sqlite3.connect(path, timeout=30, isolation_level=None)
        _patiently(lambda: db.executescript(SCHEMA))
        check_tables(db)
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} cannot be used as a ledger: {error}") from None
    return File(path, db)


def looked_into(path: Path) -> File:
    """A ledger that is only read.

    Raises:
      ValueError: the file is not a ledger.
      Damaged: it was one.
    """
    try:
        db = read_only(path)
        check_tables(db)
    except sqlite3.OperationalError as error:
        raise ValueError(f"{path} cannot be used as a ledger: {error}") from None
    except sqlite3.DatabaseError as error:
        raise Damaged(path, error) from None
    return File(path, db)


def read_only(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing. What lies in a write-ahead log is read too, if there is
    one."""
    log = path.with_name(path.name + "-wal")
    how = "mode=ro" if log.exists() and log.stat().st_size else "immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, timeout=30)


def check_tables(db: sqlite3.Connection) -> None:
    """Raise sqlite3.OperationalError unless the tables are those of a ledger."""
    for table, columns in COLUMNS.items():
        db.execute(f"SELECT {columns} FROM {table} LIMIT 0")


def _patiently(work: Callable[[], object]) -> None:
    """Try again for some seconds where SQLite does not wait by itself, as at the switch to WAL."""
    for wait in (0.01, 0.1, 1, 5, None):
        try:
            work()
            return
        except sqlite3.OperationalError as error:
            if wait is None or "locked" not in str(error):
                raise
            time.sleep(wait)
