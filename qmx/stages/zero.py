"""A copy that asks nothing: the user's own function of scores, evaluated as students are."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qmx.data.batches import ahead
from qmx.metrics import compare
from qmx.progress import progress
from qmx.sharding import from_first
from qmx.stages.answers import Answers, report_scores
from qmx.stages.run import Run, needed
from qmx.targets import function
from qmx.workdir import NotDone

KEY = "audit.zero"
BATCH = 256  # images that the function gets at a time
FIGURES = ("top1", "top5", "fidelity_top1", "fidelity_top5")


def zero(run: Run, answers: Answers | NotDone) -> dict[str, Any] | None:
    """Figures of the function that the config's `audit.zero` names; None if it names none.

    {"name", "sha256", "top1", "top5", "fidelity_top1", "fidelity_top5"}: in per cent on the
    evaluation images that have an answer, the accuracies None without labels. The target is asked
    nothing for it: its answers to these images are there for the report anyway.
    """
    if not (path := run.config.audit.zero):
        return None
    answers, evaluation = needed(answers), run.data.evaluation

    def work(_: Path) -> dict:
        target = report_scores(run, answers, run.config.target.access)
        told = function.encoder(path, dimension=target.shape[1], key=KEY)
        parts = []
        with progress("zero queries", len(answers.evaluation)) as shown:
            for done, images in ahead(evaluation.shown, answers.evaluation, BATCH):
                run.go_on("zero queries", done - len(images), len(answers.evaluation))
                parts.append(from_first(partial(told, images)))
                shown.update(done)
        labels = evaluation.labels[answers.evaluation] if evaluation.labelled else None
        found = compare(np.concatenate(parts), target, labels)
        return {name: found[name] for name in FIGURES}

    sha256 = function.digest(path, run.config.audit.zero_watch, KEY)
    inputs = {
        "function": sha256,
        "evaluation": run.data.evaluation_digest,
        "images": len(answers.evaluation),
        **answers.identity,
    }
    name = f"{path.rpartition(':')[2]} of {Path(path.rpartition(':')[0]).name}"
    return {"name": name, "sha256": sha256, **run.stage("evaluate", "zero", inputs, work)}


def check(config: Any) -> None:
    """Raise ValueError unless the function that the config names is there."""
    if path := config.audit.zero:
        function.load(path, KEY)
        function.digest(path, config.audit.zero_watch, KEY)
