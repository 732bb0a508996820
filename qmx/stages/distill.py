"""Students, trained on the ledger's answers."""

import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from qmx import trainers
from qmx.checkpoint import save_weights
from qmx.data.sources import Beside, take
from qmx.grid import Cell, recipe_name, recipe_of
from qmx.ledger.access import as_logits
from qmx.methods import distill as distillation
from qmx.methods import fixmatch
from qmx.selection.propagate import propagate
from qmx.stages.answers import read_answers
from qmx.stages.features import features
from qmx.stages.pretrain import pretrain, read_encoder
from qmx.stages.query import pool_keys, query
from qmx.stages.run import Run, plain, root_key
from qmx.stages.select import selection
from qmx.stages.target import Labels, identity
from qmx.training import train


def distill(run: Run, cell: Cell, todo: list[Cell]) -> dict:
    """Train a fresh student on the answers in the ledger. The target is not here."""
    keys, view, student = recipe_of(run.config, cell), run.config.weak_view, run.config.student
    seen, pool = trainers.look(run.data), run.data.pool
    start = pretrain(run, cell.init, cell.seed)["sha256"] if cell.init != "none" else "none"
    ids = selection(run, cell)
    method = fixmatch if cell.use == "fixmatch" else distillation
    self_keys, strong_view = run.config.fixmatch, run.config.strong_view

    def work(directory: Path) -> dict:
        scores: Any
        if keys.learn_from == "labels":
            scores = Labels(pool.labels[ids], run.data.classes)
        else:
            query(run, todo)
            scores = as_logits(read_answers(run, pool_keys(run, ids), cell.access), cell.access)
        source = take(pool, ids, scores=scores)
        if cell.use == "pool":
            known = softmax(scores[np.arange(len(ids))], axis=1)
            rows = propagate(
                features(run, cell.init, cell.seed), ids, known, **run.config.propagation
            )
            source = take(pool, np.arange(pool.size), scores=as_logits(rows, "probs"))
        if cell.use == "fixmatch":
            source = source._replace(beside=Beside(pool, self_keys.mu))
            steps = trainers.fixmatch_steps(keys, self_keys, len(ids), pool.size)
            trainer = trainers.self_labeller(
                keys, self_keys, student.arch, student.dtype, view, strong_view, seen, steps
            )
        else:
            steps = trainers.distill_steps(keys, source.size)
            trainer = trainers.distiller(keys, student.arch, student.dtype, view, seen, steps)
        # One key whatever it starts from: the same head, the same views.
        rng = root_key(cell.seed, "student")
        ts = trainer.init(rng)
        if cell.init != "none":
            params, state = method.start_from(
                ts.params, ts.state, read_encoder(run, cell.init, cell.seed)
            )
            ts = ts._replace(params=params, state=state)
        name = (
            f"distill {cell.init} {cell.queries} {cell.select} {cell.access} {cell.use} seed"
            f" {cell.seed}"
        )
        began = time.monotonic()
        ts = train(
            directory,
            name,
            trainer.step,
            ts,
            rng,
            source,
            batch_size=keys.batch_size,
            steps=steps,
            seed=cell.seed,
            drop_last=False,
            save_seconds=run.save_seconds,
            stopped=run.stopped,
        )
        digest = save_weights(
            directory / "student.safetensors", method.student(ts.params, ts.state)
        )
        return {
            "sha256": digest,
            "seconds": time.monotonic() - began,
            "recipe": recipe_name(run.config, cell) or "distill",
        }

    # By its name, without the share: 71 of 1,437 images are the same student as 5 %.
    inputs = {
        "cell": cell.name,
        "distill": plain(keys),
        "weak_view": plain(view),
        "student": plain(student),
        "encoder": start,
        **identity(run),
        "images": zlib.crc32(ids.tobytes()),
        **({"propagation": plain(run.config.propagation)} if cell.use == "pool" else {}),
        **(
            {"fixmatch": plain(self_keys), "strong_view": plain(strong_view)}
            if cell.use == "fixmatch"
            else {}
        ),
    }
    return run.stage("distill", cell.name, inputs, work)
