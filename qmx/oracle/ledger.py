"""The ledger: every answer is paid for once, kept for good, and never asked for again.

One SQLite file. An answer's key is the SHA-256 of the exact pixels sent, the target's digest and the
name of the preprocessing, so answers pair with images by content and never by position. A request
is written down before it is sent, and its answers are committed before anybody sees them: what a
killed run had been answered is there for the next one, which asks only for what is missing.
"""

import hashlib
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qmx.oracle import access as levels

PURPOSES = ("train", "select", "report")

# WAL with synchronous=FULL: a committed answer survives the process and the power.
SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS requests (
  id INTEGER PRIMARY KEY,
  target TEXT NOT NULL,
  purpose TEXT NOT NULL,
  views INTEGER NOT NULL,               -- sent
  retry INTEGER NOT NULL,               -- 1 if it repeats one that failed
  answered INTEGER NOT NULL DEFAULT 0,  -- both are 0 while in flight, and for ever if it was lost
  failed INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS answers (
  key BLOB PRIMARY KEY,                 -- of the pixels sent, the target and the preprocessing
  image BLOB NOT NULL,                  -- SHA-256 of the image that the pixels are a view of
  request INTEGER NOT NULL REFERENCES requests (id),
  access TEXT NOT NULL,
  scores BLOB NOT NULL                  -- float32, little-endian
);
"""


class BudgetSpent(Exception):
    """The next request would exceed the budget. Nothing of it was sent."""


class Unavailable(OSError):
    """Raised by a query function: the target gave no answer, and asking again may help.

    Args:
      message: what happened, for people.
      wait: seconds that the target asked to be left alone; None if it said nothing.
    """

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class Account(NamedTuple):
    """What one target was asked, so far."""

    calls: int  # images sent in requests that were answered, each time that they were sent
    images: int  # distinct images with an answer
    views: int  # distinct pixel arrays with an answer; several views may show one image
    unanswered: int  # images sent in requests that are in flight, or were when a process was killed
    failed: int  # images sent in requests that failed, or whose answer could not be used
    retried: int  # images sent again in requests that repeated a failed one
    purposes: dict[str, int]  # distinct images by what they were first answered for; the report's give way


class Ledger:
    """The answers of one target, in a file that may hold those of others too.

    Args:
      path: the SQLite file; made if missing.
      target: the target's digest or name. Another target's answers are never returned.
      preprocessing: name of what happens between the pixels sent and the target's own input.
      budget: how many distinct images may be asked for "train" and "select"; None is no limit.
        Images asked for "report" alone, to measure fidelity, are counted apart. It is checked once
        for each call of `ask`: two processes that ask at the same time could exceed it together.

    Raises:
      ValueError: the file is not a ledger.
    """

    def __init__(self, path: str | Path, *, target: str, preprocessing: str = "as-is", budget: int | None = None):
        self.path, self.target, self.preprocessing, self.budget = Path(path), target, preprocessing, budget
        try:
            # A writer elsewhere is waited for; half a minute is longer than any of our commits.
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            self._db.create_function("poverty", 1, levels.ACCESS.index, deterministic=True)
            _patiently(lambda: self._db.executescript(SCHEMA))
            self._db.execute("SELECT key, image, request, access, scores FROM answers LIMIT 0")
            self._db.execute("SELECT id, target, purpose, views, retry, answered, failed FROM requests LIMIT 0")
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} cannot be used as a ledger: {error}") from None

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def keys(self, images: np.ndarray) -> list[bytes]:
        """The key of each image; uint8[n, H, W, C] -> n times 32 bytes."""
        return keys_of(images, self.target, self.preprocessing)

    def read(self, images: np.ndarray, access: str = "logits") -> np.ndarray:
        """The answers to images, as an interface of level `access` would have given them.

        uint8[n, H, W, C] -> f32[n, N], rows in the order of the images. Asks nothing.

        Raises:
          LookupError: some images have no answer yet; says how many.
          ValueError: the answers bought are poorer than `access`.
        """
        return self.read_keys(self.keys(images), access)

    def read_keys(self, keys: list[bytes], access: str = "logits") -> np.ndarray:
        """`read` of images whose keys were kept, so that the pixels are not needed again."""
        levels.check(access, weakened=True)
        if not keys:
            return np.zeros((0, self._classes() or 0), np.float32)
        found = self._lookup(keys)
        missing = sum(key not in found for key in keys)
        if missing:
            raise LookupError(f"{missing} of {len(keys)} images have no answer in {self.path}; ask for them first")
        answers = np.empty((len(keys), len(found[keys[0]][1])), np.float32)
        bought = np.array([found[key][0] for key in keys])
        for have in np.unique(bought):
            rows = np.flatnonzero(bought == have)
            own = [keys[row] for row in rows]
            answers[rows] = levels.derive(np.stack([found[key][1] for key in own]), str(have), access, own)
        return answers

    def ask(
        self,
        query: Callable[[np.ndarray], np.ndarray],
        images: np.ndarray,
        *,
        purpose: str = "train",
        access: str = "logits",
        of: np.ndarray | None = None,
        batch_size: int = 256,
        waits: Sequence[float] = (),
        pause: Callable[[float, Unavailable], None] = lambda seconds, _: time.sleep(seconds),
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Answers to images: those that the ledger has, and the target's for the rest, paid for once.

        Args:
          query: uint8[b, H, W, C] -> f32[b, N], one call for each batch of images without an answer.
          images: uint8[n, H, W, C], the exact pixels to send; repeated ones are sent once.
          purpose: "train", "select" or "report".
          access: the level of what `query` returns. An answer of a poorer level is bought anew.
          of: uint8[n, ...], the images that `images` are views of, which are what the budget
            counts; by default each view is an image.
          waits: seconds before each further attempt at a batch for which `query` raised Unavailable;
            longer if the target asked for more. Each attempt is a request of its own.
          pause: waits so many seconds; is told why, and may raise to give up.
          on_progress: called with (answered, to ask) after each batch.

        Returns:
          f32[n, N], rows in the order of `images`, at level `access`.

        Raises:
          BudgetSpent: the missing images are more than the budget has left; nothing was sent.
          Unavailable: from the query, after all `waits`. Like whatever else the query raises it
            goes up when the request is on record as failed; what was answered before it is kept.
          ValueError: unknown purpose or level, or the query's answer has a wrong shape or is not
            finite. That batch is not kept; what was answered before it is.
        """
        if purpose not in PURPOSES:
            raise ValueError(f"purpose {purpose!r} is unknown; choose one of {', '.join(PURPOSES)}")
        levels.check(access)
        keys, sources = self.keys(images), pixel_digests(images if of is None else of)
        found = self._lookup(keys)
        rows = _missing(keys, found, access)
        if purpose != "report":
            self.check_budget(set(sources))
            self._repurpose(found.keys(), purpose)

        classes = self._classes()
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            request, scores = self._send(query, images[batch], purpose, classes, waits, pause)
            classes = scores.shape[1]
            with self._transaction():
                # A richer answer replaces a poorer one, even if another process was quicker.
                self._db.executemany(
                    "INSERT INTO answers (key, image, request, access, scores) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT (key) DO UPDATE SET access = excluded.access, scores = excluded.scores "
                    "WHERE poverty(excluded.access) < poverty(answers.access)",
                    [(keys[row], sources[row], request, access, s.astype("<f4").tobytes())
                     for row, s in zip(batch, scores, strict=True)])
                self._db.execute("UPDATE requests SET answered = 1 WHERE id = ?", (request,))
            if on_progress:
                on_progress(min(start + batch_size, len(rows)), len(rows))
        return self.read(images, access)

    def _send(self, query: Callable[[np.ndarray], np.ndarray], batch: np.ndarray, purpose: str, classes: int | None,
              waits: Sequence[float], pause: Callable[[float, Unavailable], None]) -> tuple[int, np.ndarray]:
        """One batch's scores, and the number of the request that brought them, which `ask` marks as answered."""
        for attempt in range(len(waits) + 1):
            request = self._db.execute("INSERT INTO requests (target, purpose, views, retry) VALUES (?, ?, ?, ?)",
                                       (self.target, purpose, len(batch), attempt > 0)).lastrowid
            assert request is not None
            try:
                return request, _checked(query(batch), len(batch), classes)
            except Exception as error:
                self._db.execute("UPDATE requests SET failed = 1 WHERE id = ?", (request,))
                if not isinstance(error, Unavailable) or attempt == len(waits):
                    raise
                pause(max(waits[attempt], error.wait or 0), error)
        raise AssertionError("the last attempt returns or raises")

    def unanswered(self, images: np.ndarray, access: str = "logits") -> list[int]:
        """The rows of uint8[n, H, W, C] that `ask` would send, in its order."""
        keys = self.keys(images)
        return _missing(keys, self._lookup(keys), access)

    def count_missing(self, images: np.ndarray) -> int:
        """How many distinct images of uint8[n, H, W, C] have no answer yet."""
        keys = set(self.keys(images))
        return len(keys) - len(self._lookup(list(keys)))

    def spent(self) -> int:
        """Distinct images answered for "train" and "select", which the budget is about."""
        return self._db.execute(
            "SELECT COUNT(DISTINCT image) FROM answers JOIN requests ON request = id "
            "WHERE target = ? AND purpose != 'report'", (self.target,)).fetchone()[0]

    def account(self) -> Account:
        """What this target was asked, so far, by everybody who used this file."""
        calls, unanswered, failed, retried = self._db.execute(
            "SELECT COALESCE(SUM(views * answered), 0), COALESCE(SUM(views * (1 - answered - failed)), 0), "
            "COALESCE(SUM(views * failed), 0), COALESCE(SUM(views * retry), 0) FROM requests WHERE target = ?",
            (self.target,)).fetchone()
        images, views = self._db.execute(
            "SELECT COUNT(DISTINCT image), COUNT(*) FROM answers JOIN requests ON request = id WHERE target = ?",
            (self.target,)).fetchone()
        purposes = dict(self._db.execute(
            "SELECT purpose, COUNT(DISTINCT image) FROM answers JOIN requests ON request = id "
            "WHERE target = ? GROUP BY purpose", (self.target,)).fetchall())
        return Account(calls, images, views, unanswered, failed, retried,
                       {name: purposes.get(name, 0) for name in PURPOSES})

    def check_budget(self, images: set[bytes]) -> None:
        """Raise BudgetSpent if images, by their `pixel_digests`, are more than the budget has left."""
        if self.budget is None:
            return
        known = {row[0] for row in self._db.execute(
            "SELECT DISTINCT image FROM answers JOIN requests ON request = id "
            "WHERE target = ? AND purpose != 'report'", (self.target,))}
        new = len(images - known)
        if len(known) + new > self.budget:
            raise BudgetSpent(f"{len(known)} of {self.budget} queries are spent and {new} more are asked for; "
                              "nothing was sent. Raise the budget or ask for fewer images")

    def _repurpose(self, keys: Collection[bytes], purpose: str) -> None:
        """Answers bought for "report" that training now uses count as training's."""
        for chunk in _chunks(sorted(keys), 500):
            asked = (f"key IN ({','.join('?' * len(chunk))}) AND "
                     "request IN (SELECT id FROM requests WHERE purpose = 'report')")
            if self._db.execute(f"SELECT 1 FROM answers WHERE {asked} LIMIT 1", chunk).fetchone():
                with self._transaction():
                    request = self._db.execute(
                        "INSERT INTO requests (target, purpose, views, retry, answered) VALUES (?, ?, 0, 0, 1)",
                        (self.target, purpose)).lastrowid
                    self._db.execute(f"UPDATE answers SET request = ? WHERE {asked}", [request, *chunk])

    def _lookup(self, keys: list[bytes]) -> dict[bytes, tuple[str, np.ndarray]]:
        found = {}
        for chunk in _chunks(sorted(set(keys)), 500):  # below SQLite's oldest limit on parameters
            rows = self._db.execute(
                f"SELECT key, access, scores FROM answers WHERE key IN ({','.join('?' * len(chunk))})", chunk)
            found.update({key: (access, np.frombuffer(scores, "<f4")) for key, access, scores in rows})
        return found

    def _classes(self) -> int | None:
        """N of this target's answers so far."""
        row = self._db.execute("SELECT LENGTH(scores) / 4 FROM answers JOIN requests ON request = id "
                               "WHERE target = ? LIMIT 1", (self.target,)).fetchone()
        return row[0] if row else None

    def _transaction(self) -> sqlite3.Connection:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db  # as a context it commits, or rolls back on an error


def keys_of(images: np.ndarray, target: str, preprocessing: str) -> list[bytes]:
    """The keys that a ledger of this target and preprocessing has for images; see `Ledger.keys`."""
    suffix = f"\0{target}\0{preprocessing}".encode()
    return [hashlib.sha256(digest + suffix).digest() for digest in pixel_digests(images)]


def _missing(keys: list[bytes], found: dict[bytes, tuple[str, np.ndarray]], access: str) -> list[int]:
    """The first row of each key that has no answer, or a poorer one than `access`."""
    rank = levels.ACCESS.index(access)
    return sorted({key: row for row, key in reversed(list(enumerate(keys)))
                   if key not in found or levels.ACCESS.index(found[key][0]) > rank}.values())


def pixel_digests(images: np.ndarray) -> list[bytes]:
    """SHA-256 of the shape and pixels of each image; uint8[n, ...] -> n times 32 bytes.

    Raises:
      ValueError: the images are not uint8.
    """
    if images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype}; the ledger keys the exact uint8 pixels that are sent")
    shape = str(images.shape[1:]).encode()
    return [hashlib.sha256(shape + image.tobytes()).digest() for image in images]


def _checked(answer: np.ndarray, rows: int, classes: int | None) -> np.ndarray:
    """The query's answer as f32[rows, classes], or ValueError with what is wrong with it."""
    scores = np.asarray(answer, np.float32)
    if scores.ndim != 2 or len(scores) != rows or scores.shape[1] != (classes or max(scores.shape[1], 1)):
        raise ValueError(f"the query answered {rows} images with shape {scores.shape}; it must be "
                         f"[{rows}, {classes or 'N'}]. Nothing of this batch was kept")
    bad = int((~np.isfinite(scores)).any(1).sum())
    if bad:
        raise ValueError(f"the query's scores are not finite for {bad} of {rows} images; "
                         "nothing of this batch was kept")
    return scores


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


def _chunks(items: list[bytes], size: int) -> Iterator[list[bytes]]:
    return (items[i : i + size] for i in range(0, len(items), size))
