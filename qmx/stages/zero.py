"""A copy that asks nothing: the user's own function of scores, evaluated as students are."""

from pathlib import Path
from typing import Any

from qmx.metrics import compare
from qmx.progress import progress
from qmx.stages.answers import Answers, report_scores
from qmx.stages.frozen import told_by
from qmx.stages.run import Run, needed
from qmx.targets import function
from qmx.workdir import NotDone

KEY = "audit.zero"
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
        watch = run.config.audit.zero_watch
        told = function.encoder(path, dimension=target.shape[1], key=KEY, watch=watch)
        there, name = answers.evaluation, "zero queries"
        with progress(name, len(there)) as shown:
            scores = told_by(run, told, evaluation, there, name, shown.update)
        labels = evaluation.labels[there] if evaluation.labelled else None
        found = compare(scores, target, labels)
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
        function.load(path, KEY, config.audit.zero_watch)
