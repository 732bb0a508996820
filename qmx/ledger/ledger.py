"""The ledger of one target: asking, reading, and the account.

An answer's key is the SHA-256 of the exact pixels sent, the target's digest and the name of the
preprocessing, so answers pair with images by content and never by position. The ledger records a
request before it is sent, and commits its answers before it returns them. The answers of a killed
run are therefore there for the next run, which asks only for the missing ones.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qmx.ledger import access as levels
from qmx.ledger import accounts, stored
from qmx.ledger.accounts import PURPOSES, RECORDED
from qmx.ledger.content import DTYPES, checked, keys_of, keys_of_digests, pixel_digests
from qmx.ledger.file import opened

MANY = 65536  # keys that are looked up before their rows are written down


class Unavailable(OSError):
    """Raised by a query function: the target gave no answer, and asking again may help.

    Args:
      message: what happened, for people.
      wait: seconds to wait, if the target named them; else None.
    """

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class Ledger:
    """The answers of one target, in a file that may hold those of others too.

    Args:
      path: the SQLite file; created if missing.
      target: the target's digest or name. Another target's answers are never returned.
      preprocessing: name of the steps between the pixels sent and the target's own input.
      budget: number of distinct images that may be asked for "train" and "select"; None is no
        limit. Images asked for "report" alone, to measure fidelity, do not count. Each `ask` checks
        it once: two processes that ask at the same time could exceed it together.
      dtype: of new scores, "float32" or "float16". float16 halves the file and rounds to 3 digits.
        Older scores keep their own dtype.

    Raises:
      ValueError: the file is not a ledger, or the dtype is unknown.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        target: str,
        preprocessing: str = "as-is",
        budget: int | None = None,
        dtype: str = "float32",
    ):
        if dtype not in DTYPES:
            raise ValueError(
                f"a ledger's dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}"
            )
        self.path, self.target, self.preprocessing = Path(path), target, preprocessing
        self.budget, self.dtype = budget, dtype
        self._file = opened(self.path)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keys(self, images: np.ndarray) -> list[bytes]:
        """The key of each image; uint8[n, H, W, C] -> n times 32 bytes."""
        return keys_of(images, self.target, self.preprocessing)

    def read(self, images: np.ndarray, access: str = "logits") -> np.ndarray:
        """The answers to images, as an interface of level `access` would have given them.

        uint8[n, H, W, C] -> f32[n, N], rows in the order of the images. Sends no request.

        Raises:
          LookupError: some images have no answer yet; the message gives their number.
          ValueError: the stored answers are poorer than `access`.
          Damaged: an answer is not as it was written.
        """
        return self.read_keys(self.keys(images), access)

    def read_keys(self, keys: list[bytes], access: str = "logits") -> np.ndarray:
        """`read` by keys, without the pixels.

        It needs 16 bytes for each row beside the result.
        """
        levels.check(access, weakened=True)
        if not keys:
            return np.zeros((0, stored.classes(self._file, self.target) or 0), np.float32)
        rows = np.zeros(len(keys), np.int64)
        for start in range(0, len(keys), MANY):
            block = keys[start : start + MANY]
            known = stored.find(self._file, block)
            rows[start : start + MANY] = [known[key].row if key in known else 0 for key in block]
        if missing := int((rows == 0).sum()):
            raise LookupError(
                f"{missing} of {len(keys)} images have no answer in {self.path}; ask for them first"
            )
        answers = np.empty((len(keys), stored.classes(self._file, self.target) or 0), np.float32)
        order = np.argsort(rows, kind="stable")  # as they lie in the file
        for places in np.split(order, range(stored.FEW, len(order), stored.FEW)):
            bought, scores = stored.read(self._file, rows[places].tolist())
            for have in np.unique(bought):
                some = np.flatnonzero(bought == have)
                own = [keys[place] for place in places[some]]
                answers[places[some]] = levels.derive(scores[some], str(have), access, own)
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
        """Answers to images: from the ledger where it has them, else from the target, once.

        Args:
          query: uint8[b, H, W, C] -> f32[b, N], one call for each batch of images without an
            answer.
          images: uint8[n, H, W, C], the exact pixels to send; repeated ones are sent once.
          purpose: "train", "select" or "report".
          access: the level that `query` returns. An image with a poorer answer is asked again.
          of: uint8[n, ...], the images that `images` are views of. The budget counts these. By
            default each view is an image.
          waits: seconds before each further attempt at a batch, after `query` raised Unavailable;
            longer if the target asked for more. Each attempt is a request of its own.
          pause: waits the given number of seconds. It gets the error too, and may raise to give up.
          on_progress: called with (images answered, images to ask) after each batch.

        Returns:
          f32[n, N], rows in the order of `images`, at level `access`.

        Raises:
          BudgetSpent: the budget does not cover the missing images; nothing was sent.
          Unavailable: from the query, after all `waits`. The ledger records the request as failed
            before it raises this, or any other error of the query. Earlier answers are kept.
          ValueError: unknown purpose or level, or the query's answer has a wrong shape or is not
            finite. That batch is not kept; earlier answers are.
        """
        if purpose not in PURPOSES:
            raise ValueError(f"purpose {purpose!r} is unknown; choose one of {', '.join(PURPOSES)}")
        levels.check(access)
        digests = pixel_digests(images)
        sources = digests if of is None else pixel_digests(of)
        keys = keys_of_digests(digests, self.target, self.preprocessing)
        known = stored.find(self._file, keys)
        rows = _missing(keys, known, access)
        if purpose != "report":
            self.check_budget(
                {
                    source
                    for key, source in zip(keys, sources, strict=True)
                    if key not in known or known[key].purpose in ("report", RECORDED)
                }
            )
        gives_way = (RECORDED,) if purpose == "report" else (RECORDED, "report")
        if freed := [answer.row for answer in known.values() if answer.purpose in gives_way]:
            stored.assign(self._file, freed, self._request(purpose, views=0, retry=0))

        classes = stored.classes(self._file, self.target)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            request, scores = self._send(query, images[batch], purpose, classes, waits, pause)
            classes = scores.shape[1]
            stored.keep(
                self._file,
                request,
                [keys[row] for row in batch],
                [sources[row] for row in batch],
                scores,
                access,
                self.dtype,
            )
            if on_progress:
                on_progress(min(start + batch_size, len(rows)), len(rows))
        return self.read_keys(keys, access)

    def _send(
        self,
        query: Callable[[np.ndarray], np.ndarray],
        batch: np.ndarray,
        purpose: str,
        classes: int | None,
        waits: Sequence[float],
        pause: Callable[[float, Unavailable], None],
    ) -> tuple[int, np.ndarray]:
        """Number of the request that succeeded, for `ask` to mark as answered, and its scores."""
        for attempt in range(len(waits) + 1):
            # A kill must not lose the record of a request; a power cut may. Only answers wait for
            # the disk.
            self._file.run("PRAGMA synchronous = NORMAL")
            request = self._request(purpose, views=len(batch), retry=int(attempt > 0))
            self._file.run("PRAGMA synchronous = FULL")
            try:
                return request, checked(query(batch), len(batch), classes, self.dtype)
            except Exception as error:
                self._file.run("UPDATE requests SET failed = 1 WHERE id = ?", (request,))
                if not isinstance(error, Unavailable) or attempt == len(waits):
                    raise
                pause(max(waits[attempt], error.wait or 0), error)
        raise AssertionError("the last attempt returns or raises")

    def record(self, images: list[bytes], scores: np.ndarray, access: str) -> None:
        """Enter answers that the owner handed out. The budget counts them once `ask` uses them.

        Args:
          images: the `pixel_digests` of n images.
          scores: f32[n, N].
          access: their level.

        Raises:
          ValueError: the scores are not finite, or their N differs from the target's other answers.
        """
        levels.check(access)
        keys = keys_of_digests(images, self.target, self.preprocessing)
        scores = checked(scores, len(keys), stored.classes(self._file, self.target), self.dtype)
        stored.keep(
            self._file,
            self._request(RECORDED, views=0, retry=0),
            keys,
            images,
            scores,
            access,
            self.dtype,
        )

    def unanswered(self, images: np.ndarray, access: str = "logits") -> list[int]:
        """The rows of uint8[n, H, W, C] that `ask` would send, in its order."""
        keys = self.keys(images)
        return _missing(keys, stored.find(self._file, keys), access)

    def count_missing(self, images: np.ndarray) -> int:
        """Number of distinct images of uint8[n, H, W, C] without an answer yet."""
        return self.count_missing_keys(self.keys(images))

    def count_missing_keys(self, keys: list[bytes]) -> int:
        """`count_missing` by keys, without the pixels."""
        distinct = sorted(set(keys))
        return len(distinct) - stored.count(self._file, distinct)

    def spent(self) -> int:
        """Number of distinct images answered for "train" and "select", as the budget counts."""
        return len(accounts.paid(self._file, self.target))

    def account(self) -> accounts.Account:
        """Counts of what everybody who used this file has asked this target so far."""
        return accounts.account(self._file, self.target)

    def check_budget(self, images: set[bytes]) -> None:
        """Raise BudgetSpent unless the budget covers these images, given by `pixel_digests`."""
        if self.budget is not None:
            accounts.check_budget(self._file, self.target, images, self.budget)

    def _request(self, purpose: str, *, views: int, retry: int) -> int:
        """Record a new request, and return its number."""
        return self._file.insert(
            "requests",
            {
                "target": self.target,
                "preprocessing": self.preprocessing,
                "purpose": purpose,
                "views": views,
                "retry": retry,
            },
        )


def _missing(keys: list[bytes], known: dict[bytes, stored.Known], access: str) -> list[int]:
    """The first row of each key that has no answer, or a poorer one than `access`."""
    rank = levels.ACCESS.index(access)
    return sorted(
        {
            key: row
            for row, key in reversed(list(enumerate(keys)))
            if key not in known or levels.ACCESS.index(known[key].access) > rank
        }.values()
    )
