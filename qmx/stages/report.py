"""The report, from the artefacts of the other stages and nothing else."""

from importlib.metadata import version

from qmx import __version__
from qmx.grid import budgets
from qmx.report import files
from qmx.report.reach import reached
from qmx.sharding import from_first
from qmx.stages import outside
from qmx.stages.answers import Answers
from qmx.stages.pretrain import Pretrained
from qmx.stages.query import note_calls, unexpected
from qmx.stages.run import Run, needed, plain
from qmx.stages.target import Target, in_ledger
from qmx.workdir import NotDone

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow")


def report(
    run: Run,
    target: Target | NotDone,
    encoders: list[Pretrained | NotDone],
    monitors: list[dict | NotDone],
    answers: Answers | NotDone,
    rows: list[dict | NotDone],
) -> str:
    """Write the report; returns the text for standard out. What was not run is shown as not run."""
    target = needed(target)
    keys, data = run.config.target, run.data
    facts = {"name": target.name, "sha256": target.sha256}
    facts |= {"arch": target.arch} if target.path else {"preprocessing": target.preprocessing}
    accuracy: dict[str, float | None] = {"top1": None, "top5": None}
    warning = None
    if not isinstance(answers, NotDone):
        measured = {"top1": answers.top1, "top5": answers.top5}
        accuracy |= measured
        warning = unexpected(keys.expect, measured, data.evaluation.size)

    account = in_ledger(run, target.identity, lambda ledger: ledger.account()._asdict())
    results = {
        "schema": 1,
        "target": {
            **facts,
            **accuracy,
            "warning": warning,
            # What others compute has a precision of its own, which nobody says.
            "precision": None if keys.kind in outside.KINDS else keys.precision,
        },
        "pool": {
            "name": data.name,
            "size": data.pool.size,
            "evaluation": data.evaluation.size,
            "classes": data.classes,
            "sha256": data.digest,
            "budgets": [budget._asdict() for budget in budgets(run.config, data.pool.size)],
        },
        "rows": [row for row in rows if not isinstance(row, NotDone)],
        "account": {**account, "lost": note_calls(run, target)},
        "monitors": [
            {"init": encoder.init, "seed": encoder.seed, **encoder.facts, **look}
            for encoder, look in zip(encoders, monitors, strict=True)
            if not (isinstance(encoder, NotDone) or isinstance(look, NotDone))
        ],
        "versions": {
            "qmx": __version__,  # runs in a checkout that is not installed, too
            **{name: version(name) for name in PACKAGES},
        },
        "config": plain(run.config),
    }
    results["reach"] = reached(results)
    return from_first(lambda: files.write(run.workdir, results))
