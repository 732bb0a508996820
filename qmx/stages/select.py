"""Selection: which images of the pool the target is asked about."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from qmx.data import Dataset
from qmx.grid import Cell, cells
from qmx.progress import say
from qmx.selection.by_answers import BY_ANSWERS
from qmx.selection.by_features import BY_FEATURES
from qmx.selection.select import NEED_FEATURES, select
from qmx.sharding import first, from_first
from qmx.stages.features import features
from qmx.stages.pretrain import pretrain
from qmx.stages.rounds import in_rounds, inputs_of
from qmx.stages.run import Run
from qmx.workdir import write_arrays


def selection(run: Run, cell: Cell) -> np.ndarray:
    """The pool's images whose answers a cell learns from, i64[queries].

    To choose by answers the target is asked here already, see `qmx.stages.rounds.in_rounds`.
    """
    config, budget = run.config, cell.queries
    inputs = {"select": cell.select, "seed": cell.seed, "budget": budget}
    name = f"{cell.select}-{budget}-seed{cell.seed}"
    if cell.select in BY_FEATURES:
        name = f"{cell.init}-{name}"
        inputs["encoder"] = pretrain(run, cell.init, cell.seed)["sha256"]
    if cell.select in BY_ANSWERS:
        name = f"{cell.init}-{cell.select}-{cell.access}-{budget}-seed{cell.seed}"
        inputs |= inputs_of(run, cell)

    def work(directory: Path) -> dict:
        if cell.select in BY_FEATURES and budget == run.data.pool.size:
            ids = np.arange(budget)  # all of them: there is nothing to choose
        elif cell.select in BY_FEATURES:
            rows, way = features(run, cell.init, cell.seed), BY_FEATURES[cell.select]
            say(
                f"{cell.select} chooses {budget} of {len(rows)} images by the features of"
                f" {cell.init} seed {cell.seed}"
            )
            # In one process: another machine's sums may round another way, and choose others.
            ids = from_first(lambda: way(rows, budget, np.random.default_rng(cell.seed)))
        elif cell.select in BY_ANSWERS:
            ids = in_rounds(run, cell)
        else:
            ids = select(cell.select, run.data.pool, budget, cell.seed, config.lists)
        if first():
            write_arrays(directory / "ids.npz", ids=ids)
        return {"images": budget, "crc32": zlib.crc32(ids.tobytes())}

    if cell.select == "list":
        inputs["lists"] = [Path(path).read_text() for path in config.lists]
    run.stage("select", name, inputs, work)
    with np.load(run.workdir / "select" / name / "ids.npz", allow_pickle=False) as file:
        return file["ids"]


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
    ids = [select(way, data.pool, budget, seed, config.lists) for way, budget, seed in wanted]
    return np.unique(np.concatenate([*ids, np.zeros(0, np.int64)]))
