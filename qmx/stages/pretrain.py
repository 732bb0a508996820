"""Encoders: pretrained here without labels, or brought along."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qmx import grid, models, networks, trainers
from qmx.checkpoint import save_weights
from qmx.contract import Network
from qmx.data import Dataset
from qmx.data.sources import take
from qmx.diagnostics import watch
from qmx.models import from_torch
from qmx.models.vit_from_torch import resized, seen_through
from qmx.progress import say
from qmx.stages import frozen
from qmx.stages.run import Run, facts, needed, plain, root_key
from qmx.stages.target import check_channels, source_of
from qmx.training import train
from qmx.workdir import NotDone

WEIGHTS = "encoder.safetensors"
# The file of an encoder that stays as it is.
RESULT = dict.fromkeys(("callable", "table"), "result.json") | {"weights": WEIGHTS}


class Pretrained(NamedTuple):
    """An encoder in a file."""

    init: str
    seed: int
    path: Path
    facts: dict[str, Any]  # for the report: digest, seconds, and epochs or the file it came from

    @property
    def sha256(self) -> str:
        """Digest of what makes its features: its file, and how images are shown to it where that
        may differ."""
        return self.facts.get("identity", self.facts["sha256"])

    @property
    def kind(self) -> str:
        """Of one that stays as it is: "weights", "callable", "table"; else ""."""
        return self.facts.get("kind", "")

    @property
    def name(self) -> str:
        """One for all seeds of an encoder that was brought along."""
        return self.init if "source" in self.facts else f"{self.init}-seed{self.seed}"


class Taught(NamedTuple):
    """Features of another encoder, for one that learns them."""

    sha256: str  # of the encoder that has them
    # () -> an array f32[n, D] of the pool's, about their mean, that is read by rows
    rows: Callable[[], Any]


def pretrain(run: Run, init: str, seed: int, taught: Taught | NotDone | None = None) -> Pretrained:
    """An encoder: trained without labels, or converted from the weights that the config names.

    Args:
      taught: for an encoder that learns another's features.
    """
    keys, student = run.config.pretrain[init], run.config.student
    if grid.frozen(run.config, init):  # one for all seeds, and so are weights that are converted
        inputs = frozen.inputs_of(run.config, init, run.data)
        result = run.stage(
            "pretrain", init, inputs, lambda directory: frozen.make(run, init, directory)
        )
        return Pretrained(init, seed, run.workdir / "pretrain" / init / RESULT[keys.kind], result)
    if keys.path:
        inputs = {"arch": student.arch, **source_of(keys.path), "shape": run.data.shape}
        if student.arch in models.VITS:
            seen = {"mean": run.data.mean, "std": run.data.std, "size": student.size}
            inputs |= {**seen, "keys": {name: list(keys.get(name, ())) for name in ("mean", "std")}}
        result = run.stage(
            "pretrain", init, inputs, lambda directory: _convert(run, init, directory)
        )
        return Pretrained(init, seed, run.workdir / "pretrain" / init / WEIGHTS, result)
    name, view = f"{init}-seed{seed}", trainers.PRETRAINING[init].view
    inputs = {
        "pool": run.data.images_digest,
        "seed": seed,
        "pretrain": {init: plain(keys)},
        view: plain(run.config[view]),
        "student": plain(student),
    }
    if grid.teacher(run.config, init):
        inputs["features"] = needed(taught).sha256
    result = run.stage(
        "pretrain",
        name,
        inputs,
        lambda directory: _pretrain(run, init, seed, directory, taught),
    )
    return Pretrained(init, seed, run.workdir / "pretrain" / name / WEIGHTS, result)


def _pretrain(
    run: Run, init: str, seed: int, directory: Path, taught: Taught | NotDone | None
) -> dict:
    keys, pool, width = run.config.pretrain[init], run.data.pool, {}
    if taught is not None:
        rows = needed(taught).rows()
        pool, width = take(pool, np.arange(pool.size), features=rows), {"width": rows.shape[1]}
    seen = networks.look(run.data)
    trainer, steps = trainers.of_encoder(run.config, init, seen, pool.size, **width)
    rng = root_key(seed, init)
    began = time.monotonic()
    ts, operations = train(
        directory,
        f"pretrain {init} seed {seed}",
        trainer.step,
        trainer.init(rng),
        rng,
        pool,
        batch_size=keys.batch_size,
        steps=steps,
        seed=seed,
        drop_last=True,
        save_seconds=60 * run.config.save_minutes,
        stopped=run.stopped,
        tensorboard=run.config.tensorboard,
        watch=watch(steps // int(keys.epochs), keys.get("features"), keys.get("queue_size")),
    )
    seconds = time.monotonic() - began
    encoder = trainer.method.encoder(ts.params, ts.state)
    digest = save_weights(directory / "encoder.safetensors", encoder, facts(run, init))
    return {
        "sha256": digest,
        "seconds": seconds,
        "epochs": int(keys.epochs),
        "operations": operations,
    }


def _convert(run: Run, init: str, directory: Path) -> dict:
    began, source = time.monotonic(), Path(run.config.pretrain[init].path).name
    weights, rule = converted(run.config, init, run.data)
    for line in from_torch.dropped_lines(weights):
        say(f"{source}: {line}")
    digest = save_weights(directory / "encoder.safetensors", weights.backbone, facts(run, init))
    result = {"sha256": digest, "source": source}
    if rule:
        licence = models.VITS[weights.arch].of.licence
        result |= {"arch": weights.arch, "positions": rule, "licence": licence}
        frozen.say_licence(init, result)
    return {**result, "seconds": time.monotonic() - began}


def check(config: Any, init: str, data: Dataset) -> None:
    """Raise ValueError unless the encoder that the config names for an init can be used."""
    if grid.frozen(config, init):
        frozen.check(config, init, data)
    else:
        converted(config, init, data)


def converted(config: Any, init: str, data: Dataset) -> tuple[from_torch.Converted, str]:
    """(the config's weights for an init, as a student starts from them; how a vision transformer's
    positions became so, "" of another network).

    A vision transformer gets the student's size, and takes in how its own images were normalised.

    Raises:
      ValueError: a student cannot start from them.
    """
    path = config.pretrain[init].path
    weights = from_torch.load(path, config.student.arch)
    if weights.arch not in models.VITS:
        check_channels(weights, path, data)
        return weights, ""
    theirs = frozen.normalisation(config, init, data, weights)
    side = config.student.size or data.shape[0]
    encoder, rule = resized(weights.backbone, models.VITS[weights.arch], side)
    encoder = seen_through(encoder, theirs, (data.mean, data.std), data.shape[-1])
    return weights._replace(backbone=encoder), rule


def backbone(run: Run) -> Network:
    """The encoders' network, as it is evaluated."""
    student = run.config.student
    return networks.backbone(
        student.arch, networks.evaluated_in(student.dtype), networks.look(run.data)
    )
