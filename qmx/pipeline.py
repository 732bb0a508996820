"""target -> pretrain -> monitor -> select -> query -> distill -> evaluate -> report.

Each stage leaves an artefact in the workdir and is skipped when the same inputs already made it:

    target/                       the target's weights
    pretrain/<init>-seed<s>/      an encoder
    monitor/<init>-seed<s>/       what its features are good for
    select/<way>-<queries>-seed<s>/   the pool's images that are asked about; to choose by answers
                                      (margin, entropy) this stage asks the target too, all rounds
                                      but the last
    query/                        the rest is asked; the ledger's keys of all images asked about
    ledger.sqlite                 every answer of the target
    distill/<cell>/               a student
    evaluate/<cell>/              its row of the table
    results.json report.md report.html curve.png

`qmx/stages/` holds them in this order.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qmx.data import Dataset
from qmx.grid import cells, encoders
from qmx.progress import say
from qmx.stages import outside, recorded
from qmx.stages.distill import distill
from qmx.stages.evaluate import evaluate
from qmx.stages.monitor import monitor
from qmx.stages.pretrain import converted as converted_encoder
from qmx.stages.pretrain import pretrain
from qmx.stages.query import query
from qmx.stages.report import write_report
from qmx.stages.run import Run
from qmx.stages.select import chosen_up_front, selection
from qmx.stages.target import converted as converted_target
from qmx.stages.target import target

STAGES = ("target", "pretrain", "monitor", "select", "query", "distill", "evaluate", "report")


def run(config: Any, directory: Path, data: Dataset, only: str, stopped: Callable[[], bool]) -> str:
    """All stages, or one; returns the text for standard out.

    Raises:
      BudgetSpent: before the target is asked more than the budget allows.
      Stopped, FloatingPointError: see `qmx.train.fit`.
      NotDone: one stage was asked for whose inputs are missing.
      ValueError: weights that do not fit; found before anything is trained.
    """
    run = Run(config, directory, data, only, stopped, [])
    wanted = {stage: only in ("all", stage) for stage in STAGES}
    todo = cells(config, data.pool.size)
    started = [(init, seed) for init in encoders(config) for seed in config.seeds]
    # What is brought along comes first: a wrong file is found before anything is trained.
    if wanted["pretrain"]:
        for init, seed in started:
            if config.pretrain[init].path:
                pretrain(run, init, seed)
    if wanted["target"]:
        target(run)
    for stage, work in (("pretrain", pretrain), ("monitor", monitor)):
        if wanted[stage]:
            for init, seed in started:
                work(run, init, seed)
    if wanted["select"]:
        for cell in todo:
            selection(run, cell)
    if wanted["query"]:
        query(run, todo)
    for cell in todo:
        if wanted["distill"]:
            distill(run, cell, todo)
        if wanted["evaluate"]:
            evaluate(run, cell, todo)
    if not run.made:
        say(f"all of it was done before, in {directory}; nothing was trained or asked")
    if not wanted["report"]:
        return f"stage {only} is done; --stage=report shows where things stand"
    return write_report(run, todo, started)


def check_weights(config: Any, data: Dataset) -> None:
    """Raise ValueError for weights files that the config names and that do not fit, or a target
    elsewhere that does not, and Unavailable if it is not there; nothing is written."""
    if config.target.kind in outside.KINDS:
        outside.describe(config.target, data)
    if config.target.kind == "recorded":
        recorded.refuse_missing(config, data, chosen_up_front(config, data))
    if config.target.kind == "torch":
        converted_target(config.target, data)
    for init in encoders(config):
        if config.pretrain[init].path:
            converted_encoder(config, init, data)
