"""A cell's row of the table: its student compared with the target's answers."""

from pathlib import Path

from qmx import networks
from qmx.grid import Cell, recipe_of
from qmx.metrics import compare
from qmx.selection.by_answers import BY_ANSWERS, shares
from qmx.stages.answers import Answers, read_scores
from qmx.stages.distill import Student
from qmx.stages.run import Run, needed, outputs, read_weights
from qmx.workdir import NotDone


def evaluate(run: Run, cell: Cell, student: Student | NotDone, answers: Answers | NotDone) -> dict:
    """A cell's row, from its last step (never the best one).

    Evaluation images without an answer are left out of all figures, so that all are of the same.
    """
    student, answers = needed(student), needed(answers)
    access, evaluation = run.config.target.access, run.data.evaluation
    # Images whose answers chose others.
    chose = 0
    if cell.select in BY_ANSWERS:
        chose = sum(shares(cell.queries, run.config.rounds)[:-1])

    def work(_: Path) -> dict:
        keys, standardize = run.config.student, recipe_of(run.config, cell).standardize
        dtype, facts = networks.evaluated_in(keys.dtype), networks.look(run.data)
        network = networks.classifier(keys.arch, dtype, facts, standardize=standardize)
        weights = read_weights(run, network, student.path)
        scores = outputs(run, f"evaluate {cell.name}", network, weights, evaluation)
        about = [row.tobytes() for row in answers.report]
        target = read_scores(run, answers.identity, about, access)
        there = answers.evaluation
        queries = {"train": cell.queries - chose, "select": chose, "report": len(target)}
        return {
            "queries": queries,
            "calls": sum(queries.values()),
            **compare(scores[there], target, evaluation.labels[there]),
            "seconds": student.seconds,
            "recipe": student.recipe,
        }

    left_out = evaluation.size - len(answers.evaluation)
    inputs = {
        "evaluation": run.data.evaluation_digest,
        "student": student.sha256,
        "size": run.config.student.size,
        **answers.identity,
        **({"select": chose} if chose else {}),
        **({"shows": access} if access != "logits" else {}),
        **({"without_answer": left_out} if left_out else {}),
    }
    # The row has its queries by purpose.
    return {**cell._asdict(), **run.stage("evaluate", cell.name, inputs, work)}
