"""Students, trained on the ledger's answers. The target is not here."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax

from qmx import networks, trainers
from qmx.checkpoint import save_weights
from qmx.contract import Network
from qmx.data import Source
from qmx.data.sources import Beside, take
from qmx.grid import HEADS, Cell, is_control, recipe_name, recipe_of, teacher
from qmx.ledger.access import as_logits
from qmx.stages import heads
from qmx.stages.answers import Answers, train_scores
from qmx.stages.features import Features, propagation_inputs, shown_at
from qmx.stages.pretrain import Pretrained, backbone
from qmx.stages.run import Run, facts, needed, plain, read_weights, root_key, trained_by
from qmx.stages.select import Selection
from qmx.stages.target import Labels
from qmx.training import train
from qmx.whole_statistics import measured
from qmx.workdir import NotDone


class Student(NamedTuple):
    """A trained student in a file."""

    path: Path
    sha256: str
    seconds: float  # of its training
    recipe: str
    operations: int | None = None  # floating-point, of its training, where they were counted
    chosen: dict[str, Any] | None = None  # of a head: its decay and temperature, and how they did


def distill(
    run: Run,
    cell: Cell,
    encoder: Pretrained | NotDone | None,
    features: Features | NotDone | None,
    selection: Selection | NotDone,
    answers: Answers | NotDone,
) -> Student:
    """Train a fresh student of a cell.

    Args:
      encoder: that it starts from; None for a start from nothing.
      features: of that encoder, or of the one that it learned from, by which answers are spread
        where the cell's use is "pool", and on which a head learns.
      answers: not read by a recipe that learns from labels; of a control they say which images its
        column has answers to.
    """
    config, keys = run.config, recipe_of(run.config, cell)
    encoder = needed(encoder) if encoder else None
    selection = needed(selection)
    inputs = {
        "pool": run.data.pool_digest,
        # By its name, without the share: 71 of 1,437 images are the same student as 5 %.
        "cell": cell.name,
        "encoder": encoder.sha256 if encoder else "none",
        "images": selection.crc32,
    }
    is_head = cell.use in HEADS.values()
    if is_head:
        inputs |= {**heads.inputs_of(run, cell), "learn_from": keys.learn_from}
        inputs |= shown_at(run, needed(encoder))
    else:
        inputs |= {
            "distill": trained_by(keys),
            "weak_view": plain(config.weak_view),
            "student": plain(config.student),
        }
    if keys.learn_from != "labels":
        left_out = len(selection.ids) - len(needed(answers).there(selection.ids))
        if left_out or not is_control(cell):
            inputs |= needed(answers).identity
        if left_out:
            inputs["without_answer"] = left_out
    if cell.use == "pool":
        inputs |= propagation_inputs(run)
        if teacher(config, cell.init):
            inputs["features"] = needed(features).encoder.sha256
    if cell.use == "fixmatch":
        inputs["fixmatch"] = plain(config.fixmatch)
        inputs["strong_view"] = plain(config.strong_view)

    def work(directory: Path) -> dict:
        if is_head:
            known = asked(run, cell, selection, answers)
            return heads.fit(run, cell, needed(features), *known, directory)
        source = transfer_set(run, cell, features, selection, answers)
        seen, pool = networks.look(run.data), run.data.pool.size
        trainer, steps = trainers.of_student(config, cell, seen, pool)
        # One key whatever it starts from: the same head, the same views.
        rng = root_key(cell.seed, "student")
        ts = trainer.init(rng)
        if encoder:
            variables = read_weights(run, backbone(run), encoder.path)
            params, state = trainer.method.start(ts.params, ts.state, variables)
            ts = ts._replace(params=params, state=state)
        began = time.monotonic()
        ts, operations = train(
            directory,
            f"distill {cell.init} {cell.queries} {cell.select} {cell.access} {cell.use} seed"
            f" {cell.seed}",
            trainer.step,
            ts,
            rng,
            source,
            batch_size=keys.batch_size,
            steps=steps,
            seed=cell.seed,
            drop_last=False,
            save_seconds=60 * run.config.save_minutes,
            stopped=run.stopped,
            tensorboard=run.config.tensorboard,
        )
        standardize = keys.standardize
        said = facts(run, cell.init, classes=run.data.classes, standardize=standardize)
        variables = trainer.method.network(ts.params, ts.state)
        if keys.whole_statistics:
            shown = networks.evaluation_view(seen, config.student.size)
            variables = measured(network_of(run, cell), variables, shown, run.data.pool)
        digest = save_weights(directory / "student.safetensors", variables, said)
        return {
            "sha256": digest,
            "seconds": time.monotonic() - began,
            "operations": operations,
        }

    # Its name changes nothing, so it is the config's and not the stage's.
    recipe = "head" if is_head else recipe_name(config, cell) or "distill"
    result = {**run.stage("distill", cell.name, inputs, work), "recipe": recipe}
    path = run.workdir / "distill" / cell.name / "student.safetensors"
    told = {key: result.pop(key) for key in ("decay", "temperature", "held_out") if key in result}
    return Student(path, **result, chosen=told or None)


def network_of(run: Run, cell: Cell) -> Network:
    """The network of a cell's student, as it is evaluated."""
    keys, standardize = run.config.student, recipe_of(run.config, cell).standardize
    dtype, seen = networks.evaluated_in(keys.dtype), networks.look(run.data)
    return networks.classifier(keys.arch, dtype, seen, standardize=standardize)


def asked(
    run: Run, cell: Cell, selection: Selection, answers: Answers | NotDone
) -> tuple[np.ndarray, Any]:
    """(the images i64[n] that have an answer, their scores f32[n, N]) of a cell; those of a control
    are true labels."""
    ids, by_labels = selection.ids, recipe_of(run.config, cell).learn_from == "labels"
    if not by_labels:
        ids = needed(answers).there(ids)
    if by_labels or is_control(cell):
        return ids, Labels(run.data.pool.labels[ids], run.data.classes)
    return ids, train_scores(run, needed(answers), ids, cell.access)


def transfer_set(
    run: Run,
    cell: Cell,
    features: Features | NotDone | None,
    selection: Selection,
    answers: Answers | NotDone,
) -> Source:
    """The images that a student sees, with "scores" beside them."""
    pool = run.data.pool
    ids, scores = asked(run, cell, selection, answers)
    if cell.use == "pool":
        known = softmax(scores[np.arange(len(ids))], axis=1)
        rows = needed(features).propagate(ids, known, run.config.propagation)
        return take(pool, np.arange(pool.size), scores=as_logits(rows, "probs"))
    source = take(pool, ids, scores=scores)
    if cell.use == "fixmatch":
        return source._replace(beside=Beside(pool, run.config.fixmatch.mu))
    return source
