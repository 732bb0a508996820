"""A cell's row of the table: its student compared with the target's answers."""

from pathlib import Path
from typing import Any

import numpy as np

from qmx.contract import Encoder, Network
from qmx.data.arrays import trigger_images
from qmx.data.sources import take
from qmx.files import read_arrays, write_arrays
from qmx.grid import HEADS, Cell, is_control
from qmx.ledger.weaken import parse
from qmx.metrics import compare, fidelity_by_class, top_k
from qmx.report.tables import LEARNED
from qmx.selection.by_answers import BY_ANSWERS, shares
from qmx.sharding import first
from qmx.stages import heads
from qmx.stages.answers import Answers, report_scores, train_scores
from qmx.stages.distill import Student, network_of
from qmx.stages.features import Features, trigger_features
from qmx.stages.run import Run, needed, outputs, read_weights
from qmx.stages.select import Selection
from qmx.workdir import NotDone

# Images asked about on which a student is looked at again: so many tell a share of 80 % to one or
# two per cent, and cost seconds.
ASKED = 2000
# Images of a class, at least, for a figure of its own: one image of ten is 10 %.
OF_A_CLASS = 10


def evaluate(
    run: Run,
    cell: Cell,
    student: Student | NotDone,
    features: Features | NotDone | None,
    shown: Features | NotDone | None,
    selection: Selection | NotDone,
    answers: Answers | NotDone,
) -> dict:
    """A cell's row, from its last step (never the best one).

    Args:
      features, shown: of the pool and of the evaluation images; read for a head.

    Evaluation images without an answer are left out of all figures, so that all are of the same.
    """
    student, selection, answers = needed(student), needed(selection), needed(answers)
    access, evaluation = run.config.target.access, run.data.evaluation
    # Images whose answers chose others.
    chose = 0
    if cell.select in BY_ANSWERS:
        chose = sum(shares(cell.queries, run.config.rounds)[:-1])

    def work(directory: Path) -> dict:
        pool_ids = asked_images(selection, answers)
        if cell.use in HEADS.values():
            scores = heads.scores(run, student.path, needed(shown))
            on_asked = heads.scores(run, student.path, needed(features), pool_ids)
        else:
            scores, on_asked = of_network(run, cell, student, pool_ids)
        target = report_scores(run, answers, access)
        there = answers.evaluation
        named, wanted = scores[there].argmax(1), target.argmax(1)
        if first():
            write_arrays(
                directory / "named.npz",
                student=named.astype(np.int32),
                target=wanted.astype(np.int32),
            )
        asked = asked_fidelity(run, cell, on_asked, pool_ids, answers)
        agreement = own_agreement(run, cell, pool_ids, answers)
        labels = evaluation.labels[there] if evaluation.labelled else None
        queries = {"train": cell.queries - chose, "select": chose, "report": len(target)}
        return {
            "queries": queries,
            "calls": sum(queries.values()),
            **compare(scores[there], target, labels),
            "fidelity_asked": asked,
            "undertrained": asked < LEARNED * agreement / 100,
            "worst_class": worst_class(named, wanted, run.data.classes),
            "seconds": student.seconds,
            **({"head": student.chosen} if student.chosen else {}),
        }

    left_out = evaluation.size - len(answers.evaluation)
    inputs = {
        "figures": 2,  # of which a row consists: 2 has what the report's audit reads
        "evaluation": run.data.evaluation_digest,
        "student": student.sha256,
        "size": run.config.student.size,
        **answers.identity,
        **({"select": chose} if chose else {}),
        **({"shows": access} if access != "logits" else {}),
        **({"without_answer": left_out} if left_out else {}),
        **({"learned": "beside the target"} if parse(cell.access) else {}),
    }
    # The row has its queries by purpose.
    row = {**cell._asdict(), **run.stage("evaluate", cell.name, inputs, work)}
    row |= {"operations": student.operations, "recipe": student.recipe}
    if path := run.config.audit.watermark:
        row["watermark"] = watermark(run, cell, student, shown, path)
    return row


def watermark(
    run: Run, cell: Cell, student: Student, shown: Features | NotDone | None, path: str
) -> dict[str, Any]:
    """Share of a watermark's trigger images that a student answers as they are marked:
    {"triggers", "sha256", "answered" in per cent}."""
    source, marks, digest = trigger_images(path, run.data.shape, run.data.classes)

    def work(_: Path) -> dict:
        if cell.use in HEADS.values():
            rows = trigger_features(run, needed(shown).encoder, source, digest)
            scores = heads.scores(run, student.path, rows)
        else:
            name = f"trigger images of {cell.name}"
            scores = outputs(run, name, *trained(run, cell, student), source)
        return {"answered": top_k(scores, marks, 1)}

    inputs = {"triggers": digest, "student": student.sha256, "size": run.config.student.size}
    found = run.stage("evaluate", f"watermark-{cell.name}", inputs, work)
    return {"triggers": len(marks), "sha256": digest, **found}


def asked_images(selection: Selection, answers: Answers) -> np.ndarray:
    """Images of the pool that the target was asked about, at most `ASKED` of them, i64[n]."""
    ids = answers.there(np.sort(selection.ids))
    return ids[np.linspace(0, len(ids) - 1, min(len(ids), ASKED)).astype(int)]


def of_network(
    run: Run, cell: Cell, student: Student, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a student for the evaluation images and for the pool's images `ids`, f32[n, N]."""
    network, weights = trained(run, cell, student)
    names = f"evaluate {cell.name}", f"asked images of {cell.name}"
    shown, asked = run.data.evaluation, take(run.data.pool, ids)
    return outputs(run, names[0], network, weights, shown), outputs(
        run, names[1], network, weights, asked
    )


def trained(run: Run, cell: Cell, student: Student) -> tuple[Network, Encoder]:
    """A student's network and its weights, on the devices."""
    network = network_of(run, cell)
    return network, read_weights(run, network, student.path)


def asked_fidelity(
    run: Run, cell: Cell, scores: np.ndarray, ids: np.ndarray, answers: Answers
) -> float:
    """Agreement of a student with the answers that it was given, a control's with the labels, on
    images that the target was asked about, in per cent."""
    if is_control(cell):
        return top_k(scores, run.data.pool.labels[ids], 1)
    return top_k(scores, train_scores(run, answers, ids, cell.access).argmax(1), 1)


def own_agreement(run: Run, cell: Cell, ids: np.ndarray, answers: Answers) -> float:
    """Agreement of the target with the answers that a student was given, in per cent: 100 but where
    they are perturbed. A perfect copy agrees with no more of them."""
    if not parse(cell.access):
        return 100.0
    given, said = (
        train_scores(run, answers, ids, access).argmax(1)
        for access in (cell.access, run.config.target.access)
    )
    return 100 * float((given == said).mean())


def worst_class(student: np.ndarray, target: np.ndarray, classes: int) -> dict[str, Any] | None:
    """Class of the target's in which a student agrees least often, among those with enough images;
    None if no class has."""
    images = np.bincount(target, minlength=classes)
    fidelity = fidelity_by_class(student, target, classes)
    known = [(share, k) for k, share in enumerate(fidelity) if images[k] >= OF_A_CLASS]
    if not known:
        return None
    share, k = min(known)
    return {"class": k, "fidelity": share, "images": int(images[k])}


def named(run: Run, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Classes that a cell's student and the target name first on the evaluation images that have an
    answer, i32[m] each."""
    arrays = read_arrays(run.workdir / "evaluate" / cell.name / "named.npz")
    return arrays["student"], arrays["target"]
