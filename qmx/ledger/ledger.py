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
from qmx.ledger import accounts, refused, sending, stored
from qmx.ledger.accounts import PURPOSES, RECORDED
from qmx.ledger.content import DTYPES, checked, keys_of, keys_of_digests, pixel_digests
from qmx.ledger.file import opened
from qmx.ledger.sending import Asking, Batch

MANY = 65536  # keys that are looked up before their rows are written down


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
            without = len(self.refused(keys))
            cure = f"{without} were refused" if without else "ask for them first"
            raise LookupError(
                f"{missing} of {len(keys)} images have no answer in {self.path}; {cure}"
            )
        answers = np.empty((len(keys), stored.classes(self._file, self.target) or 0), np.float32)
        order = np.argsort(rows, kind="stable")  # as they lie in the file
        for places in np.split(order, range(stored.FEW, len(order), stored.FEW)):
            bought, scores = stored.read(
                self._file,
                rows[places].tolist(),
                [keys[place] for place in places],
                answers.shape[1],
            )
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
        pause: Callable[[float, OSError], None] = lambda seconds, _: time.sleep(seconds),
        on_progress: Callable[[int, int], None] | None = None,
        say: Callable[[str], None] = lambda text: None,
        name: Callable[[int], str] = lambda row: f"image {row}",
        max_refused: float = 0.0,
        trial: int = 0,
    ) -> np.ndarray:
        """Answers to images: from the ledger where it has them, else from the target, once.

        An answer that came is never thrown away: if it cannot be written, because another process
        holds the file or the disk is full, writing is tried until it works. If the query raises
        `Refused`, the batch is asked about in halves. A single image that is refused, or whose
        scores are not finite, is written down as such and not asked about again.

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
          pause: waits the given number of seconds. It gets the error too, `Unavailable`, or
            `Unwritten` before a further attempt to write answers. It may raise to give up.
          on_progress: called with (images answered, images to ask) after each batch.
          say: gets lines for people.
          name: of an image, by its row in `images`, for people.
          max_refused: the share of all images asked about that may have no answer.
          trial: most images in the first request to a target that has not answered yet, so that a
            mistake in what it answers costs no whole batch; 0 is no limit.

        Returns:
          f32[n, N], rows in the order of `images`, at level `access`. Images without an answer have
          NaN.

        Raises:
          BudgetSpent: the budget does not cover the missing images; nothing was sent.
          Unavailable: from the query, after all `waits`. The ledger records the request as failed
            before it raises this, or any other error of the query. Earlier answers are kept.
          TooManyRefused: a ValueError; more images have no answer than `max_refused` allows.
          ValueError: unknown purpose or level, or the query's answer has a wrong shape. That batch
            is not kept; earlier answers are.
          OSError: the disk has no room for the answers to a batch, which was not sent.
        """
        if purpose not in PURPOSES:
            raise ValueError(f"purpose {purpose!r} is unknown; choose one of {', '.join(PURPOSES)}")
        levels.check(access)
        digests = pixel_digests(images)
        sources = digests if of is None else pixel_digests(of)
        keys = keys_of_digests(digests, self.target, self.preprocessing)
        known, without = stored.find(self._file, keys), self.refused(keys)
        rows = stored.missing(keys, known, without, access)
        if purpose != "report":
            self.check_budget(
                {
                    source
                    for key, source in zip(keys, sources, strict=True)
                    if (key not in known or known[key].purpose in ("report", RECORDED))
                    and key not in without
                }
            )
        gives_way = (RECORDED,) if purpose == "report" else (RECORDED, "report")
        if freed := [answer.row for answer in known.values() if answer.purpose in gives_way]:
            stored.assign(self._file, freed, self._request(purpose, views=0, retry=0))

        asking = Asking(
            file=self._file,
            target=self.target,
            query=query,
            request=lambda views, retry: self._request(purpose, views=views, retry=retry),
            access=access,
            dtype=self.dtype,
            waits=waits,
            pause=pause,
            say=say,
            name=name,
            total=accounts.asked(self._file, self.target) + len(rows),
            max_refused=max_refused,
        )
        if without:
            refused.check(self._file, self.target, asking.total, max_refused)
        most = batch_size
        first = trial if stored.classes(self._file, self.target) is None else 0
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            batch = Batch(
                some, images[some], [keys[row] for row in some], [sources[row] for row in some]
            )
            most = sending.ask(asking, batch, most, first if start == 0 else 0)
            if on_progress:
                on_progress(min(start + batch_size, len(rows)), len(rows))
        if new := self.refused(keys) - without:
            say(refused.left_out(self._file, new, len(rows)))
        without |= new
        there = [key not in without for key in keys]
        answers = self.read_keys([key for key in keys if key not in without], access)
        if all(there):
            return answers
        every = np.full((len(keys), answers.shape[1]), np.nan, np.float32)
        every[there] = answers
        return every

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
        scores = checked(scores, len(keys), stored.classes(self._file, self.target))
        if bad := int((~np.isfinite(scores)).any(1).sum()):
            raise ValueError(f"the scores of {bad} of {len(keys)} images are not finite")
        stored.keep(
            self._file,
            self._request(RECORDED, views=0, retry=0),
            keys,
            images,
            scores,
            access,
            self.dtype,
        )

    def differing(self, images: list[bytes], scores: np.ndarray, access: str) -> int:
        """Number of images, by their `pixel_digests`, that have an answer of just this level, and
        another one than in f32[n, N], beyond what float16 rounds."""
        keys = keys_of_digests(images, self.target, self.preprocessing)
        return stored.differing(self._file, keys, scores, access)

    def unanswered(self, images: np.ndarray, access: str = "logits") -> list[int]:
        """The rows of uint8[n, H, W, C] that `ask` would send, in its order."""
        keys = self.keys(images)
        return stored.missing(keys, stored.find(self._file, keys), self.refused(keys), access)

    def refused(self, keys: list[bytes]) -> set[bytes]:
        """Those of the keys whose images were asked about and have no answer."""
        return refused.find(self._file, keys)

    def count_missing(self, images: np.ndarray) -> int:
        """Number of distinct images of uint8[n, H, W, C] without an answer yet."""
        return self.count_missing_keys(self.keys(images))

    def count_missing_keys(self, keys: list[bytes]) -> int:
        """`count_missing` by keys, without the pixels."""
        return len(distinct := sorted(set(keys))) - stored.count(self._file, distinct)

    def spent(self) -> int:
        """Number of distinct images asked about for "train" and "select", as the budget counts."""
        return len(accounts.paid(self._file, self.target))

    def calls(self) -> int:
        """Number of images sent in answered requests, as in `account`."""
        return accounts.sent(self._file, self.target)[0]

    def account(self) -> accounts.Account:
        """Counts of what everybody who used this file has asked this target so far."""
        return accounts.account(self._file, self.target)

    def check_budget(self, images: set[bytes]) -> None:
        """Raise BudgetSpent unless the budget covers these images, given by `pixel_digests`."""
        if self.budget is not None:
            accounts.check_budget(self._file, self.target, images, self.budget)

    def _request(self, purpose: str, *, views: int, retry: int) -> int:
        """Record a new request, and return its number."""
        what = {"purpose": purpose, "views": views, "retry": retry}
        whose = {"target": self.target, "preprocessing": self.preprocessing}
        return self._file.insert("requests", {**whose, **what})
