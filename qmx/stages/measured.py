"""Figures of a report that the stages' artefacts give together: honest users, seeds, classes."""

import datetime
import hashlib
import json
import os
import platform
import shlex
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import jax
import numpy as np
from scipy.special import softmax

import qmx
from qmx.checkpoint import file_digest
from qmx.files import read_json
from qmx.grid import Budget, Cell, Column, attacks, budgets, columns
from qmx.ledger.replay import extent
from qmx.metrics import calibration_error, fidelity_by_class
from qmx.progress import say
from qmx.sharding import from_first
from qmx.stages.answers import Answers, report_scores
from qmx.stages.evaluate import named
from qmx.stages.run import Run


def honest(run: Run, answers: Answers) -> list[dict[str, Any]]:
    """Accuracy of honest users at each level of access in the grid, on the evaluation images.

    Rows of {"access", "top1", "top5", "calibration_error"}, in per cent, None without labels; from
    the ledger.
    """
    evaluation, rows = run.data.evaluation, list[dict[str, Any]]()
    unknown = {"top1": None, "top5": None, "calibration_error": None}
    levels = dict.fromkeys(column.access for column in attacks(run.config))
    if not evaluation.labelled:
        return [{"access": access, **unknown} for access in levels]
    labels = evaluation.labels[answers.evaluation]
    for access in levels:
        scores = report_scores(run, answers, access)
        rows.append(
            {
                "access": access,
                "top1": first_classes(scores, labels, 1),
                "top5": first_classes(scores, labels, 5),
                "calibration_error": calibration_error(softmax(scores, axis=1), labels),
            }
        )
    return rows


def first_classes(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Per cent of rows whose class is among the first k, as an honest user reads an answer: of
    equal scores, which rounding makes, that of the lower class comes first. A student's
    (`qmx.metrics.top_k`) all count against it."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return 100.0 * float((order == labels[:, None]).any(1).mean())


def zero_queries(run: Run, answers: Answers) -> dict[str, float | None]:
    """A copy that asks nothing and names one class for every image, at its best: {"top1",
    "fidelity_top1"} in per cent, of the most frequent class (None without labels) and the most
    frequent answer."""
    wanted = report_scores(run, answers, run.config.target.access).argmax(1)
    evaluation = run.data.evaluation
    labels = evaluation.labels[answers.evaluation] if evaluation.labelled else None
    return {
        name: None if classes is None else 100.0 * int(np.bincount(classes).max()) / len(classes)
        for name, classes in (("top1", labels), ("fidelity_top1", wanted))
    }


def agreement(run: Run, rows: list[dict]) -> list[dict[str, Any]]:
    """Agreement between students of two seeds that learned, where a cell has several.

    Rows of {the column's axes, "queries", "seeds", "agreement"}: the mean over pairs, in per cent
    of the evaluation images. Copies that agree with the target as often may err on other images.
    """
    axes = (*Column._fields, "fraction", "seed")
    there = {tuple(row[axis] for axis in axes) for row in rows if not row["undertrained"]}
    found = []
    for column in columns(run.config):
        for budget in budgets(run.config, run.data.pool.size):
            seeds = [s for s in run.config.seeds if (*column, budget.fraction, s) in there]
            each = [named(run, Cell(*column, *budget, seed))[0] for seed in seeds]
            same = [float((one == other).mean()) for one, other in combinations(each, 2)]
            if same:
                found.append(
                    {
                        **column._asdict(),
                        "queries": budget.queries,
                        "seeds": len(seeds),
                        "agreement": 100.0 * mean(same),
                    }
                )
    return found


def by_class(run: Run, column: Column, budget: Budget, seeds: list[int]) -> dict[str, Any]:
    """Fidelity of a column's students at a budget for each class of the target's, mean over seeds.

    {the column's axes, "queries", "seeds", "classes"}; a class is {"class", "name", "images",
    "fidelity"}, the worst first, those that the target never names left out.
    """
    pairs = [named(run, Cell(*column, *budget, seed)) for seed in seeds]
    shares = [fidelity_by_class(*pair, run.data.classes) for pair in pairs]
    images = np.bincount(pairs[0][1], minlength=run.data.classes)
    names = run.data.class_names or tuple(map(str, range(run.data.classes)))
    classes: list[dict[str, Any]] = [
        {
            "class": k,
            "name": names[k],
            "images": int(images[k]),
            "fidelity": mean(share[k] or 0.0 for share in shares),
        }
        for k in np.flatnonzero(images).tolist()
    ]
    classes.sort(key=lambda one: one["fidelity"])
    facts = {**column._asdict(), "queries": budget.queries, "seeds": len(seeds)}
    return {**facts, "classes": classes}


def detection(run: Run, tell: Callable[[str], None] = say) -> dict[str, Any] | None:
    """Result of `python -m qmx.detect` of this workdir; None if there is none of this ledger as it
    is, of which `tell` gets a line."""

    def look() -> dict[str, Any] | None:
        path, ledger = run.workdir / "detection.json", run.workdir / "ledger.sqlite"
        if not (path.exists() and ledger.exists()):
            return None
        found = read_json(path)
        if found.get("ledger") == extent(ledger):
            return found
        words = f"python -m qmx.detect {shlex.quote(str(run.workdir))}"
        tell(f"{path} is of another ledger and left out; {words} again")
        return None

    return from_first(look)


def operations(
    target: int | None, encoders: list[dict], students: list[dict]
) -> dict[str, int | None]:
    """Floating-point operations of the trainings: {"target", "encoders", "students"} of those that
    were counted, None if none was; {"trainings", "counted"}, how many there are of encoders and
    students, and of how many that is the sum.

    Not counted are heads, and what an older version trained.

    Args:
      target: of its training, if it was trained here.
      encoders: of `results.json`; those that were brought along have no epochs.
      students: its rows.
    """
    kinds = {
        "encoders": [one.get("operations") for one in encoders if "epochs" in one],
        "students": [row["operations"] for row in students],
    }
    counts = [count for some in kinds.values() for count in some]
    known = {name: [count for count in some if count] for name, some in kinds.items()}
    return {
        "target": target,
        **{name: sum(some) if some else None for name, some in known.items()},
        "trainings": len(counts),
        "counted": sum(map(len, known.values())),
    }


def provenance(
    run: Run, seconds: dict[str, float], operations: dict[str, int | None]
) -> dict[str, Any]:
    """When, with what and by which command a report was made; digests of what it stands on."""
    ledger = run.workdir / "ledger.sqlite"
    config = json.dumps(json.loads(run.config.to_json()), sort_keys=True)
    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": run.command,
        "qmx": qmx.__version__,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "cores": os.cpu_count() or 0,
            "devices": f"{len(devices)} x {devices[0].device_kind}",
        },
        "seconds": seconds,
        "operations": operations,
        "seeds": list(run.config.seeds),
        "sha256": {
            "config": hashlib.sha256(config.encode()).hexdigest(),
            "code": code_digest(),
            "ledger": file_digest(ledger) if ledger.exists() else None,
        },
    }


def code_digest() -> str:
    """SHA-256 over the package's own files, names and contents, in the order of their names."""
    root = Path(qmx.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        digest.update(f"{name}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()
