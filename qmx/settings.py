"""The keys of a config, what they mean, and what is refused before any compute is spent."""

import difflib
from collections.abc import Iterator
from decimal import Decimal
from itertools import product
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from qmx.data import Dataset, subset_size
from qmx.models.resnet import ARCHS
from qmx.optim import DECAYS, SCHEDULES
from qmx.oracle import ACCESS
from qmx.oracle.select import SELECTS
from qmx.sharding import check_batch

INITS = ("none", "rotation", "moco", "simsiam")
TARGETS = ("train",)
LEARN_FROM = ("scores", "labels")


def training(**changes: Any) -> ConfigDict:
    """The keys that every training has, with PyTorch's ImageNet protocol as their defaults."""
    keys = dict(
        epochs=90.0,  # passes over the images; the unit of everything below that counts time
        batch_size=256,  # global, over all devices
        learning_rate=0.1,
        schedule="step",  # constant, cosine, cosine_by_epoch, step
        warmup_epochs=0.0,
        milestones=(30.0, 60.0),  # "step" multiplies by `factor` at each
        factor=0.1,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        weight_decay_on="all",  # or "kernels": no batch-norm scales, no biases
    )
    return ConfigDict({**keys, **changes})


def base() -> ConfigDict:
    """Every key there is. A config starts from this and changes what it needs.

    The methods' defaults are the papers' for ResNet-50 on ImageNet.
    """
    config = ConfigDict()

    # The grid: its product is what is run.
    config.seeds = (0,)
    config.inits = INITS  # what the student starts from
    config.selects = ("random",)  # how the images to ask about are chosen
    config.accesses = ("logits",)  # what is seen of an answer
    config.fractions = (0.01, 0.1, 1.0)  # of the pool that is asked about
    config.budget = config_dict.placeholder(int)  # distinct images that may be asked; none is no limit

    config.data = ConfigDict(dict(
        source="digits",  # digits, arrays
        path="",  # arrays: npz of the pool
        eval_path="",  # arrays: npz of the evaluation images
    ))

    # Views that training sees; keywords of qmx.augment.make_view. `size` 0 is the image's own.
    crop = dict(size=0, crop_ratio=(3 / 4, 4 / 3), flip_p=0.5)
    config.strong_view = ConfigDict(dict(
        **crop, crop_scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey_p=0.2,
        blur_sigma=(0.1, 2.0), blur_p=0.5))  # MoCo v2's: moco, simsiam
    config.weak_view = ConfigDict(dict(
        **crop, crop_scale=(0.08, 1.0), jitter=(0.0, 0.0, 0.0, 0.0), jitter_p=0.0, grey_p=0.0,
        blur_sigma=(0.1, 2.0), blur_p=0.0))  # crop and flip: rotation, distillation, the target

    config.target = training(
        kind="train",  # train: on the pool's labels
        arch="resnet50",
        seed=0,
    )
    config.student = ConfigDict(dict(arch="resnet50"))

    config.pretrain = ConfigDict()
    config.pretrain.moco = training(
        epochs=200.0, learning_rate=0.03, schedule="cosine_by_epoch",
        queue_size=65536,  # K, a multiple of batch_size
        temperature=0.2,
        decay=0.999,  # m of the momentum encoder
        features=128,  # D
        group_size=32,  # images that share batch statistics
    )
    config.pretrain.simsiam = training(
        epochs=100.0, batch_size=512, learning_rate=0.1, schedule="cosine_by_epoch",  # 0.05 x batch / 256
        features=2048,  # D
        layers=3,  # of the projector; 2 on CIFAR
        hidden=512,  # of the predictor
        fix_predictor_rate=True,
    )
    config.pretrain.rotation = training(
        epochs=70.0, batch_size=128, learning_rate=0.2, warmup_epochs=5.0, milestones=(30.0, 50.0))

    config.distill = training(
        epochs=20.0, learning_rate=0.01, milestones=(12.0, 16.0), factor=0.2, weight_decay=5e-4,
        head_learning_rate=1.0,  # of the classifier; the backbone has learning_rate
        min_steps=0,  # a transfer set so small that `epochs` are fewer steps trains for this many
        learn_from="scores",  # the target's, or the true "labels" of the same images
        target_temperature=1.5,
        student_temperature=1.0,
    )

    # Weighted k-nearest-neighbour accuracy of each encoder, on a held-out fifth of the pool.
    config.monitor = ConfigDict(dict(knn_k=200, knn_temperature=0.1))
    return config.lock()  # so that a misspelt key in a config file is an error


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config with its value, as `--config.KEY` spells it."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


class Cell(NamedTuple):
    """One run of the grid: one student."""

    init: str
    select: str
    access: str
    fraction: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.init}-{self.select}-{self.access}-{self.fraction:g}-seed{self.seed}"


def cells(config: Any) -> list[Cell]:
    """The product of the grid's axes, the cheap ones first."""
    grid = product(config.fractions, config.inits, config.selects, config.accesses, config.seeds)
    return [Cell(init, select, access, fraction, seed) for fraction, init, select, access, seed in grid]


def validate(config: Any, data: Dataset) -> None:
    """Raise ValueError, one line with the value and the cure, for what cannot be run."""
    for problem in _problems(config, data):
        raise ValueError(problem)


def warnings(config: Any, data: Dataset) -> list[str]:
    """What can be run and is likely to disappoint, a line each."""
    found = []
    if "moco" in config.inits:
        keys = config.pretrain.moco
        if keys.queue_size > data.pool.size:
            found.append(f"pretrain.moco.queue_size {keys.queue_size} is larger than the pool of {data.pool.size} "
                         "images, so that an image's own former keys are among its negatives")
        if keys.group_size == keys.batch_size:
            found.append("pretrain.moco.group_size is the whole batch: its batch statistics tell which key belongs to "
                         "which query, and no shuffling hides it; 32 images a group is the reference's")
    return found


def choice(key: str, value: str, known: Any) -> Iterator[str]:
    """A problem unless `value` is among the known ones."""
    if value not in known:
        close = difflib.get_close_matches(str(value), known, 1)
        hint = f"did you mean {close[0]!r}" if close else f"choose among {', '.join(known)}"
        yield f"{key} has the unknown value {value!r}; {hint}"


def _problems(config: Any, data: Dataset) -> Iterator[str]:
    for key, default in leaves(base()):
        if isinstance(default, tuple) and "." in key:
            yield from _tuple_problems(key, default, dict(leaves(config))[key])
    known = {"inits": INITS, "selects": SELECTS, "accesses": ACCESS}
    for axis in ("seeds", "fractions", *known):
        values = config[axis]
        if not values:
            yield f"{axis} is empty; name at least one"
        if len(set(values)) < len(values):
            yield f"{axis} names one value twice: {values}"
        for value in values if axis in known else ():
            yield from choice(axis, value, known[axis])
    for seed in (*config.seeds, config.target.seed):
        if not isinstance(seed, int) or seed < 0:
            yield f"seed {seed!r} is not a whole number from 0 on"
    for fraction in config.fractions:
        if isinstance(fraction, str):
            yield f"fractions has {fraction!r}, which is not a number"
        try:
            subset_size(fraction, data.pool.size)
        except ValueError as error:
            yield f"fractions: {error}"
    if config.budget is not None and config.budget < 1:
        yield f"budget {config.budget} allows no query; leave it out for no limit"

    yield from choice("target.kind", config.target.kind, TARGETS)
    yield from choice("target.arch", config.target.arch, ARCHS)
    yield from choice("student.arch", config.student.arch, ARCHS)
    yield from choice("distill.learn_from", config.distill.learn_from, LEARN_FROM)
    if config.monitor.knn_k < 1 or not config.monitor.knn_temperature > 0:
        yield f"monitor needs knn_k >= 1 and knn_temperature > 0, not {dict(config.monitor)}"
    for name in ("target_temperature", "student_temperature"):
        if not config.distill[name] > 0:
            yield f"distill.{name} {config.distill[name]} must be above 0"

    pretrained = {f"pretrain.{init}": config.pretrain[init] for init in config.inits if init != "none"}
    for name, keys in {"target": config.target, "distill": config.distill, **pretrained}.items():
        yield from _training_problems(name, keys, data, whole_epochs=name.startswith("pretrain"))
    for name in ("strong_view", "weak_view"):
        yield from _view_problems(name, config[name], data)
    if "moco" in config.inits:
        moco = config.pretrain.moco
        if moco.queue_size < 1 or moco.queue_size % moco.batch_size:
            yield (f"pretrain.moco.queue_size {moco.queue_size} is not a multiple of batch_size {moco.batch_size}; "
                   f"{max(moco.queue_size // moco.batch_size, 1) * moco.batch_size} is")
        if moco.group_size < 2 or moco.batch_size % moco.group_size:
            yield (f"pretrain.moco.group_size {moco.group_size} does not divide batch_size {moco.batch_size} "
                   "into groups of two images and more")
        if not 0 <= moco.decay <= 1 or not moco.temperature > 0:
            yield f"pretrain.moco needs 0 <= decay <= 1 and temperature > 0, not {moco.decay} and {moco.temperature}"


def _tuple_problems(key: str, default: tuple, value: tuple) -> Iterator[str]:
    if not all(isinstance(number, int | float) for number in value):
        yield f"{key} {value} must hold numbers"
    if len(value) != len(default) and not key.endswith("milestones"):
        yield f"{key} {value} must hold {len(default)} numbers, as {default} does"


def _training_problems(name: str, keys: Any, data: Dataset, whole_epochs: bool) -> Iterator[str]:
    if keys.batch_size < 2:
        yield f"{name}.batch_size {keys.batch_size} must be two images or more, for their batch statistics"
    try:
        check_batch(keys.batch_size, f"{name}.batch_size")
    except ValueError as error:
        yield str(error)
    if keys.batch_size > data.pool.size:
        yield f"{name}.batch_size {keys.batch_size} is larger than the pool of {data.pool.size} images"
    if not keys.epochs > 0:
        yield f"{name}.epochs {keys.epochs} must be above 0"
    if whole_epochs and keys.epochs != int(keys.epochs):
        yield f"{name}.epochs {keys.epochs} must be a whole number"
    for rate in ("learning_rate", "head_learning_rate"):
        if rate in keys and not 0 <= keys[rate] < float("inf"):
            yield f"{name}.{rate} {keys[rate]} must be a number from 0 on"
    if not 0 <= keys.momentum < 1 or not keys.weight_decay >= 0:
        yield f"{name} needs 0 <= momentum < 1 and weight_decay >= 0, not {keys.momentum} and {keys.weight_decay}"
    yield from choice(f"{name}.schedule", keys.schedule, SCHEDULES)
    yield from choice(f"{name}.weight_decay_on", keys.weight_decay_on, DECAYS)


def _view_problems(name: str, view: Any, data: Dataset) -> Iterator[str]:
    low, high = view.crop_scale
    if not 0 < low <= high <= 1:
        yield f"{name}.crop_scale {view.crop_scale} must be two shares with 0 < smallest <= largest <= 1"
    for key in ("flip_p", "jitter_p", "grey_p", "blur_p"):
        if not 0 <= view[key] <= 1:
            yield f"{name}.{key} {view[key]} is not a probability"
    if view.size < 0:
        yield f"{name}.size {view.size} must be pixels, or 0 for the image's own"
    if not view.size and data.shape[0] != data.shape[1]:
        yield f"{name}.size must be given, for the images are not square but {data.shape[0]} x {data.shape[1]}"


def percent(fraction: float) -> str:
    """0.01 -> "1 %", exactly."""
    return f"{(Decimal(repr(float(fraction))) * 100).normalize():f} %"
