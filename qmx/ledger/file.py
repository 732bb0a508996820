"""The ledger's file: its tables, ways to open it, and its errors in words."""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# WAL with synchronous=FULL: a committed answer survives a kill and a power cut.
# Checkpoints come after 64 MB instead of 4. Keys are random, so each row of a batch changes another
# page of their index. A checkpoint writes each changed page once, so fewer checkpoints write less.
# The cache holds the index of a million keys.
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
# Images that were sent and have no answer. Older files have no such table.
REFUSED = """
CREATE {}TABLE IF NOT EXISTS refused (
  key BLOB PRIMARY KEY,
  image BLOB NOT NULL,
  request INTEGER NOT NULL,
  why TEXT NOT NULL                     -- the image's name, and what the target said
);
"""
BUSY = 30.0  # seconds; another writer may hold the file, and none of our commits takes so long

# By a word of SQLite's.
CURES = {"locked": "end the other program that writes there", "full": "make room on the disk"}
COLUMNS = {
    "requests": "id, target, preprocessing, purpose, views, retry, answered, failed",
    "answers": "row, key, image, request, access, dtype, checksum",
    "scores": "row, scores",
    "refused": "key, image, request, why",
}


class Damaged(ValueError):
    """Raised for a ledger's file that is no longer as it was written."""

    def __init__(self, path: Path, what: object):
        self.what = what
        super().__init__(
            f"{path} is damaged ({what}); python -m qmx.ledger verify {path} says how far, and "
            "recovers the answers that are whole"
        )


class File:
    """One connection to a ledger's file, with errors in words."""

    def __init__(self, path: Path, db: sqlite3.Connection):
        self.path, self._db = path, db

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def run(self, statement: str, parameters: Iterable[Any] = ()) -> list[tuple]:
        """All rows of a statement.

        Raises:
          Damaged: the file is not as SQLite wrote it.
          OSError: it cannot be read or written, as when the disk is full.
        """
        return self._told(lambda: self._db.execute(statement, tuple(parameters)).fetchall())

    def stream(self, statement: str, parameters: Iterable[Any], size: int) -> Iterator[list[tuple]]:
        """`run`, `size` rows at a time."""
        cursor = self._told(lambda: self._db.execute(statement, tuple(parameters)))
        while rows := self._told(lambda: cursor.fetchmany(size)):
            yield rows

    def insert(self, table: str, row: dict[str, Any]) -> int:
        """Write one new row, and return its number."""
        statement = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
        number = self._told(lambda: self._db.execute(statement, tuple(row.values())).lastrowid)
        assert number is not None
        return number

    def run_many(self, statement: str, parameters: Iterable[tuple]) -> None:
        """Run a statement once for each of the parameters."""
        self._told(lambda: self._db.executemany(statement, parameters))

    def together(self, work: Callable[[], None]) -> None:
        """Make all that `work` writes durable by the time this returns, or write none of it."""
        self.run("BEGIN IMMEDIATE")
        try:
            work()
            self.run("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self.run("ROLLBACK")
            raise

    @contextmanager
    def without_waiting_for_the_disk(self) -> Iterator[None]:
        """For what a kill must not lose, and a power cut may."""
        self.run("PRAGMA synchronous = NORMAL")
        try:
            yield
        finally:
            self.run("PRAGMA synchronous = FULL")

    def _told(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if "Could not decode" in str(error):  # a text that damage has changed
                raise Damaged(self.path, "a text is not UTF-8") from None
            cures = [cure for word, cure in CURES.items() if word in str(error)]
            raise OSError("; ".join([f"{self.path}: {error}", *cures])) from None
        except sqlite3.DatabaseError as error:
            raise Damaged(self.path, error) from None


def opened(path: Path) -> File:
    """Open a ledger to read and write; a missing file is created.

    Raises:
      ValueError: the file is not a ledger.
    """
    try:
        db = sqlite3.connect(path, timeout=BUSY, isolation_level=None)
        _patiently(lambda: db.executescript(SCHEMA + REFUSED.format("")))
        check_tables(db)
    except sqlite3.DatabaseError as error:
        raise ValueError(unusable(path, error)) from None
    return File(path, db)


def looked_into(path: Path) -> File:
    """Open a ledger to read only.

    Raises:
      ValueError: the file is not a ledger.
      Damaged: it is a damaged ledger.
    """
    try:
        db = read_only(path)
        check_tables(db)
    except sqlite3.OperationalError as error:
        raise ValueError(unusable(path, error)) from None
    except sqlite3.DatabaseError as error:
        raise Damaged(path, error) from None
    return File(path, db)


def read_only(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing. It reads a write-ahead log too, if there is one."""
    log = path.with_name(path.name + "-wal")
    how = "mode=ro" if log.exists() and log.stat().st_size else "immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, timeout=BUSY)


def check_tables(db: sqlite3.Connection) -> None:
    """Raise sqlite3.OperationalError unless the tables are those of a ledger.

    An older file, open to be read only, gets an empty table of refused images for the time.
    """
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'refused'").fetchone():
        db.execute(REFUSED.format("TEMP "))
    for table, columns in COLUMNS.items():
        db.execute(f"SELECT {columns} FROM {table} LIMIT 0")


def is_out_of_reach(error: sqlite3.Error) -> bool:
    """True for an error of the place and not of the file: a log beside a ledger is read by files
    that SQLite makes there."""
    return "unable to open" in str(error) or "readonly" in str(error)


def unusable(path: Path, error: sqlite3.Error) -> str:
    """A line on a file that SQLite cannot use as a ledger."""
    if path.is_file() and is_out_of_reach(error):
        return (
            f"{path} cannot be read where it is ({error}); copy it, and {path.name}-wal if it is"
            " there, to a directory that you may write"
        )
    return (
        f"{path} cannot be used as a ledger: {error}; if it was one, python -m qmx.ledger verify"
        f" {path} recovers the answers that are whole"
    )


def _patiently(work: Callable[[], object]) -> None:
    """Try again for some seconds: SQLite itself does not wait at the switch to WAL."""
    for wait in (0.01, 0.1, 1, 5, None):
        try:
            work()
            return
        except sqlite3.OperationalError as error:
            if wait is None or "locked" not in str(error):
                raise
            time.sleep(wait)
