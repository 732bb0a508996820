"""Selecting what to ask about, and asking: the only stage that holds the target."""

import json
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from qmx.data import Dataset, subset_size
from qmx.data.batches import ahead
from qmx.evaluate import ids_here, top_k
from qmx.oracle import BudgetSpent, Ledger
from qmx.oracle.by_features import BY_FEATURES
from qmx.oracle.ledger import keys_of
from qmx.oracle.query import Query
from qmx.oracle.select import select
from qmx.progress import Progress, progress, say
from qmx.settings import Cell, cells
from qmx.sharding import first, from_first, gathered
from qmx.stages.encoders import features, pretrain
from qmx.stages.run import Run
from qmx.stages.target import open_ledger, preprocessing, target, target_query
from qmx.workdir import write_arrays

CHUNK = 4096  # images between two looks at the budget, 0.6 GB of them at 224 pixels
BATCH = 256  # images in one request


def selection(this: Run, cell: Cell) -> np.ndarray:
    """The pool's images whose answers a cell learns from, i64[budget]."""
    config = this.config
    budget = subset_size(cell.fraction, this.data.pool.size)
    inputs = {"select": cell.select, "seed": cell.seed, "budget": budget}
    name = f"{cell.select}-{cell.fraction:g}-seed{cell.seed}"
    if cell.select in BY_FEATURES:
        name = f"{cell.init}-{name}"
        inputs["encoder"] = pretrain(this, cell.init, cell.seed)["sha256"]

    def work(directory: Path) -> dict:
        if cell.select in BY_FEATURES:
            rows, way = features(this, cell.init, cell.seed), BY_FEATURES[cell.select]
            say(f"{cell.select} chooses {budget} of {len(rows)} images by the features of {cell.init} seed {cell.seed}")
            # In one process: another machine's sums may round another way, and choose others.
            ids = from_first(lambda: way(rows, budget, np.random.default_rng(cell.seed)))
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

    Leaves the keys of all these images in the ledger, by which the later stages read the answers.
    """
    ids = np.unique(np.concatenate([selection(this, cell) for cell in todo]))
    evaluation = this.data.evaluation

    def work(directory: Path) -> dict:
        refuse_beyond(this.config.budget, len(ids), this.workdir)
        keys: dict[str, list[bytes]] = {}
        ask = cache(lambda: target_query(this))
        for purpose, source, wanted in (("report", evaluation, np.arange(evaluation.size)),
                                        ("train", this.data.pool, ids)):
            keys[purpose], name = [], f"query for {purpose}"
            with progress(name, len(wanted), unit="images") as shown:
                for images in read_together(source.shown, wanted):
                    ask_together(this, ask, images, purpose,
                                 partial(_answered, this, shown, name, len(keys[purpose]), len(wanted)))
                    keys[purpose] += keys_of(images, target(this)["sha256"], preprocessing(this))
                    shown.update(len(keys[purpose]))
            if purpose == "report":
                answers = read_answers(this, keys["report"])
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

    inputs = {"target": target(this)["sha256"], "preprocessing": preprocessing(this),
              "images": zlib.crc32(ids.tobytes())}
    return this.stage("query", ".", inputs, work)


def _answered(this: Run, shown: Progress, name: str, before: int, total: int, answered: int, _: int) -> None:
    shown.update(before + answered)
    this.go_on(name, before + answered, total)


def read_together(read: Callable[[np.ndarray], np.ndarray], ids: np.ndarray) -> Iterator[np.ndarray]:
    """Images in chunks, whole in every process, each of which reads its share of a chunk."""
    here = ids_here(len(ids), -(-len(ids) // -(-len(ids) // CHUNK)))  # chunks of one size, hardly any filling
    left = len(ids)
    for _, images in ahead(read, ids[here].ravel(), here.shape[1]):
        chunk = gathered(images)[:left]
        left -= len(chunk)
        yield chunk


def ask_together(this: Run, ask: Callable[[], Query], images: np.ndarray, purpose: str,
                 on_progress: Callable[[int, int], None]) -> None:
    """Answers for a chunk of images into the ledger, which the first process keeps.

    The target computes in all processes: the others ask it the same batches as the ledger does, and
    `on_progress` is called in all of them after each.
    """
    sha256 = target(this)["sha256"]

    def unanswered() -> list[int]:
        with open_ledger(this, sha256) as ledger:
            return ledger.unanswered(images)

    rows = from_first(unanswered)
    if first():
        with open_ledger(this, sha256) as ledger:
            ledger.ask(lambda batch: ask()(batch), images, purpose=purpose, batch_size=BATCH, on_progress=on_progress)
    else:
        for start in range(0, len(rows), BATCH):
            ask()(images[rows[start : start + BATCH]])
            on_progress(min(start + BATCH, len(rows)), len(rows))


def read_answers(this: Run, keys: list[bytes], access: str = "logits") -> np.ndarray:
    """The answers to images by their keys, f32[n, N], in every process."""
    sha256 = target(this)["sha256"]

    def read() -> np.ndarray:
        with open_ledger(this, sha256) as ledger:
            return ledger.read_keys(keys, access)

    return from_first(read)


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
    is not known yet: of it only how many images the largest budget takes.

    Raises:
      ValueError: a selection that cannot be made of this pool.
    """
    wanted = {(c.select, c.seed, c.fraction): c for c in cells(config)}.values()
    known, largest = set[int](), 0
    for cell in wanted:
        size = subset_size(cell.fraction, data.pool.size)
        largest = max(largest, size)
        if cell.select not in BY_FEATURES:
            known.update(select(cell.select, data.pool, size, cell.seed, config.lists).tolist())
    refuse_beyond(config.budget, max(len(known), largest), directory)


def refuse_beyond(budget: int | None, images: int, directory: Path) -> None:
    """Raise BudgetSpent if so many images are more than the budget."""
    if budget is not None and images > budget:
        spent = 0
        done = directory / "target" / "result.json"
        if done.exists() and (directory / "ledger.sqlite").exists():
            sha256 = json.loads(done.read_text())["sha256"]
            with Ledger(directory / "ledger.sqlite", target=sha256) as ledger:
                spent = ledger.spent()
        raise BudgetSpent(f"the grid asks about {images} distinct images and the budget is {budget} "
                          f"({spent} spent so far, nothing asked now); raise --config.budget, or lower "
                          "--config.fractions or the number of seeds")
