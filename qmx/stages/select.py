"""Selection: the images of the pool that the target is asked about."""

import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qmx.data import Dataset
from qmx.files import read_arrays, write_arrays
from qmx.grid import Cell, cells, teacher
from qmx.progress import say
from qmx.selection.by_answers import BY_ANSWERS
from qmx.selection.by_features import BY_FEATURES, NESTED
from qmx.selection.select import NEED_FEATURES
from qmx.selection.select import select as in_order
from qmx.sharding import first, from_first
from qmx.stages.features import Features, choice_inputs, read_rows, shown_at
from qmx.stages.rounds import in_rounds, inputs_of
from qmx.stages.run import Run, needed
from qmx.stages.target import Target
from qmx.workdir import NotDone


class Selection(NamedTuple):
    """Images of the pool whose answers a cell learns from."""

    ids: np.ndarray  # i64[queries]
    crc32: int  # of them


def select(
    run: Run, cell: Cell, features: Features | NotDone | None, target: Target | NotDone
) -> Selection:
    """The images of a cell.

    To choose by answers the target is asked here already, see `qmx.stages.rounds.in_rounds`.

    Args:
      features: of the cell's encoder, or of the one that it learned from; read if its way of
        choosing needs them.
      target: read by ways that choose by answers alone.
    """
    way, budget, seed = cell.select, cell.queries, cell.seed
    name, inputs = f"{way}-{budget}-seed{seed}", {"select": way, "seed": seed, "budget": budget}
    if way in BY_FEATURES:  # whoever has these features chooses these images
        name = f"{teacher(run.config, cell.init) or cell.init}-{name}"
    if way in BY_ANSWERS:
        name = f"{cell.init}-{way}-{cell.access}-{budget}-seed{seed}"
        inputs |= inputs_of(run, cell, needed(target))
    if chosen_by_features(cell, run.data.pool.size):
        encoder = needed(features).encoder
        inputs |= {"encoder": encoder.sha256, **shown_at(run, encoder)}
        if way in BY_FEATURES:
            inputs |= choice_inputs(run)
    if way == "list":
        inputs["lists"] = [Path(path).read_text() for path in run.config.lists]

    def work(directory: Path) -> dict:
        ids = _choose(run, cell, features, target)
        if first():
            write_arrays(directory / "ids.npz", ids=ids)
        return {"images": budget, "crc32": zlib.crc32(ids.tobytes())}

    result = run.stage("select", name, {"pool": run.data.pool_digest, **inputs}, work)
    ids = read_arrays(run.workdir / "select" / name / "ids.npz")["ids"]
    return Selection(ids, result["crc32"])


def _choose(run: Run, cell: Cell, features: Any, target: Any) -> np.ndarray:
    """The choice itself, i64[queries]."""
    pool, budget = run.data.pool, cell.queries
    if cell.select in BY_ANSWERS:
        return in_rounds(run, cell, needed(features), needed(target))
    if cell.select not in BY_FEATURES:
        return in_order(cell.select, pool, budget, cell.seed, run.config.lists)
    if not chosen_by_features(cell, pool.size):
        return np.arange(budget)  # all of them: there is nothing to choose
    features = needed(features)
    say(
        f"{cell.select} chooses {budget} of {pool.size} images by the features of"
        f" {features.encoder.init} seed {cell.seed}"
    )
    largest = budget
    if cell.select in NESTED:
        largest = max(
            one.queries
            for one in cells(run.config, pool.size)
            if (one.start, one.select) == (cell.start, cell.select)
            and chosen_by_features(one, pool.size)
        )
    made_of = features.path, features.encoder.sha256, features.patches
    weight, classes = run.config.selection.patches, run.data.classes
    # In one process: another machine's sums may round another way, and choose others.
    return from_first(
        lambda: _chosen(*made_of, weight, cell.select, largest, cell.seed, classes)[:budget]
    )


@lru_cache(maxsize=64)  # the budgets come one after the other, each with all seeds
def _chosen(
    path: Path,
    sha256: str,
    patches: Path | None,
    weight: float,
    way: str,
    budget: int,
    seed: int,
    classes: int,
) -> np.ndarray:
    """A choice by features, i64[budget], which may serve smaller budgets too."""
    del sha256  # other features of the same name
    rows = read_rows(path, patches, weight)
    return BY_FEATURES[way](rows, budget, np.random.default_rng(seed), classes)


def chosen_by_features(cell: Cell, size: int) -> bool:
    """True if a cell's images are chosen by features of its encoder, alone or with answers.

    Args:
      size: number of the pool's images; where all are asked about, none is chosen by features.
    """
    return cell.select in BY_ANSWERS or (cell.select in BY_FEATURES and cell.queries < size)


def chosen_up_front(config: Any, data: Dataset) -> np.ndarray:
    """The pool's images that the grid asks about whatever the features and answers will be, i64[n],
    in order.

    Raises:
      ValueError: a selection that cannot be made of this pool.
    """
    wanted = dict.fromkeys(
        (cell.select, cell.queries, cell.seed)
        for cell in cells(config, data.pool.size)
        if cell.select not in NEED_FEATURES
    )
    ids = [in_order(way, data.pool, budget, seed, config.lists) for way, budget, seed in wanted]
    return np.unique(np.concatenate([*ids, np.zeros(0, np.int64)]))
