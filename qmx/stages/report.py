"""The report, from what the stages left."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version

from qmx import __version__, workdir
from qmx.grid import Cell, budgets
from qmx.report import files
from qmx.report.reach import reached
from qmx.sharding import from_first
from qmx.stages import outside
from qmx.stages.evaluate import evaluate
from qmx.stages.monitor import monitor
from qmx.stages.pretrain import pretrain
from qmx.stages.query import query, unexpected
from qmx.stages.run import Run, plain
from qmx.stages.target import identity, open_ledger, target


def write_report(run: Run, todo: list[Cell], started: list[tuple[str, int]]) -> str:
    """The report from what the stages left, and nothing else; returns the text for standard out."""
    evaluation, made, keys = run.data.evaluation, target(run), run.config.target
    # Until the evaluation images were asked about.
    accuracy: dict[str, float | None] = {"top1": None, "top5": None}
    warning = None
    if asked := _if_done(partial(query, run, todo)):
        accuracy = {"top1": asked["top1"], "top5": asked["top5"]}
        warning = unexpected(keys.expect, asked, evaluation.size)
    monitors = [
        (
            init,
            seed,
            _if_done(partial(pretrain, run, init, seed)),
            _if_done(partial(monitor, run, init, seed)),
        )
        for init, seed in started
    ]
    rows = [_if_done(partial(evaluate, run, cell, todo)) for cell in todo]

    who = identity(run)

    def account() -> dict:
        with open_ledger(run, who) as ledger:
            return ledger.account()._asdict()

    results = {
        "schema": 1,
        "target": {
            **made,
            **accuracy,
            "warning": warning,
            # What others compute has a precision of its own, which nobody says.
            "precision": None if keys.kind in outside.KINDS else keys.precision,
        },
        "pool": {
            "name": run.data.name,
            "size": run.data.pool.size,
            "evaluation": evaluation.size,
            "classes": run.data.classes,
            "sha256": run.data.digest,
            "budgets": [budget._asdict() for budget in budgets(run.config, run.data.pool.size)],
        },
        "rows": [row for row in rows if row],
        "account": from_first(account),
        "monitors": [
            {"init": init, "seed": seed, **encoder, **looked}
            for init, seed, encoder, looked in monitors
            if encoder and looked
        ],
        "versions": {
            "qmx": __version__,  # runs in a checkout that is not installed, too
            **{
                name: version(name)
                for name in ("jax", "jaxlib", "flax", "optax", "numpy", "pillow")
            },
        },
        "config": plain(run.config),
    }
    results["reach"] = reached(results)
    return from_first(lambda: files.write(run.workdir, results))


def _if_done(stage: Callable[[], dict]) -> dict | None:
    """A stage's result, None where it was not run: the report shows that and does not run it."""
    try:
        return stage()
    except workdir.NotDone:
        return None
