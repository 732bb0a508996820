"""The report, from the artefacts of the other stages and nothing else."""

from importlib.metadata import version
from typing import Any

from qmx import __version__
from qmx.grid import Cell, Column, budgets
from qmx.progress import say
from qmx.report import files
from qmx.report.audit import audit, strongest
from qmx.report.pictures import Picture, picture
from qmx.report.reach import reached
from qmx.report.tables import rows_of
from qmx.sharding import from_first
from qmx.stages import measured, outside
from qmx.stages.answers import Answers
from qmx.stages.pretrain import Pretrained
from qmx.stages.query import note_calls, unexpected
from qmx.stages.run import Run, needed, plain
from qmx.stages.select import Selection
from qmx.stages.target import Target, in_ledger
from qmx.workdir import NotDone

PICTURES = 12  # of images that were asked about: a row on a wide screen
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow")


def report(
    run: Run,
    target: Target | NotDone,
    encoders: list[Pretrained | NotDone],
    monitors: list[dict | NotDone],
    chosen: dict[Cell, Selection | NotDone],
    answers: Answers | NotDone,
    rows: list[dict | NotDone],
    unasked: dict | NotDone | None = None,
) -> str:
    """Write the report; returns the text for standard out. What is not there yet is shown so.

    Args:
      rows: of all cells, in their order.
      unasked: figures of a function that asks nothing, see `qmx.stages.zero.zero`.
    """
    target = needed(target)
    keys, data = run.config.target, run.data
    facts = {"name": target.name, "sha256": target.sha256}
    facts |= {"arch": target.arch} if target.path else {"preprocessing": target.preprocessing}
    accuracy: dict[str, Any] = {"top1": None, "top5": None}
    warning = None
    known: dict[str, Any] = {"access": [], "zero_queries": None}
    if not isinstance(answers, NotDone):
        accuracy |= {"top1": answers.top1, "top5": answers.top5}
        if answers.top1 is not None:
            warning = unexpected(keys.expect, accuracy, data.evaluation.size)
        known = {
            "access": measured.honest(run, answers),
            "zero_queries": {
                **measured.zero_queries(run, answers),
                "function": None if isinstance(unasked, NotDone) else unasked,
            },
        }

    account = in_ledger(run, target.identity, lambda ledger: ledger.account()._asdict())
    done = [row for row in rows if not isinstance(row, NotDone)]
    looks = [
        {"init": encoder.init, "seed": encoder.seed, **encoder.facts, **look}
        for encoder, look in zip(encoders, monitors, strict=True)
        if not (isinstance(encoder, NotDone) or isinstance(look, NotDone))
    ]
    seconds = {
        "encoders": sum(look["seconds"] for look in looks),
        "students": sum(row["seconds"] for row in done),
    }
    grid = budgets(run.config, data.pool.size)
    results: dict[str, Any] = {
        "schema": 2,
        "finished": len(done) == len(rows),
        "planned": len(rows),
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
            "labelled": data.evaluation.labelled,
            "classes": data.classes,
            "sha256": data.digest,
            "budgets": [budget._asdict() for budget in grid],
        },
        "rows": done,
        "account": {**account, "lost": note_calls(run, target)},
        "monitors": looks,
        **known,
        "agreement": measured.agreement(run, done),
        "provenance": measured.provenance(
            run, seconds, measured.operations(target.operations, looks, done)
        ),
        "versions": {
            "qmx": __version__,  # runs in a checkout that is not installed, too
            **{name: version(name) for name in PACKAGES},
        },
        "config": plain(run.config),
    }
    results["reach"] = reached(results)
    detection = measured.detection(run, say if results["finished"] else lambda line: None)
    results["audit"] = audit(results, of_classes(run, results), detection)
    return from_first(
        lambda: files.write(run.workdir, results, asked_pictures(run, results, chosen))
    )


def of_classes(run: Run, results: dict) -> dict | None:
    """Fidelity by class of the strongest attack; None if there is none."""
    if not (found := strongest(results)):
        return None
    column, queries = found
    (budget,) = (b for b in budgets(run.config, run.data.pool.size) if b.queries == queries)
    rows = rows_of(results, column, queries)
    seeds = [row["seed"] for row in rows if not row["undertrained"]]
    return measured.by_class(run, column, budget, seeds)


def asked_pictures(
    run: Run, results: dict, chosen: dict[Cell, Selection | NotDone]
) -> list[Picture]:
    """The first images that the strongest attack asked about, at the budget of the answer."""
    if not (found := strongest(results)):
        return []
    column, queries = found
    for cell, selection in chosen.items():
        own = Column(cell.init, cell.select, cell.access, cell.use), cell.queries
        if own == (column, queries) and not isinstance(selection, NotDone):
            ids, names = selection.ids[:PICTURES], run.data.pool.names
            shown = [names[k] if names else f"image {k} of the pool" for k in ids]
            return [picture(*pair) for pair in zip(shown, run.data.pool.shown(ids), strict=True)]
    return []
