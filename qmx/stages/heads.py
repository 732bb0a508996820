"""Students that are heads on the features of an encoder that stays as it is."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.special import softmax

from qmx import heads
from qmx.checkpoint import load_weights, save_weights
from qmx.files import check_file
from qmx.grid import Cell
from qmx.ledger.access import as_logits
from qmx.sharding import from_first
from qmx.stages.features import Features, propagation_inputs
from qmx.stages.run import Run, facts, plain


def inputs_of(run: Run, cell: Cell) -> dict:
    """Inputs of such a student, beside its images, answers and encoder."""
    spread = propagation_inputs(run) if cell.use == "head_pool" else {}
    return {"head": plain(run.config.head), **spread}


def fit(
    run: Run, cell: Cell, features: Features, ids: np.ndarray, scores: Any, directory: Path
) -> dict:
    """Fit the head of a cell to the scores f32[n, N] of the pool's images `ids`."""
    began, rows = time.monotonic(), features.rows()
    known = np.asarray(scores[np.arange(len(ids))], np.float32)
    also = None
    if cell.use == "head_pool":
        reached = features.propagate(ids, softmax(known, axis=1), run.config.propagation)
        also = np.asarray(rows), as_logits(reached, "probs")
    keys = {name: value for name, value in run.config.head.items()}

    def work() -> dict:
        mean, scale = heads.spread(rows)
        head = heads.fit(
            np.asarray(rows[ids]), known, mean=mean, scale=scale, seed=cell.seed, also=also, **keys
        )
        made.append(head)
        held_out = None if np.isnan(head.held_out) else head.held_out
        return {"decay": head.decay, "temperature": head.temperature, "held_out": held_out}

    made: list[heads.Head] = []
    found = from_first(work)
    # In one process: another machine's sums may round another way.
    flat, tree = ravel_pytree(_like(run, features.rows()))
    flat = from_first(lambda: np.asarray(ravel_pytree(made[0].params)[0]))
    said = facts(
        run,
        cell.init,
        arch="",
        classes=run.data.classes,
        head=run.config.head.hidden,
        encoder=features.encoder.sha256,
    )
    digest = save_weights(directory / "student.safetensors", tree(flat), said)
    return {"sha256": digest, "seconds": time.monotonic() - began, **found}


def scores(run: Run, path: Path, features: Features, ids: np.ndarray | None = None) -> np.ndarray:
    """Scores f32[n, N] of a head for all images that have features, or for some."""
    rows = features.rows()
    check_file(path)
    return heads.scores(load_weights(path, _like(run, rows)), rows if ids is None else rows[ids])


def _like(run: Run, rows: np.ndarray) -> Any:
    """A head of the shapes of this config's, for features of this width."""
    hidden = run.config.head.hidden
    return heads.start(0, rows.shape[1], run.data.classes, hidden, rows.dtype)
