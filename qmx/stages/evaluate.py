"""A cell's row of the table: its student compared with the target."""

from pathlib import Path

from qmx import trainers
from qmx.grid import Cell, recipe_of
from qmx.metrics import compare
from qmx.stages.answers import read_scores, shows
from qmx.stages.distill import distill
from qmx.stages.query import evaluation_keys, query
from qmx.stages.rounds import asked_to_choose
from qmx.stages.run import Run, outputs, read_weights
from qmx.stages.target import identity


def evaluate(run: Run, cell: Cell, todo: list[Cell]) -> dict:
    """A cell's row of the table, from its last step (never the best one)."""
    made, student = distill(run, cell, todo), run.config.student
    chose = asked_to_choose(run.config, cell)
    seen, keys, evaluation = (
        trainers.look(run.data),
        recipe_of(run.config, cell),
        run.data.evaluation,
    )

    def work(_: Path) -> dict:
        network = trainers.classifier(
            student.arch, trainers.evaluated_in(student.dtype), seen, standardize=keys.standardize
        )
        weights = read_weights(run, network, f"distill/{cell.name}/student.safetensors")
        scores = outputs(run, f"evaluate {cell.name}", network, weights, evaluation)
        query(run, todo)
        answers = read_scores(run, evaluation_keys(run))
        queries = {"train": cell.queries - chose, "select": chose, "report": len(answers)}
        return {
            "queries": queries,
            "calls": sum(queries.values()),
            **compare(scores, answers, evaluation.labels),
            "seconds": made["seconds"],
            "recipe": made["recipe"],
        }

    inputs = {
        "student": made["sha256"],
        **identity(run),
        **({"select": chose} if chose else {}),
        **shows(run),
    }
    # Of a row the queries are told by purpose.
    return {**cell._asdict(), **run.stage("evaluate", cell.name, inputs, work)}
