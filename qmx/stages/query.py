"""Asking the target, once all selections are made; and the budget of a grid."""

import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qmx.data import Dataset
from qmx.data.folder import first_few
from qmx.files import Unreadable, read_arrays, read_json, read_sealed, write_arrays, write_sealed
from qmx.grid import budget_keys, cells
from qmx.ledger import BudgetSpent, Ledger
from qmx.metrics import top_k
from qmx.progress import say
from qmx.sharding import first
from qmx.stages.answers import Answers, afford, answered, ask_about, name_of, read_scores
from qmx.stages.run import Run, needed
from qmx.stages.select import Selection, chosen_up_front
from qmx.stages.target import Target, in_ledger, open_ledger, target_query
from qmx.workdir import NotDone


def query(run: Run, target: Target | NotDone, selections: Iterable[Selection | NotDone]) -> Answers:
    """Ask the target about the evaluation images, and about every image that some cell learns from.

    Those whose answers chose others were asked about before, and stay "select" in the ledger's
    account.
    """
    target = needed(target)
    ids = np.unique(np.concatenate([needed(selection).ids for selection in selections]))
    access, evaluation = run.config.target.access, run.data.evaluation

    def work(directory: Path) -> dict:
        refuse_beyond(run.config, len(ids), run.workdir)
        keys: dict[str, list[bytes]] = {"left_out": []}
        there: dict[str, np.ndarray] = {}  # the images that have an answer
        afford(run, target, run.data.pool, ids)  # before the evaluation images are paid
        ask = cache(lambda: target_query(run, target))
        for purpose, source, wanted in (
            ("report", evaluation, np.arange(evaluation.size)),
            ("train", run.data.pool, ids),
        ):
            name = f"query for {purpose}"
            every = ask_about(run, target, ask, source, wanted, purpose, name)
            has = answered(run, target.identity, every)
            keys[purpose] = [every[place] for place in np.flatnonzero(has)]
            keys["left_out"] += [every[place] for place in np.flatnonzero(~has)]
            there[purpose] = wanted[has]
            if not has.all():
                say(f"{name}: {(~has).sum()} of {len(has)} images have no answer and are left out")
            if purpose == "report":
                measured = accuracy(run, target, there["report"], keys["report"])
        both = set(keys["report"]) & set(keys["train"])
        if both:
            rows = [row for row, key in enumerate(keys["report"]) if key in both]
            names = [name_of(evaluation, there["report"], row) for row in rows]
            listed = "; data.leave_out takes a list of photos" if evaluation.names else ""
            say(
                f"warning: {len(both)} of the images asked about for training are evaluation images"
                f" too ({first_few(names)}), which flatters every figure; remove them from one side"
                f"{listed}"
            )
        digests = {
            name: np.frombuffer(b"".join(some), np.uint8).reshape(-1, 32)
            for name, some in keys.items()
        }
        if first():
            path = directory / "keys.npz"
            write_arrays(path, ids=there["train"], evaluation=there["report"], **digests)
        return {"images": len(there["train"]), **measured}

    inputs = {
        "pool": run.data.pool_digest,
        "evaluation": run.data.evaluation_digest,
        **target.identity,
        "images": zlib.crc32(ids.tobytes()),
        **({"shows": access} if access != "logits" else {}),
    }
    note_calls(run, target)  # else what is asked now would hide what is gone
    result = run.stage("query", ".", inputs, work, lambda: lost_answers(run, target))
    note_calls(run, target)
    rows = read_arrays(run.workdir / "query" / "keys.npz")
    rows.pop("left_out", None)
    rows.setdefault("evaluation", np.arange(len(rows["report"])))  # an older file has all
    return Answers(target.identity, **rows, top1=result["top1"], top5=result["top5"])


def accuracy(
    run: Run, target: Target, ids: np.ndarray, keys: list[bytes]
) -> dict[str, float | None]:
    """The target's accuracy on some evaluation images, in per cent, with a warning where it is
    strange; None if they have no labels."""
    config, evaluation = run.config.target, run.data.evaluation
    if not evaluation.labelled:
        return {"top1": None, "top5": None}
    scores = read_scores(run, target.identity, keys, config.access)
    measured = {f"top{k}": top_k(scores, evaluation.labels[ids], k) for k in (1, 5)}
    for warning in (
        unexpected(config.expect, measured, evaluation.size),
        near_chance(measured["top1"], run.data.classes),
    ):
        if warning:
            say(f"warning: {warning}")
    return {**measured}


def lost_answers(run: Run, target: Target) -> str | None:
    """A line on answers of the stage that are gone, as when its ledger was replaced by one that was
    recovered, or on images without an answer that may be asked about again; None if there is
    neither."""
    rows = read_arrays(run.workdir / "query" / "keys.npz")
    keys = [row.tobytes() for name in ("train", "report") for row in rows[name]]
    left_out = [row.tobytes() for row in rows.get("left_out", ())]  # an older file has none
    with open_ledger(run, target.identity) as ledger:
        missing = ledger.count_missing_keys(keys)
        forgotten = len({*left_out} - ledger.refused(left_out))
    if missing:
        return f"{missing} of {len(set(keys))} answers that it had are no longer in {ledger.path}"
    if forgotten:
        return f"{forgotten} images that had no answer may be asked about again"
    return None


def note_calls(run: Run, target: Target) -> int:
    """Write down the calls in the ledger's account, so that a ledger that is lost or cut shrinks no
    account; returns the number of calls that are no longer in it."""

    def note(ledger: Ledger) -> int:
        path, calls = run.workdir / "account.json", ledger.calls()
        try:
            told = read_sealed(path)
        except Unreadable as error:
            told = {}
            if path.exists():
                say(f"{error}; if the ledger lost calls before, they are no longer counted")
        before = told.get(target.sha256, {"calls": 0, "lost": 0})
        lost = before["lost"] + max(before["calls"] - calls, 0)
        if {"calls": calls, "lost": lost} != before:
            write_sealed(path, {**told, target.sha256: {"calls": calls, "lost": lost}})
        return lost

    return in_ledger(run, target.identity, note)


def unexpected(expect: tuple[float, ...], measured: dict[str, float], size: int) -> str | None:
    """Warning if a target is less accurate than the config says, beyond chance; else None."""
    for k, want in zip((1, 5), expect, strict=False):
        # Three standard errors of `size` images, and what another JPEG decoder may change.
        slack = 0.2 + 300 * (want / 100 * (1 - want / 100) / size) ** 0.5
        if abs(measured[f"top{k}"] - want) > slack:
            return (
                f"the target scores {measured['top1']:.1f} / {measured['top5']:.1f} on these {size}"
                f" images and the config expects {expect[0]:g} / {expect[1]:g}: other weights,"
                " other images, or another order of classes (83.3 / 96.8 is the wrongly saved"
                " resnext101_32x16d_swsl)"
            )
    return None


def near_chance(top1: float, classes: int) -> str | None:
    """Warning if a target is hardly more accurate than guessing; else None."""
    if classes < 3 or top1 > 200 / classes:
        return None
    return (
        f"the target's accuracy of {top1:.1f} % is near chance, {100 / classes:.2g} %: are its"
        " classes in the images' order (target.classes), and is it shown what it takes"
        " (target.shown)?"
    )


def check_budget(config: Any, directory: Path, data: Dataset) -> None:
    """Raise BudgetSpent at once if the grid asks for more distinct images than the budget allows.

    The ledger would stop it too, but only after the pretraining. Nothing is written. Choices by
    features or answers are not known yet: of them the largest budget counts.

    Raises:
      ValueError: a selection that cannot be made of this pool.
    """
    largest = max(cell.queries for cell in cells(config, data.pool.size))
    refuse_beyond(config, max(len(chosen_up_front(config, data)), largest), directory)


def refuse_beyond(config: Any, images: int, directory: Path) -> None:
    """Raise BudgetSpent if so many images are more than the budget."""
    if config.budget is not None and images > config.budget:
        spent = 0
        done = directory / "target" / "result.json"
        if done.exists() and (directory / "ledger.sqlite").exists():
            sha256 = read_json(done)["sha256"]
            with Ledger(directory / "ledger.sqlite", target=sha256) as ledger:
                spent = ledger.spent()
        raise BudgetSpent(
            f"the grid asks about {images} distinct images and the budget is {config.budget} "
            f"({spent} spent so far, nothing more is asked); raise --config.budget, or lower "
            f"{budget_keys(config)} or the number of seeds"
        )
