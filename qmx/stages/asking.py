"""Selecting what to ask about, and asking: with `qmx.stages.rounds` all that holds the target."""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qmx.data import Dataset
from qmx.evaluate import top_k
from qmx.grid import Cell, budget_keys, cells
from qmx.oracle import BudgetSpent, Ledger
from qmx.oracle.by_answers import BY_ANSWERS
from qmx.oracle.by_features import BY_FEATURES
from qmx.oracle.select import NEED_FEATURES, select
from qmx.progress import say
from qmx.sharding import first, from_first
from qmx.stages.answers import ask_about, read_scores, shows
from qmx.stages.encoders import features, pretrain
from qmx.stages.rounds import in_rounds, inputs_of
from qmx.stages.run import Run
from qmx.stages.target import identity, target_query
from qmx.workdir import write_arrays


def selection(this: Run, cell: Cell) -> np.ndarray:
    """The pool's images whose answers a cell learns from, i64[queries].

    To choose by answers the target is asked here already, see `qmx.stages.rounds.in_rounds`.
    """
    config, budget = this.config, cell.queries
    inputs = {"select": cell.select, "seed": cell.seed, "budget": budget}
    name = f"{cell.select}-{budget}-seed{cell.seed}"
    if cell.select in BY_FEATURES:
        name = f"{cell.init}-{name}"
        inputs["encoder"] = pretrain(this, cell.init, cell.seed)["sha256"]
    if cell.select in BY_ANSWERS:
        name = f"{cell.init}-{cell.select}-{cell.access}-{budget}-seed{cell.seed}"
        inputs |= inputs_of(this, cell)

    def work(directory: Path) -> dict:
        if cell.select in BY_FEATURES and budget == this.data.pool.size:
            ids = np.arange(budget)  # all of them: there is nothing to choose
        elif cell.select in BY_FEATURES:
            rows, way = features(this, cell.init, cell.seed), BY_FEATURES[cell.select]
            say(f"{cell.select} chooses {budget} of {len(rows)} images by the features of {cell.init} seed {cell.seed}")
            # In one process: another machine's sums may round another way, and choose others.
            ids = from_first(lambda: way(rows, budget, np.random.default_rng(cell.seed)))
        elif cell.select in BY_ANSWERS:
            ids = in_rounds(this, cell)
        else:
            ids = select(cell.select, this.data.pool, budget, cell.seed, config.lists)
        if first():
            write_arrays(directory / "ids.npz", ids=ids)
        return {"images": budget, "crc32": zlib.crc32(ids.tobytes())}

    if cell.select == "list":
        inputs["lists"] = [Path(path).read_text() for path in config.lists]
    this.stage("select", name, inputs, work)
    with np.load(this.workdir / "select" / name / "ids.npz", allow_pickle=False) as file:
        return file["ids"]


def query(this: Run, todo: list[Cell]) -> dict:
    """Ask the target about the evaluation images, and about every image that some cell learns from.

    Those whose answers chose others were asked about before, and stay "select" in the ledger's account. Leaves the keys
    of all these images in the ledger, by which the later stages read the answers.
    """
    ids = np.unique(np.concatenate([selection(this, cell) for cell in todo]))
    evaluation = this.data.evaluation

    def work(directory: Path) -> dict:
        refuse_beyond(this.config, len(ids), this.workdir)
        keys: dict[str, list[bytes]] = {}
        ask = cache(lambda: target_query(this))
        for purpose, source, wanted in (("report", evaluation, np.arange(evaluation.size)),
                                        ("train", this.data.pool, ids)):
            keys[purpose] = ask_about(this, ask, source, wanted, purpose, f"query for {purpose}")
            if purpose == "report":
                answers = read_scores(this, keys["report"])
                measured = {f"top{k}": top_k(answers, evaluation.labels, k) for k in (1, 5)}
                if warning := unexpected(this.config.target.expect, measured, evaluation.size):
                    say(f"warning: {warning}")
        both = len(set(keys["report"]) & set(keys["train"]))
        if both:
            say(f"warning: {both} of the images asked about for training are evaluation images too, which flatters "
                "every figure; remove them from one side")
        rows = {name: np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32) for name, found in keys.items()}
        if first():
            write_arrays(directory / "keys.npz", ids=ids, train=rows["train"], report=rows["report"])
        return {"images": len(ids), **measured}

    inputs = {**identity(this), "images": zlib.crc32(ids.tobytes()), **shows(this)}
    return this.stage("query", ".", inputs, work)


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

    The ledger would stop it too, but only after the pretraining. Nothing is written. What is chosen by features
    or answers is not known yet: of it only how many images the largest budget takes.

    Raises:
      ValueError: a selection that cannot be made of this pool.
    """
    largest = max(cell.queries for cell in cells(config, data.pool.size))
    refuse_beyond(config, max(len(chosen_up_front(config, data)), largest), directory)


def chosen_up_front(config: Any, data: Dataset) -> np.ndarray:
    """The pool's images that the grid asks about whatever the features and answers will be, i64[n], in order.

    Raises:
      ValueError: a selection that cannot be made of this pool.
    """
    wanted = dict.fromkeys((cell.select, cell.queries, cell.seed) for cell in cells(config, data.pool.size)
                           if cell.select not in NEED_FEATURES)
    ids = [select(way, data.pool, budget, seed, config.lists) for way, budget, seed in wanted]
    return np.unique(np.concatenate([*ids, np.zeros(0, np.int64)]))


def refuse_beyond(config: Any, images: int, directory: Path) -> None:
    """Raise BudgetSpent if so many images are more than the budget."""
    if config.budget is not None and images > config.budget:
        spent = 0
        done = directory / "target" / "result.json"
        if done.exists() and (directory / "ledger.sqlite").exists():
            sha256 = json.loads(done.read_text())["sha256"]
            with Ledger(directory / "ledger.sqlite", target=sha256) as ledger:
                spent = ledger.spent()
        raise BudgetSpent(f"the grid asks about {images} distinct images and the budget is {config.budget} "
                          f"({spent} spent so far, nothing more is asked); raise --config.budget, or lower "
                          f"{budget_keys(config)} or the number of seeds")
