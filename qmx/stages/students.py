"""Students: trained on the ledger's answers, and compared with the target."""

import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from qmx import build
from qmx.checkpoint import save_weights
from qmx.data.sources import Beside, take
from qmx.evaluate import compare
from qmx.grid import Cell, recipe_name, recipe_of
from qmx.job import train
from qmx.methods import distill as distillation
from qmx.methods import fixmatch
from qmx.oracle.access import as_logits
from qmx.propagate import propagate
from qmx.stages.answers import read_answers, read_scores, shows
from qmx.stages.asking import evaluation_keys, pool_keys, query, selection
from qmx.stages.encoders import features, pretrain, read_encoder
from qmx.stages.rounds import asked_to_choose
from qmx.stages.run import Run, outputs, plain, read_weights, root_key
from qmx.stages.target import Labels, identity


def distill(this: Run, cell: Cell, todo: list[Cell]) -> dict:
    """Train a fresh student on the answers in the ledger. The target is not here."""
    keys, view, student = recipe_of(this.config, cell), this.config.weak_view, this.config.student
    seen, pool = build.look(this.data), this.data.pool
    start = pretrain(this, cell.init, cell.seed)["sha256"] if cell.init != "none" else "none"
    ids = selection(this, cell)
    method = fixmatch if cell.use == "fixmatch" else distillation
    self_keys, strong_view = this.config.fixmatch, this.config.strong_view

    def work(directory: Path) -> dict:
        scores: Any
        if keys.learn_from == "labels":
            scores = Labels(pool.labels[ids], this.data.classes)
        else:
            query(this, todo)
            scores = as_logits(read_answers(this, pool_keys(this, ids), cell.access), cell.access)
        source = take(pool, ids, scores=scores)
        if cell.use == "pool":
            known = softmax(scores[np.arange(len(ids))], axis=1)
            rows = propagate(features(this, cell.init, cell.seed), ids, known, **this.config.propagation)
            source = take(pool, np.arange(pool.size), scores=as_logits(rows, "probs"))
        if cell.use == "fixmatch":
            source = source._replace(beside=Beside(pool, self_keys.mu))
            steps = build.fixmatch_steps(keys, self_keys, len(ids), pool.size)
            trainer = build.self_labeller(keys, self_keys, student.arch, student.dtype, view, strong_view, seen, steps)
        else:
            steps = build.distill_steps(keys, source.size)
            trainer = build.distiller(keys, student.arch, student.dtype, view, seen, steps)
        rng = root_key(cell.seed, "student")  # one key whatever it starts from: the same head, the same views
        ts = trainer.init(rng)
        if cell.init != "none":
            params, state = method.start_from(ts.params, ts.state, read_encoder(this, cell.init, cell.seed))
            ts = ts._replace(params=params, state=state)
        name = f"distill {cell.init} {cell.queries} {cell.select} {cell.access} {cell.use} seed {cell.seed}"
        began = time.monotonic()
        ts = train(directory, name, trainer.step, ts, rng, source, batch_size=keys.batch_size,
                   steps=steps, seed=cell.seed, drop_last=False, save_seconds=this.save_seconds,
                   stopped=this.stopped)
        digest = save_weights(directory / "student.safetensors", method.student(ts.params, ts.state))
        return {"sha256": digest, "seconds": time.monotonic() - began,
                "recipe": recipe_name(this.config, cell) or "distill"}

    # By its name, without the share: 71 of 1,437 images are the same student as 5 %.
    inputs = {"cell": cell.name, "distill": plain(keys), "weak_view": plain(view),
              "student": plain(student), "encoder": start, **identity(this), "images": zlib.crc32(ids.tobytes()),
              **({"propagation": plain(this.config.propagation)} if cell.use == "pool" else {}),
              **({"fixmatch": plain(self_keys), "strong_view": plain(strong_view)} if cell.use == "fixmatch" else {})}
    return this.stage("distill", cell.name, inputs, work)


def evaluate(this: Run, cell: Cell, todo: list[Cell]) -> dict:
    """A cell's row of the table, from its last step (never the best one)."""
    made, student = distill(this, cell, todo), this.config.student
    chose = asked_to_choose(this.config, cell)
    seen, keys, evaluation = build.look(this.data), recipe_of(this.config, cell), this.data.evaluation

    def work(_: Path) -> dict:
        network = build.classifier(student.arch, build.evaluated_in(student.dtype), seen, standardize=keys.standardize)
        weights = read_weights(this, network, f"distill/{cell.name}/student.safetensors")
        scores = outputs(this, f"evaluate {cell.name}", network, weights, evaluation)
        query(this, todo)
        answers = read_scores(this, evaluation_keys(this))
        queries = {"train": cell.queries - chose, "select": chose, "report": len(answers)}
        return {"queries": queries, "calls": sum(queries.values()), **compare(scores, answers, evaluation.labels),
                "seconds": made["seconds"], "recipe": made["recipe"]}

    inputs = {"student": made["sha256"], **identity(this), **({"select": chose} if chose else {}),
              **shows(this)}
    # Of a row the queries are told by purpose.
    return {**cell._asdict(), **this.stage("evaluate", cell.name, inputs, work)}
