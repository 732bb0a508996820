"""The target: trained here, made of weights that the user has, or elsewhere; and the questions to it."""

from pathlib import Path
from typing import Any

import numpy as np

from qmx import build
from qmx.checkpoint import file_digest, save_weights
from qmx.contract import Encoder, Network
from qmx.data import Dataset
from qmx.data.sources import take
from qmx.job import train
from qmx.models import from_torch
from qmx.oracle import Ledger, network_query
from qmx.oracle.access import one_hot_logits
from qmx.oracle.query import Query
from qmx.stages import outside
from qmx.stages.run import Run, plain, read_weights, root_key

WEIGHTS = "target/target.safetensors"


def target(this: Run) -> dict:
    """The target's name and digest; its weights and network, trained on the pool's labels or converted from PyTorch's,
    unless it is elsewhere."""
    keys = this.config.target
    if keys.kind in outside.KINDS:
        return this.stage("target", ".", outside.inputs_of(keys), lambda _: outside.describe(keys, this.data))
    if keys.kind == "torch":
        inputs = {"arch": keys.arch, "file": file_digest(keys.path)}
        return this.stage("target", ".", inputs, lambda directory: _convert(this, directory))
    inputs = {"target": plain(keys), "weak_view": plain(this.config.weak_view)}
    return this.stage("target", ".", inputs, lambda directory: _train(this, directory))


def _train(this: Run, directory: Path) -> dict:
    keys, seen, pool = this.config.target, build.look(this.data), this.data.pool
    source = take(pool, np.arange(pool.size), scores=Labels(pool.labels, this.data.classes))
    steps = build.distill_steps(keys, pool.size)
    trainer = build.distiller(keys, keys.arch, build.evaluated_in(keys.precision), this.config.weak_view, seen, steps)
    rng = root_key(keys.seed, "target")
    ts = train(directory, "target", trainer.step, trainer.init(rng), rng, source, batch_size=keys.batch_size,
               steps=steps, seed=keys.seed, drop_last=False, save_seconds=this.save_seconds,
               stopped=this.stopped)
    digest = save_weights(directory / "target.safetensors", Encoder(ts.params, ts.state))
    return {"name": f"{keys.arch} trained on {this.data.name}", "arch": keys.arch, "sha256": digest}


def _convert(this: Run, directory: Path) -> dict:
    keys = this.config.target
    made = converted(keys, this.data)
    weights = Encoder({"backbone": made.backbone.params, "head": made.head},
                      {"backbone": made.backbone.stats, "head": {}})
    digest = save_weights(directory / "target.safetensors", weights)
    return {"name": f"{made.arch} from {Path(keys.path).name}", "arch": made.arch, "sha256": digest}


def converted(keys: Any, data: Dataset) -> from_torch.Converted:
    """The weights that the config's `target` names; ValueError unless they can be the target of `data`."""
    made = from_torch.load(keys.path, keys.arch)
    if made.head is None:
        raise ValueError(f"target.path {keys.path} holds a backbone without a classifier; a target needs its scores")
    check_channels(made, keys.path, data)
    classes = made.head["fc"]["kernel"].shape[1]
    if classes != data.classes:
        raise ValueError(f"{keys.path} scores {classes} classes and {data.name} has {data.classes}; they must be the "
                         "same classes in the same order")
    return made


def check_channels(made: from_torch.Converted, path: str, data: Dataset) -> None:
    """Raise ValueError unless the images have the channels that the network was made for."""
    channels = made.backbone.params["conv1"]["kernel"].shape[2]
    if channels != data.shape[-1]:
        raise ValueError(f"{path} was made for images of {channels} channels, and {data.name} has {data.shape[-1]}")


class Labels:
    """True labels as scores, f32[n, N], made for the rows that are read: 1.3 M x 1,000 would not fit."""

    def __init__(self, labels: np.ndarray, classes: int):
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return one_hot_logits(self.labels[rows], self.classes)


def target_query(this: Run) -> Query:
    """The query function around the target's weights, or around what is elsewhere."""
    made, keys, seen = target(this), this.config.target, build.look(this.data)
    if keys.kind in outside.KINDS:
        return outside.query_of(keys, this.data, made["sha256"])
    network: Network = build.classifier(made["arch"], build.evaluated_in(keys.precision), seen)
    weights = read_weights(this, network, WEIGHTS)
    folded, weights = build.for_inference(made["arch"], keys.precision, seen, weights)
    return network_query(folded, *weights, build.evaluation_view(seen), precision=keys.precision)


def identity(this: Run) -> dict[str, str]:
    """What tells the target's answers from others, for the ledger and as a stage's inputs: its digest, "target", and
    what happens between the pixels sent and the answer, "preprocessing"."""
    made, keys = target(this), this.config.target
    ours = f"mean {this.data.mean}, std {this.data.std}, {keys.precision}"
    return {"target": made["sha256"], "preprocessing": made["preprocessing"] if keys.kind in outside.KINDS else ours}


def open_ledger(this: Run, who: dict[str, str]) -> Ledger:
    """The ledger of the target with this `identity`, with the config's budget; for the first process alone."""
    return Ledger(this.workdir / "ledger.sqlite", **who, budget=this.config.budget, dtype=this.config.ledger_dtype)
