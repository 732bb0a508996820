"""The target: trained here, made of weights that the user has, or elsewhere; and the questions to
it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from qmx import models, networks, trainers
from qmx.checkpoint import file_digest, save_weights
from qmx.contract import Encoder
from qmx.data import Dataset
from qmx.data.sources import take
from qmx.ledger import Ledger
from qmx.ledger.access import one_hot_logits
from qmx.models import from_torch
from qmx.models.vit_from_torch import at_size
from qmx.progress import say
from qmx.sharding import from_first
from qmx.stages import outside
from qmx.stages.outside import NEW, SAME
from qmx.stages.run import Run, facts, plain, read_weights, root_key, trained_by
from qmx.stages.target_name import known_as
from qmx.targets.query import Query, network_query
from qmx.training import train
from qmx.whole_statistics import measured

T = TypeVar("T")


class Target(NamedTuple):
    """The target, as the ledger and the later stages know it."""

    name: str  # for people
    sha256: str  # of its weights, or what stands for them: what the ledger knows it by
    preprocessing: str  # between the pixels sent and the answer; a name for the ledger
    found: str  # the same of what is there now; another where the user said that it is the same
    path: Path | None = None  # of its weights; None where others compute it
    arch: str = ""
    features: str = "class"  # of a vision transformer, that its classifier reads
    operations: int | None = None  # floating-point, of its training, where they were counted

    @property
    def identity(self) -> dict[str, str]:
        """Names that tell its answers from others, for the ledger and as a stage's inputs."""
        return {"target": self.sha256, "preprocessing": self.preprocessing}


def target(run: Run) -> Target:
    """The target: trained on the pool's labels, converted from PyTorch's weights, or elsewhere."""
    keys, data = run.config.target, run.data
    if keys.kind in outside.KINDS:
        inputs = {**outside.inputs_of(keys), "shape": data.shape, "classes": data.classes}

        def changed() -> str | None:
            # The stage's inputs hold nothing that a server says of itself.
            asked_for = run.update in (SAME, NEW)
            return f"--update={run.update} looks at it again" if asked_for else None

        result = run.stage("target", ".", inputs, lambda _: outside.describe(keys, data), changed)
        return Target(**known_as(run, result))
    if keys.kind == "torch":
        inputs = {"arch": keys.arch, **source_of(keys.path), "classes": data.classes}
        inputs["shape"] = data.shape
        result = run.stage("target", ".", inputs, lambda directory: _convert(run, directory))
    else:
        # A share of its answers is nothing that it is trained with.
        trained = {key: value for key, value in trained_by(keys).items() if key != "max_refused"}
        inputs = {
            "pool": data.pool_digest,
            "target": trained,
            "weak_view": plain(run.config.weak_view),
        }
        result = run.stage("target", ".", inputs, lambda directory: _train(run, directory))
    preprocessing = f"mean {data.mean}, std {data.std}, {keys.precision}"
    path = run.workdir / "target" / "target.safetensors"
    return Target(**known_as(run, result), preprocessing=preprocessing, path=path)


def _train(run: Run, directory: Path) -> dict:
    keys, pool = run.config.target, run.data.pool
    source = take(pool, np.arange(pool.size), scores=Labels(pool.labels, run.data.classes))
    trainer, steps = trainers.of_target(run.config, networks.look(run.data), pool.size)
    rng = root_key(keys.seed, "target")
    ts, operations = train(
        directory,
        "target",
        trainer.step,
        trainer.init(rng),
        rng,
        source,
        batch_size=keys.batch_size,
        steps=steps,
        seed=keys.seed,
        drop_last=False,
        save_seconds=60 * run.config.save_minutes,
        stopped=run.stopped,
        tensorboard=run.config.tensorboard,
    )
    said = facts(run, "target", arch=keys.arch, classes=run.data.classes, size=0)
    weights = Encoder(ts.params, ts.state)
    if keys.whole_statistics:
        dtype, seen = networks.evaluated_in(keys.precision), networks.look(run.data)
        network = networks.classifier(keys.arch, dtype, seen)
        weights = measured(network, weights, networks.evaluation_view(seen), pool)
    digest = save_weights(directory / "target.safetensors", weights, said)
    name = f"{keys.arch} trained on {run.data.name}"
    return {"name": name, "arch": keys.arch, "sha256": digest, "operations": operations}


def _convert(run: Run, directory: Path) -> dict:
    keys = run.config.target
    made = converted(keys, run.data)
    for line in from_torch.dropped_lines(made):
        say(f"{Path(keys.path).name}: {line}")
    weights = Encoder(
        {"backbone": made.backbone.params, "head": made.head},
        {"backbone": made.backbone.stats, "head": {}},
    )
    more: dict[str, str] = {}
    if made.arch in models.VITS:
        more, family = {"features": made.features}, models.VITS[made.arch].of
        given, own = (run.data.mean, run.data.std), (family.mean, family.std)
        if family.mean and not np.allclose(given, own, atol=1e-3):
            say(
                f"{Path(keys.path).name} is shown images of mean {given[0]} and std {given[1]}; of"
                f" its family they are {own[0]} and {own[1]}: data.mean and data.std set them"
            )
    said = facts(run, "target", arch=made.arch, classes=classes_of(made), size=0, **more)
    digest = save_weights(directory / "target.safetensors", weights, said)
    name = f"{made.arch} from {Path(keys.path).name}"
    return {"name": name, "arch": made.arch, "sha256": digest, **more}


def converted(keys: Any, data: Dataset) -> from_torch.Converted:
    """Read the weights of the config's `target`; ValueError unless they fit `data`."""
    made = from_torch.load(keys.path, keys.arch)
    if made.head is None:
        beside = [name for name in made.dropped if re.search(r"head|classifier", name)]
        raise ValueError(
            f"target.path {keys.path} holds a backbone without a classifier; a target needs its"
            " scores"
            + (f" ({', '.join(beside[:4])} are no linear layer on its features)" * bool(beside))
        )
    check_channels(made, keys.path, data)
    if made.arch in models.VITS:
        try:
            if data.shape[0] != data.shape[1]:
                raise ValueError(f"{data.shape[0]} x {data.shape[1]} are no square")
            encoder = at_size(made.backbone, models.VITS[made.arch], data.shape[0])
        except ValueError as error:
            raise ValueError(f"data.crop, the images that the target sees: {error}") from None
        made = made._replace(backbone=encoder)
    classes = classes_of(made)
    if classes != (data.classes or classes):
        raise ValueError(
            f"{keys.path} scores {classes} classes and {data.name} has {data.classes}; they must be"
            " the same classes in the same order, or target.classes names a file with a line for"
            " each of the target's"
        )
    return made


def classes_of(made: from_torch.Converted) -> int:
    """Number of classes that weights score; 0 without a classifier."""
    return 0 if made.head is None else made.head["fc"]["kernel"].shape[1]


def source_of(path: str) -> dict[str, str]:
    """Inputs of a stage that converts weights: the file's digest, and its part, if named."""
    file, part = from_torch.split_part(path)
    return {"file": file_digest(file), **({"part": part} if part else {})}


def check_channels(made: from_torch.Converted, path: str, data: Dataset) -> None:
    """Raise ValueError unless the images have the channels that the network was made for."""
    if made.channels != data.shape[-1]:
        raise ValueError(
            f"{path} was made for images of {made.channels} channels, and {data.name} has"
            f" {data.shape[-1]}"
        )


class Labels:
    """True labels as scores, f32[n, N], made for the rows read: 1.3 M x 1,000 would not fit."""

    def __init__(self, labels: np.ndarray, classes: int):
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return one_hot_logits(self.labels[rows], self.classes)


def target_query(run: Run, target: Target) -> Query:
    """The query function around the target's weights, or around what is elsewhere."""
    keys, facts = run.config.target, networks.look(run.data)
    if target.path is None:
        return outside.query_of(keys, run.data, target.found)
    features, dtype = target.features, networks.evaluated_in(keys.precision)
    network = networks.classifier(target.arch, dtype, facts, features=features)
    weights = read_weights(run, network, target.path, size=0)
    folded, weights = networks.for_inference(target.arch, keys.precision, facts, weights, features)
    view = networks.evaluation_view(facts)
    return network_query(folded, *weights, view, precision=keys.precision)


def open_ledger(run: Run, identity: dict[str, str]) -> Ledger:
    """Open the ledger of this target with the config's budget, in the first process only."""
    path, budget = run.workdir / "ledger.sqlite", run.config.budget
    return Ledger(path, **identity, budget=budget, dtype=run.config.ledger_dtype)


def in_ledger(run: Run, identity: dict[str, str], work: Callable[[Ledger], T]) -> T:
    """Call `work` with the ledger of this target, in the first process; all of them get its
    result."""

    def opened() -> T:
        with open_ledger(run, identity) as ledger:
            return work(ledger)

    return from_first(opened)
