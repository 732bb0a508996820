"""Selecting what to ask about, and asking: the only stage that holds the target."""

import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qmx.data import Dataset, subset_size
from qmx.data.batches import ahead
from qmx.evaluate import top_k
from qmx.oracle import BudgetSpent, Ledger
from qmx.oracle.select import select
from qmx.progress import Progress, progress, say
from qmx.settings import Cell, cells
from qmx.stages.run import Run
from qmx.stages.target import open_ledger, preprocessing, target, target_query

CHUNK = 4096  # images between two looks at the budget, 0.6 GB of them at 224 pixels


def selection(this: Run, cell: Cell) -> np.ndarray:
    """The pool's images whose answers a cell learns from, i64[budget]."""
    config = this.config
    budget = subset_size(cell.fraction, this.data.pool.size)
    name = f"{cell.select}-{cell.fraction:g}-seed{cell.seed}"

    def work(directory: Path) -> dict:
        ids = select(cell.select, this.data.pool, budget, cell.seed, config.lists)
        np.save(directory / "ids.npy", ids)
        return {"images": budget, "crc32": zlib.crc32(ids.tobytes())}

    inputs = {"select": cell.select, "seed": cell.seed, "budget": budget}
    if cell.select == "list":
        inputs["lists"] = [Path(path).read_text() for path in config.lists]
    this.stage("select", name, inputs, work)
    return np.load(this.workdir / "select" / name / "ids.npy", allow_pickle=False)


def query(this: Run, todo: list[Cell]) -> dict:
    """Ask the target about the evaluation images, and about every image that some cell learns from.

    Leaves the keys of all these images in the ledger, by which the later stages read the answers.
    """
    ids = np.unique(np.concatenate([selection(this, cell) for cell in todo]))
    evaluation = this.data.evaluation

    def work(directory: Path) -> dict:
        keys = {}
        with open_ledger(this) as ledger:
            ask = None
            for purpose, source, wanted in (("report", evaluation, np.arange(evaluation.size)),
                                            ("train", this.data.pool, ids)):
                found: list[bytes] = []
                with progress(f"query for {purpose}", len(wanted), unit="images") as shown:
                    for done, images in ahead(source.shown, wanted, CHUNK):
                        if ask is None and ledger.count_missing(images):
                            ask = target_query(this)
                        before = len(found)
                        ledger.ask(ask or _nothing, images, purpose=purpose,
                                   on_progress=partial(_update, shown, before))
                        found += ledger.keys(images)
                        shown.update(done)
                keys[purpose] = found
                if purpose == "report":
                    measured = accuracy_by_answers(ledger, found, evaluation.labels)
                    if warning := unexpected(this.config.target.expect, measured, evaluation.size):
                        say(f"warning: {warning}")
        both = len(set(keys["report"]) & set(keys["train"]))
        if both:
            say(f"warning: {both} of the images asked about for training are evaluation images too, which flatters "
                "every figure; remove them from one side")
        rows = {name: np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32) for name, found in keys.items()}
        np.savez(directory / "keys.npz", ids=ids, train=rows["train"], report=rows["report"])
        return {"images": len(ids), **measured}

    inputs = {"target": target(this)["sha256"], "preprocessing": preprocessing(this),
              "images": zlib.crc32(ids.tobytes())}
    return this.stage("query", ".", inputs, work)


def _update(shown: Progress, before: int, answered: int, _: int) -> None:
    shown.update(before + answered)


def _nothing(images: np.ndarray) -> np.ndarray:
    raise AssertionError("every image has its answer already")


def accuracy_by_answers(ledger: Ledger, keys: list[bytes], labels: np.ndarray) -> dict[str, float]:
    """The target's accuracy by its answers to the evaluation images, in per cent."""
    answers = ledger.read_keys(keys)
    return {f"top{k}": top_k(answers, labels, k) for k in (1, 5)}


def unexpected(expect: tuple[float, ...], measured: dict[str, float], size: int) -> str | None:
    """A warning where a target is not as accurate as the config says; None where it is, up to chance."""
    for k, want in zip((1, 5), expect, strict=False):
        # Three standard errors of `size` images, and what another JPEG decoder may change.
        slack = 0.2 + 300 * (want / 100 * (1 - want / 100) / size) ** 0.5
        if abs(measured[f"top{k}"] - want) > slack:
            return (f"the target scores {measured['top1']:.1f} / {measured['top5']:.1f} on these {size} images and the "
                    f"config expects {expect[0]:g} / {expect[1]:g}: other weights, other images, or another order of "
                    "classes (83.3 / 96.8 is the wrongly saved resnext101_32x16d_swsl)")
    return None


def pool_keys(this: Run, ids: np.ndarray) -> list[bytes]:
    """The ledger's keys of pool images that were asked about."""
    with np.load(this.workdir / "query/keys.npz", allow_pickle=False) as file:
        rows = file["train"][np.searchsorted(file["ids"], ids)]
    return [row.tobytes() for row in rows]


def evaluation_keys(this: Run) -> list[bytes]:
    """The ledger's keys of the evaluation images."""
    with np.load(this.workdir / "query/keys.npz", allow_pickle=False) as file:
        return [row.tobytes() for row in file["report"]]


def check_budget(config: Any, directory: Path, data: Dataset) -> None:
    """Raise BudgetSpent at once if the grid asks for more distinct images than the budget allows.

    The ledger would stop it too, but only after the pretraining. Nothing is written.

    Raises:
      ValueError: a selection that cannot be made of this pool.
    """
    wanted = {(c.select, c.seed, c.fraction): c for c in cells(config)}.values()
    ids = np.unique(np.concatenate([select(c.select, data.pool, subset_size(c.fraction, data.pool.size), c.seed,
                                           config.lists) for c in wanted]))
    if config.budget is not None and len(ids) > config.budget:
        spent = 0
        done = directory / "target" / "result.json"
        if done.exists() and (directory / "ledger.sqlite").exists():
            sha256 = json.loads(done.read_text())["sha256"]
            with Ledger(directory / "ledger.sqlite", target=sha256) as ledger:
                spent = ledger.spent()
        raise BudgetSpent(f"the grid asks about {len(ids)} distinct images and the budget is {config.budget} "
                          f"({spent} spent so far, nothing asked now); raise --config.budget, or lower "
                          "--config.fractions or the number of seeds")
