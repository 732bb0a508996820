"""The first images that a target elsewhere is asked about: before anything is trained."""

import time
from collections.abc import Callable
from functools import cache, partial

import numpy as np

from qmx.encoders import read_facts
from qmx.files import write_sealed
from qmx.grid import cells
from qmx.ledger import Ledger, Refused, Unavailable, keys_of
from qmx.ledger.again import ask_again
from qmx.progress import about, say
from qmx.sharding import from_first
from qmx.stages.answers import ask_about
from qmx.stages.outside import NEW
from qmx.stages.query import note_calls
from qmx.stages.run import Run
from qmx.stages.select import chosen_up_front
from qmx.stages.target import Target, in_ledger, target_query
from qmx.stages.target_name import VERDICTS, all_asked, verdict
from qmx.targets.query import Query
from qmx.workdir import NotDone

FEW = 3  # images of a trial
# Images of a run from which on two more calls are nothing: that many ask two images again, to see
# that an answer is always the same.
MANY = 500
ORDER = "the target does not answer in the order of the images"
SAME = 0.01  # of the range of an answer's scores, by which another one may differ: float16 does


def trial(run: Run, target: Target | NotDone) -> Run:
    """Ask about one evaluation image, then about two, and say what the whole run takes.

    They go the whole way into the ledger: an answer of the wrong shape, level or type is found here
    and not after a day of pretraining. They are asked about anyway, so they cost nothing more. It
    is for whole runs, and done until it was passed once: `VERDICTS` has the verdict.

    Returns:
      The run; where its images do not say how many classes there are, with the target's number.

    Raises:
      ValueError: an answer that does not fit, see `qmx.ledger.Ledger.ask`; no answer; answers in
        the order of other images, in this trial or in one before.
    """
    kind = run.config.target.kind
    if isinstance(target, NotDone):
        return run
    if target.path:
        return run if run.data.classes else of_classes(run, read_facts(target.path)["classes"])
    new = run.only == "all" and kind != "recorded" and not all_asked(run, target.sha256)
    if new:
        note_calls(run, target)  # before a ledger that is gone is begun anew
        new = not passed(run, target)
    ids = np.arange(min(FEW, run.data.evaluation.size))
    ask = cache(partial(target_query, run, target))  # a model is loaded once
    if not run.data.classes:
        run = of_classes(run, asked_for_classes(run, target, ask, ids))
    if new:
        for some in filter(len, (ids[:1], ids[1:])):
            seconds = ask_some(run, target, ask, some, max_refused=1.0)
        refuse_refusals(run, target, ask, ids)
        if questions(run) >= MANY and len(ids) == FEW:
            look_again(run, target, ask())
        write_verdict(run, target, "")
        say(planned(run, seconds, len(some)))
    return run


def passed(run: Run, target: Target) -> bool:
    """True if this target's trial was passed before.

    Raises:
      ValueError: it was not, and answers in the ledger may be other images'.
    """

    found = from_first(lambda: verdict(run, target.sha256))
    if found:
        raise ValueError(found)
    return found is not None


def write_verdict(run: Run, target: Target, found: str) -> None:
    """Write down what a trial found: "" if there is nothing against the target."""
    from_first(lambda: write_sealed(run.workdir / VERDICTS, {target.sha256: found}))


def of_classes(run: Run, classes: int) -> Run:
    """The run with another number of classes."""
    return run._replace(data=run.data._replace(classes=classes))


def ask_some(
    run: Run,
    target: Target,
    ask: Callable[[], Query],
    ids: np.ndarray,
    max_refused: float | None = None,
) -> float:
    """Ask about evaluation images that have no answer yet; returns the seconds that it took."""
    began, source = time.monotonic(), run.data.evaluation
    ask_about(run, target, ask, source, ids, "report", "a trial of the target", max_refused)
    return time.monotonic() - began


def refuse_refusals(run: Run, target: Target, ask: Callable[[], Query], ids: np.ndarray) -> None:
    """Raise TooManyRefused if none of the trial's images has an answer, or more have none than the
    whole run may leave out."""
    keys = keys_of(run.data.evaluation.shown(ids), **target.identity)
    refused = in_ledger(run, target.identity, lambda ledger: len(ledger.refused(keys)))
    if refused == len(ids) or refused > run.config.target.max_refused * questions(run):
        ask_some(run, target, ask, ids)  # asks nothing more, and says why


def asked_for_classes(run: Run, target: Target, ask: Callable[[], Query], ids: np.ndarray) -> int:
    """N, by the target's answers; where there is none yet, by that to the first of some evaluation
    images that it answers. 0 if this call must not ask."""

    def known() -> int:
        return in_ledger(run, target.identity, lambda ledger: ledger.read_keys([]).shape[1])

    if run.only not in ("all", "select", "query"):
        return known()
    for one in ids:
        if classes := known():
            return classes
        ask_some(run, target, ask, np.array([one]), max_refused=1.0)
    if classes := known():
        return classes
    raise ValueError(
        f"the target answered none of the first {len(ids)} evaluation images, so that the number of"
        " its classes is not known; target.classes names a file that says it, one a line"
    )


def look_again(run: Run, target: Target, query: Query) -> None:
    """Ask about the third image and the first, of which the first was asked about alone, and say
    what is odd about the answers; see `oddity`."""
    source, who = run.data.evaluation, target.identity
    images = source.shown(np.array([2, 0]))
    if in_ledger(run, who, lambda ledger: ledger.count_missing(images)):
        return  # one of them was refused
    some = images[-1:] if run.config.target.batch_size == 1 else images

    def look(ledger: Ledger) -> str:
        alone = ledger.read(images[-1:], run.config.target.access)[0]
        try:
            return oddity(alone, ask_again(ledger, query, some))
        except (Unavailable, Refused):
            return ""  # nothing that the run needs

    odd = in_ledger(run, who, look)
    if odd.startswith(ORDER):
        odd = (
            f"{odd} (the answers so far may be other images': take another --workdir, or ask"
            f" everything anew by --update={NEW})"
        )
        write_verdict(run, target, odd)
        raise ValueError(odd)
    if odd:
        say(f"warning: {odd}")


def oddity(alone: np.ndarray, together: np.ndarray) -> str:
    """A line on a target whose answer to an image differs from that to the same image before; "" if
    it does not.

    Args:
      alone: f32[N], the answer to the image by itself.
      together: f32[n, N], of a request for some images, of which it is the last.
    """
    scale = max(float(np.ptp(alone)), 1e-6)
    apart = np.abs(together - alone).max(1) / scale
    if apart[-1] <= SAME:
        return ""
    if apart.min() <= SAME:
        return (
            f"{ORDER}: of {len(apart)} images the answer to the last came in place"
            f" {int(apart.argmin()) + 1}; target.batch_size=1 asks about one at a time"
        )
    beside = (
        ", or looks at the images beside it: target.batch_size=1 asks about each alone"
        if len(apart) > 1
        else ""
    )
    return (
        f"the target's answer to one image, asked twice, differs by {100 * apart[-1]:.2g} % of the"
        f" range of its scores, so that no copy can have full fidelity: it is random{beside}"
    )


def questions(run: Run) -> int:
    """Number of images that a run asks about, or more."""
    config, pool = run.config, run.data.pool.size
    largest = max(cell.queries for cell in cells(config, pool))
    return max(len(chosen_up_front(config, run.data)), largest) + run.data.evaluation.size


def planned(run: Run, seconds: float, images: int) -> str:
    """A line on the cost of all questions of a run, by one request of so many images."""
    config, count = run.config, questions(run)
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
