"""Questions to the target and their answers: through the one ledger, whatever they are for."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qmx.data import Source
from qmx.data.batches import ahead
from qmx.grid import budget_keys
from qmx.inference import ids_here
from qmx.ledger import BudgetSpent, Unavailable, keys_of, pixel_digests
from qmx.ledger.access import as_logits
from qmx.progress import Progress, progress, say
from qmx.sharding import first, from_first, gathered
from qmx.stages import outside, recorded
from qmx.stages.run import Run
from qmx.stages.target import Target, open_ledger
from qmx.targets.query import Query

CHUNK = 4096  # images between two looks at the budget, 0.6 GB of them at 224 pixels
BATCH = 256  # images in one request to a target that is computed here
TRIAL = 2  # images in the first request to another one


def ask_about(
    run: Run,
    target: Target,
    ask: Callable[[], Query],
    source: Source,
    ids: np.ndarray,
    purpose: str,
    name: str,
) -> list[bytes]:
    """Bring answers for a source's images into the ledger, with progress `name`; return keys."""
    keys: list[bytes] = []
    if run.config.target.kind == "recorded":
        from_first(partial(_enter, run, target.identity))
    with progress(name, len(ids), unit="images") as shown:
        for images in read_together(source.shown, ids):
            ask_together(
                run,
                target,
                ask,
                images,
                purpose,
                partial(_answered, run, shown, name, len(keys), len(ids)),
                partial(_name, source, ids[len(keys) :]),
            )
            keys += keys_of(images, **target.identity)
            shown.update(len(keys))
    return keys


def _enter(run: Run, identity: dict[str, str]) -> None:
    with open_ledger(run, identity) as ledger:
        recorded.enter(ledger, Path(run.config.target.path))


def _name(source: Source, ids: np.ndarray, row: int) -> str:
    """An image for people: its file, or its number in the pool or among the evaluation images."""
    return source.names[ids[row]] if source.names else f"image {ids[row]}"


def _answered(
    run: Run, shown: Progress, name: str, before: int, total: int, answered: int, _: int
) -> None:
    shown.update(before + answered)
    run.go_on(name, before + answered, total)


def read_together(
    read: Callable[[np.ndarray], np.ndarray], ids: np.ndarray
) -> Iterator[np.ndarray]:
    """Images in chunks, whole in every process, each of which reads its share of a chunk."""
    # Chunks of one size, hardly any filling.
    here = ids_here(len(ids), -(-len(ids) // -(-len(ids) // CHUNK)))
    left = len(ids)
    for _, images in ahead(read, ids[here].ravel(), here.shape[1]):
        chunk = gathered(images)[:left]
        left -= len(chunk)
        yield chunk


def ask_together(
    run: Run,
    target: Target,
    ask: Callable[[], Query],
    images: np.ndarray,
    purpose: str,
    on_progress: Callable[[int, int], None],
    name: Callable[[int], str],
) -> None:
    """Answers for a chunk of images into the ledger, which the first process keeps.

    A target that is computed here computes in all processes: the others ask it the same batches as
    the ledger does. One that is elsewhere is asked by the first process alone. `on_progress` is
    called in all of them after each batch.
    """
    who, keys = target.identity, run.config.target
    elsewhere = target.path is None
    size = keys.batch_size if elsewhere else BATCH

    def unanswered() -> list[int]:
        with open_ledger(run, who) as ledger:
            return ledger.unanswered(images, keys.access)

    rows = from_first(unanswered)
    if rows and keys.kind == "recorded":
        raise ValueError(
            f"{keys.path} has no answer to {len(rows)} of {len(images)} images that are asked about"
            f" for {purpose}; record those too, or lower {budget_keys(run.config)}"
        )
    if rows:
        ask()  # in all processes, and before anything is on record as sent
    if first():
        with open_ledger(run, who) as ledger:
            try:
                ledger.ask(
                    lambda batch: ask()(batch),
                    images,
                    purpose=purpose,
                    access=keys.access,
                    batch_size=size,
                    waits=outside.waits(keys.retries),
                    pause=partial(outside.pause, run),
                    on_progress=on_progress,
                    say=say,
                    name=name,
                    max_refused=keys.max_refused,
                    trial=TRIAL if elsewhere else 0,
                )
            except Unavailable as error:
                raise Unavailable(
                    f"{error} (what was answered is kept, and the same command goes on)"
                ) from None
    else:
        for start in range(0, len(rows), size):
            if not elsewhere:
                ask()(images[rows[start : start + size]])
            on_progress(min(start + size, len(rows)), len(rows))


class Answers(NamedTuple):
    """Answers to everything that was asked about: the keys by which the ledger gives them."""

    identity: dict[str, str]  # of the target
    ids: np.ndarray  # i64[n], the pool's images that have an answer, ascending
    train: np.ndarray  # uint8[n, 32], their keys
    evaluation: np.ndarray  # i64[m], the evaluation images that have an answer, ascending
    report: np.ndarray  # uint8[m, 32], their keys
    top1: float  # the target's accuracy on these, in per cent
    top5: float

    def there(self, ids: np.ndarray) -> np.ndarray:
        """Those of some images of the pool that have an answer, in that order."""
        return ids[np.isin(ids, self.ids)]

    def of_pool(self, ids: np.ndarray) -> list[bytes]:
        """Keys of some images of the pool, all of which have an answer."""
        return [row.tobytes() for row in self.train[np.searchsorted(self.ids, ids)]]

    def of_evaluation(self) -> list[bytes]:
        """Keys of the evaluation images that have an answer."""
        return [row.tobytes() for row in self.report]


def answered(run: Run, identity: dict[str, str], keys: list[bytes]) -> np.ndarray:
    """True for each image that was not refused, by its key, bool[n], in every process."""

    def look() -> list[bool]:
        with open_ledger(run, identity) as ledger:
            without = ledger.refused(keys)
        return [key not in without for key in keys]

    return np.array(from_first(look), bool)


def read_answers(run: Run, identity: dict[str, str], keys: list[bytes], access: str) -> np.ndarray:
    """Answers to images by their keys, f32[n, N], in every process."""

    def read() -> np.ndarray:
        with open_ledger(run, identity) as ledger:
            return ledger.read_keys(keys, access)

    return from_first(read)


def read_scores(run: Run, identity: dict[str, str], keys: list[bytes]) -> np.ndarray:
    """The target's answers by the images' keys, f32[n, N], as unnormalised log-probabilities."""
    access = run.config.target.access
    return as_logits(read_answers(run, identity, keys, access), access)


def shows(run: Run) -> dict:
    """Inputs of a stage that calls `read_scores`, beside the target."""
    access = run.config.target.access
    return {"shows": access} if access != "logits" else {}


def afford(run: Run, target: Target, source: Source, ids: np.ndarray) -> None:
    """Raise BudgetSpent, in every process, if these images together are more than the budget has
    left.

    `Ledger.ask` looks at the budget too, but only chunk by chunk, and in the first process alone.
    """
    if run.config.budget is None:
        return  # the images need not be read
    digests = {
        digest for images in read_together(source.shown, ids) for digest in pixel_digests(images)
    }

    def refusal() -> str:
        with open_ledger(run, target.identity) as ledger:
            try:
                ledger.check_budget(digests)
            except BudgetSpent as error:
                return str(error)
        return ""

    if refused := from_first(refusal):
        raise BudgetSpent(refused)
