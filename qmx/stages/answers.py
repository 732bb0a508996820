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
from qmx.ledger import BudgetSpent, Ledger, Unavailable, keys_of, pixel_digests
from qmx.ledger.access import as_logits
from qmx.progress import Progress, progress, say
from qmx.sharding import first, gathered
from qmx.stages import outside, recorded
from qmx.stages.run import Run
from qmx.stages.target import Target, in_ledger, open_ledger
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
    max_refused: float | None = None,
) -> list[bytes]:
    """Bring answers for a source's images into the ledger, with progress `name`; return keys.

    Args:
      max_refused: share of them that may have no answer; None is `target.max_refused`.
    """
    keys: list[bytes] = []
    if run.config.target.kind == "recorded":
        table = Path(run.config.target.path)
        in_ledger(run, target.identity, lambda ledger: recorded.enter(ledger, table))
    with progress(name, len(ids), unit="images") as shown:
        for images in read_together(source.shown, ids):
            ask_together(
                run,
                target,
                ask,
                images,
                purpose,
                partial(_answered, run, shown, name, len(keys), len(ids)),
                partial(name_of, source, ids[len(keys) :]),
                max_refused,
            )
            keys += keys_of(images, **target.identity)
            shown.update(len(keys))
    return keys


def name_of(source: Source, ids: np.ndarray, row: int) -> str:
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
    max_refused: float | None = None,
) -> None:
    """Answers for a chunk of images into the ledger, which the first process keeps.

    A target that is computed here computes in all processes: the others ask it the same batches as
    the ledger does. One that is elsewhere is asked by the first process alone. `on_progress` is
    called in all of them after each batch.
    """
    who, keys = target.identity, run.config.target
    elsewhere = target.path is None
    size = keys.batch_size if elsewhere else BATCH
    rows = in_ledger(run, who, lambda ledger: ledger.unanswered(images, keys.access))
    if rows and keys.kind == "recorded":
        raise ValueError(
            f"{keys.path} has no answer to {len(rows)} of {len(images)} images that are asked about"
            f" for {purpose}; record those too"
            + ("" if purpose == "report" else f", or lower {budget_keys(run.config)}")
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
                    max_refused=keys.max_refused if max_refused is None else max_refused,
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
    top1: float | None  # the target's accuracy on these, in per cent; None without labels
    top5: float | None

    def there(self, ids: np.ndarray) -> np.ndarray:
        """Those of some images of the pool that have an answer, in that order."""
        return ids[np.isin(ids, self.ids)]


def answered(run: Run, identity: dict[str, str], keys: list[bytes]) -> np.ndarray:
    """True for each image that was not refused, by its key, bool[n], in every process."""

    def look(ledger: Ledger) -> np.ndarray:
        without = ledger.refused(keys)
        return np.array([key not in without for key in keys], bool)

    return in_ledger(run, identity, look)


def read_scores(run: Run, identity: dict[str, str], keys: list[bytes], access: str) -> np.ndarray:
    """The target's answers by the images' keys, as an interface of level `access` would have given
    them: f32[n, N], unnormalised log-probabilities, in every process."""
    scores = in_ledger(run, identity, lambda ledger: ledger.read_keys(keys, access))
    return as_logits(scores, access)


def train_scores(run: Run, answers: Answers, ids: np.ndarray, access: str) -> np.ndarray:
    """`read_scores` of some of the pool's images that have an answer."""
    keys = [row.tobytes() for row in answers.train[np.searchsorted(answers.ids, ids)]]
    return read_scores(run, answers.identity, keys, access)


def report_scores(run: Run, answers: Answers, access: str) -> np.ndarray:
    """`read_scores` of all evaluation images that have an answer."""
    return read_scores(run, answers.identity, [row.tobytes() for row in answers.report], access)


def afford(run: Run, target: Target, source: Source, ids: np.ndarray) -> None:
    """Raise BudgetSpent, in every process, if these images together are more than the budget has
    left.

    `Ledger.ask` looks at the budget too, but only chunk by chunk, and in the first process alone.
    """
    budget = run.config.budget
    if (
        budget is None
        or not len(ids)
        or in_ledger(run, target.identity, Ledger.spent) + len(ids) <= budget
    ):
        return  # the images need not be read
    digests = {
        digest for images in read_together(source.shown, ids) for digest in pixel_digests(images)
    }

    def refusal(ledger: Ledger) -> str:
        try:
            ledger.check_budget(digests)
        except BudgetSpent as error:
            return str(error)
        return ""

    if refused := in_ledger(run, target.identity, refusal):
        raise BudgetSpent(refused)
