"""target -> pretrain -> monitor -> select -> query -> distill -> evaluate -> report.

Each stage leaves an artefact in the workdir and is skipped when the same inputs already made it:

    target/                       the target's weights
    pretrain/<init>-seed<s>/      an encoder
    monitor/<init>-seed<s>/       what its features are good for
    select/<way>-<queries>-seed<s>/   the pool's images that are asked about; to choose by answers (margin, entropy)
                                       this stage asks the target too, all rounds but the last
    query/                        the rest is asked; the ledger's keys of all images that were asked about
    ledger.sqlite                 every answer of the target
    distill/<cell>/               a student
    evaluate/<cell>/              its row of the table
    results.json report.md report.html curve.png

`qmx/stages/` holds them in this order.
"""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qmx import __version__, report, workdir
from qmx.data import Dataset
from qmx.grid import Cell, budgets, cells, encoders
from qmx.progress import say
from qmx.reach import reached
from qmx.sharding import from_first
from qmx.stages import outside, recorded
from qmx.stages.asking import chosen_up_front, query, selection, unexpected
from qmx.stages.encoders import converted as converted_encoder
from qmx.stages.encoders import monitor, pretrain
from qmx.stages.run import Run, plain
from qmx.stages.students import distill, evaluate
from qmx.stages.target import converted as converted_target
from qmx.stages.target import identity, open_ledger, target

STAGES = ("target", "pretrain", "monitor", "select", "query", "distill", "evaluate", "report")


def run(config: Any, directory: Path, data: Dataset, only: str, stopped: Callable[[], bool]) -> str:
    """All stages, or one; returns the text for standard out.

    Raises:
      BudgetSpent: before the target is asked more than the budget allows.
      Stopped, FloatingPointError: see `qmx.train.fit`.
      NotDone: one stage was asked for whose inputs are missing.
      ValueError: weights that do not fit; found before anything is trained.
    """
    this = Run(config, directory, data, only, stopped, [])
    wanted = {stage: only in ("all", stage) for stage in STAGES}
    todo = cells(config, data.pool.size)
    started = [(init, seed) for init in encoders(config) for seed in config.seeds]
    if wanted["pretrain"]:  # what is brought along comes first: a wrong file is found before anything is trained
        for init, seed in started:
            if config.pretrain[init].path:
                pretrain(this, init, seed)
    if wanted["target"]:
        target(this)
    for stage, work in (("pretrain", pretrain), ("monitor", monitor)):
        if wanted[stage]:
            for init, seed in started:
                work(this, init, seed)
    if wanted["select"]:
        for cell in todo:
            selection(this, cell)
    if wanted["query"]:
        query(this, todo)
    for cell in todo:
        if wanted["distill"]:
            distill(this, cell, todo)
        if wanted["evaluate"]:
            evaluate(this, cell, todo)
    if not this.made:
        say(f"all of it was done before, in {directory}; nothing was trained or asked")
    if not wanted["report"]:
        return f"stage {only} is done; --stage=report shows where things stand"
    return write_report(this, todo, started)


def check_weights(config: Any, data: Dataset) -> None:
    """Raise ValueError for weights files that the config names and that do not fit, or a target elsewhere that does
    not, and Unavailable if it is not there; nothing is written."""
    if config.target.kind in outside.KINDS:
        outside.describe(config.target, data)
    if config.target.kind == "recorded":
        recorded.refuse_missing(config, data, chosen_up_front(config, data))
    if config.target.kind == "torch":
        converted_target(config.target, data)
    for init in encoders(config):
        if config.pretrain[init].path:
            converted_encoder(config, init, data)


def write_report(this: Run, todo: list[Cell], started: list[tuple[str, int]]) -> str:
    """The report from what the stages left, and nothing else; returns the text for standard out."""
    evaluation, made, keys = this.data.evaluation, target(this), this.config.target
    accuracy: dict[str, float | None] = {"top1": None, "top5": None}  # until the evaluation images were asked about
    warning = None
    if asked := _if_done(partial(query, this, todo)):
        accuracy = {"top1": asked["top1"], "top5": asked["top5"]}
        warning = unexpected(keys.expect, asked, evaluation.size)
    monitors = [(init, seed, _if_done(partial(pretrain, this, init, seed)),
                 _if_done(partial(monitor, this, init, seed))) for init, seed in started]
    rows = [_if_done(partial(evaluate, this, cell, todo)) for cell in todo]

    who = identity(this)

    def account() -> dict:
        with open_ledger(this, who) as ledger:
            return ledger.account()._asdict()

    results = {
        "schema": 1,
        "target": {**made, **accuracy, "warning": warning,
                   # What others compute has a precision of its own, which nobody says.
                   "precision": None if keys.kind in outside.KINDS else keys.precision},
        "pool": {"name": this.data.name, "size": this.data.pool.size, "evaluation": evaluation.size,
                 "classes": this.data.classes, "sha256": this.data.digest,
                 "budgets": [budget._asdict() for budget in budgets(this.config, this.data.pool.size)]},
        "rows": [row for row in rows if row],
        "account": from_first(account),
        "monitors": [{"init": init, "seed": seed, **encoder, **looked} for init, seed, encoder, looked in monitors
                     if encoder and looked],
        "versions": {"qmx": __version__,  # runs in a checkout that is not installed, too
                     **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy", "pillow")}},
        "config": plain(this.config),
    }
    results["reach"] = reached(results)
    return from_first(lambda: report.write(this.workdir, results))


def _if_done(stage: Callable[[], dict]) -> dict | None:
    """A stage's result, None where it was not run: the report shows that and does not run it."""
    try:
        return stage()
    except workdir.NotDone:
        return None
