"""The first images that a target elsewhere is asked about: before anything is trained."""

import time
from functools import cache

import numpy as np

from qmx.grid import cells
from qmx.progress import about, say
from qmx.stages.answers import ask_about
from qmx.stages.query import note_calls
from qmx.stages.run import Run
from qmx.stages.select import chosen_up_front
from qmx.stages.target import Target, in_ledger, target_query
from qmx.workdir import NotDone


def trial(run: Run, target: Target | NotDone) -> None:
    """Ask about one evaluation image, then about two, and say what the whole run takes.

    They go the whole way into the ledger: an answer of the wrong shape, level or type is found here
    and not after a day of pretraining. They are asked about anyway, so they cost nothing more. It
    is for whole runs, and done once.

    Raises:
      ValueError: an answer that does not fit, see `qmx.ledger.Ledger.ask`.
    """
    kind = run.config.target.kind
    if run.only != "all" or isinstance(target, NotDone) or target.path or kind == "recorded":
        return
    note_calls(run, target)  # before a ledger that is gone is begun anew
    if in_ledger(run, target.identity, lambda ledger: ledger.calls()):
        return
    ask = cache(lambda: target_query(run, target))
    ids = np.arange(min(3, run.data.evaluation.size))
    for some in filter(len, (ids[:1], ids[1:])):
        began = time.monotonic()
        ask_about(run, target, ask, run.data.evaluation, some, "report", "a trial of the target")
    say(planned(run, time.monotonic() - began, len(some)))


def planned(run: Run, seconds: float, images: int) -> str:
    """A line on the cost of all questions of a run, by one request of so many images."""
    config, pool = run.config, run.data.pool.size
    largest = max(cell.queries for cell in cells(config, pool))
    count = max(len(chosen_up_front(config, run.data)), largest) + run.data.evaluation.size
    requests = -(-count // config.target.batch_size)
    # A request takes at least as long as this one; its time grows with its images at most.
    least, most = requests * seconds, count * seconds / images
    if config.target.rate:
        least, most = (max(value, requests / config.target.rate) for value in (least, most))
    price = "" if config.price is None else f", and cost {config.price * count / 1000:.4g}"
    return (
        f"the target answers; {count} images or more will take {about(least)} to"
        f" {about(max(least, most))}{price}"
    )
