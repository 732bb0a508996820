"""Refusals before any compute is spent, and warnings."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmx.data import Dataset
from qmx.grid import USES, Cell, cells, columns, encoders, inits, recipe_name, recipe_of
from qmx.ledger import access
from qmx.ledger.content import DTYPES as LEDGER_DTYPES
from qmx.models.resnet import ARCHS
from qmx.optim import DECAYS, OPTIMIZERS, SCHEDULES
from qmx.selection.select import SELECTS
from qmx.settings import base, distilling, leaves
from qmx.sharding import check_batch
from qmx.targets.address import check_address
from qmx.targets.query import PRECISIONS

TARGETS = ("train", "torch", "served", "callable", "recorded")
LEARN_FROM = ("scores", "labels")
HEADS = ("mlp", "linear")
DTYPES = ("float64", "float32", "bfloat16")


def validate(config: Any, data: Dataset) -> None:
    """Raise ValueError, one line with the value and the cure, for what cannot be run."""
    for problem in _problems(config, data):
        raise ValueError(problem)


def choice(key: str, value: str, known: Any) -> Iterator[str]:
    """A problem unless `value` is among the known ones."""
    if value not in known:
        close = difflib.get_close_matches(str(value), known, 1)
        hint = f"did you mean {close[0]!r}" if close else f"choose among {', '.join(known)}"
        yield f"{key} has the unknown value {value!r}; {hint}"


def _problems(config: Any, data: Dataset) -> Iterator[str]:
    defaults, values = dict(leaves(base())), dict(leaves(config))
    for name in config.recipes:
        defaults.update(leaves(distilling(), f"recipes.{name}."))
    for key, default in defaults.items():
        if isinstance(default, tuple) and "." in key:
            yield from _tuple_problems(key, default, values[key])
    known = {"inits": inits(config), "selects": SELECTS, "uses": USES}
    for axis in ("seeds", "accesses", *known):
        values = config[axis]
        if not values:
            yield f"{axis} is empty; name at least one"
        if len(set(values)) < len(values):
            yield f"{axis} names one value twice: {values}"
        for value in values if axis in known else ():
            yield from choice(axis, value, known[axis])
    for level in config.accesses:
        if not access.known(level):
            yield from choice("accesses", level, access.names())
    for seed in (*config.seeds, config.target.seed):
        if not isinstance(seed, int) or seed < 0:
            yield f"seed {seed!r} is not a whole number from 0 on"
    for name, keys in config.recipes.items():
        for init in keys.inits:
            yield from choice(f"recipes.{name}.inits", init, inits(config))
    try:
        shown, runs = columns(config), cells(config, data.pool.size)
    except ValueError as error:
        yield str(error)
        return
    for column in shown:
        yield from choice("also", column.init, inits(config))
    for cell in runs:
        try:
            recipe_name(config, cell)
        except ValueError as error:
            yield str(error)
    if any(column.select == "list" for column in shown) and not config.lists:
        yield "the selection 'list' needs --config.lists, files of image names"
    files = {
        "target.path": config.target.path if config.target.kind in ("torch", "recorded") else "",
        "target.ca_file": config.target.ca_file,
        **{f"pretrain.{init}.path": keys.path for init, keys in config.pretrain.items()},
        **{f"lists[{place}]": path for place, path in enumerate(config.lists)},
    }
    for key, path in files.items():
        if path and not Path(path).is_file():
            yield f"{key} {path}: no such file"
    if config.rounds < 1:
        yield f"rounds {config.rounds} must be 1 or more: without any, nothing is chosen by answers"
    if config.budget is not None and config.budget < 1:
        yield f"budget {config.budget} allows no query; leave it out for no limit"
    if config.price is not None and not 0 <= config.price < float("inf"):
        yield f"price {config.price} must be what 1,000 calls cost, from 0 on"
    for share in config.reach:
        if not isinstance(share, int | float) or not 0 < share <= 1:
            yield (
                f"reach has {share!r}, which is no share of the target's accuracy above 0 and up"
                " to 1"
            )

    yield from choice("ledger_dtype", config.ledger_dtype, LEDGER_DTYPES)
    if not config.save_minutes > 0:
        yield f"save_minutes {config.save_minutes} must be above 0"

    yield from choice("target.kind", config.target.kind, TARGETS)
    yield from _target_problems(config.target)
    for level in {column.access for column in shown}:
        if access.known(level) and not access.derivable(config.target.access, level):
            yield (
                f"accesses has {level!r}, and a target of target.access={config.target.access}"
                " shows no more than that; lower accesses"
            )
    yield from choice("student.arch", config.student.arch, ARCHS)
    yield from choice("student.dtype", config.student.dtype, DTYPES)
    recipes = _recipes(config, runs)
    for name, keys in recipes.items():
        yield from choice(f"{name}.learn_from", keys.learn_from, LEARN_FROM)
        for temperature in ("target_temperature", "student_temperature"):
            if not keys[temperature] > 0:
                yield f"{name}.{temperature} {keys[temperature]} must be above 0"
    if config.monitor.knn_k < 1 or not config.monitor.knn_temperature > 0:
        yield (
            f"monitor needs knn_k >= 1 and knn_temperature > 0, not {config.monitor.knn_k} and "
            f"{config.monitor.knn_temperature}"
        )
    graph = config.propagation
    if graph.neighbours < 1:
        yield f"propagation.neighbours {graph.neighbours} must be 1 or more"
    if not 0 < graph.alpha < 1 or not graph.power > 0:
        yield (
            f"propagation.alpha {graph.alpha} must be below 1 and above 0, and power {graph.power}"
            " above 0"
        )
    yield from _fixmatch_problems(config.fixmatch)
    trained = {
        f"pretrain.{init}": config.pretrain[init]
        for init in encoders(config)
        if not config.pretrain[init].path
    }
    if trained.pop("pretrain.imported", None):
        yield "the init 'imported' needs --config.pretrain.imported.path=WEIGHTS"
    if config.target.kind == "train":
        trained["target"] = config.target
    if config.monitor.linear:
        trained["monitor.probe"] = config.monitor.probe
    for name, keys in {**trained, **recipes}.items():
        yield from _training_problems(name, keys, data, whole_epochs=name.startswith("pretrain"))
    for name in ("strong_view", "weak_view"):
        yield from _view_problems(name, config[name], data)
    if "pretrain.moco" in trained:
        moco = config.pretrain.moco
        yield from choice("pretrain.moco.head", moco.head, HEADS)
        if moco.queue_size < 1 or moco.queue_size % moco.batch_size:
            yield (
                f"pretrain.moco.queue_size {moco.queue_size} is not a multiple of batch_size"
                f" {moco.batch_size};"
                f" {max(moco.queue_size // moco.batch_size, 1) * moco.batch_size} is"
            )
        if moco.group_size < 2 or moco.batch_size % moco.group_size:
            sizes = [size for size in range(2, moco.batch_size + 1) if moco.batch_size % size == 0]
            near = sorted(sorted(sizes, key=lambda size: abs(size - moco.group_size))[:2])
            yield (
                f"pretrain.moco.group_size {moco.group_size} does not divide batch_size"
                f" {moco.batch_size} into groups of two images and more;"
                f" {' and '.join(map(str, near))} do"
            )
        if not 0 <= moco.decay <= 1 or not moco.temperature > 0:
            yield (
                f"pretrain.moco needs 0 <= decay <= 1 and temperature > 0, not {moco.decay} and"
                f" {moco.temperature}"
            )


def _fixmatch_problems(keys: Any) -> Iterator[str]:
    if keys.mu < 1:
        yield (
            f"fixmatch.mu {keys.mu} must be 1 or more: images of the pool for each that was asked"
            " about"
        )
    if not 0 <= keys.threshold <= 1:
        yield f"fixmatch.threshold {keys.threshold} is not a probability"
    if not 0 <= keys.weight < float("inf"):
        yield f"fixmatch.weight {keys.weight} must be a number from 0 on"
    if not 0 <= keys.decay < 1:
        yield (
            f"fixmatch.decay {keys.decay} must be below 1, which freezes the teacher, and from 0 on"
        )
    if not 0 <= keys.epochs < float("inf"):
        yield (
            f"fixmatch.epochs {keys.epochs} must be a number of passes over the pool, or 0 for the"
            " recipe's steps"
        )


def _recipes(config: Any, runs: list[Cell]) -> dict[str, Any]:
    """Every recipe that one of the runs is trained by, under the key that it stands at."""
    return {
        f"recipes.{name}" if name else "distill": recipe_of(config, cell)
        for cell in runs
        for name in [recipe_name(config, cell)]
    }


def _target_problems(keys: Any) -> Iterator[str]:
    if keys.arch or keys.kind != "torch":
        yield from choice("target.arch", keys.arch, ARCHS)
    yield from choice("target.precision", keys.precision, PRECISIONS)
    if keys.kind == "torch" and not keys.path:
        yield "target.kind=torch needs the weights: --config.target.path=FILE.pth"
    if keys.kind in ("train", "served") and keys.path:
        yield (
            f"target.path {keys.path} is read by target.kind=torch, callable and recorded alone;"
            " set one of them, or leave the path out"
        )
    if keys.kind == "callable" and not keys.path:
        yield "target.kind=callable needs the function: --config.target.path=FILE.py:function"
    if keys.kind == "recorded" and not keys.path:
        yield "target.kind=recorded needs the answers: --config.target.path=ANSWERS.npz or .parquet"
    if keys.kind == "served" and not (keys.url and keys.model):
        yield (
            "target.kind=served needs --config.target.url=https://HOST:PORT and"
            " --config.target.model=NAME"
        )
    yield from choice("target.access", keys.access, access.ACCESS)
    if keys.kind in ("train", "torch") and keys.access != "logits":
        yield (
            f"target.access {keys.access} is what target.kind=served and callable answer with; of a"
            f" target that is computed here --config.accesses shows less: ({keys.access!r},)"
        )
    try:
        check_address(keys.url or "http://localhost", keys.token_env)
    except ValueError as error:
        yield str(error)
    if keys.retries < 0 or keys.rate < 0 or not keys.timeout > 0 or keys.batch_size < 1:
        yield (
            "target needs retries and rate from 0 on, timeout above 0 and batch_size from 1 on,"
            f" not {keys.retries}, {keys.rate}, {keys.timeout} and {keys.batch_size}"
        )
    if len(keys.expect) not in (0, 2):
        yield f"target.expect {keys.expect} must be a top-1 and a top-5 accuracy in per cent, or ()"


def _tuple_problems(key: str, default: tuple, value: tuple) -> Iterator[str]:
    if not all(isinstance(number, int | float) for number in value):
        yield f"{key} {value} must hold numbers"
    if len(value) != len(default) and not key.endswith(("milestones", "mean", "std", "expect")):
        yield f"{key} {value} must hold {len(default)} numbers, as {default} does"


def _training_problems(name: str, keys: Any, data: Dataset, whole_epochs: bool) -> Iterator[str]:
    if keys.batch_size < 2:
        yield (
            f"{name}.batch_size {keys.batch_size} must be two images or more, for their batch"
            " statistics"
        )
    try:
        check_batch(keys.batch_size, f"{name}.batch_size")
    except ValueError as error:
        yield str(error)
    if keys.batch_size > data.pool.size:
        yield (
            f"{name}.batch_size {keys.batch_size} is larger than the pool of {data.pool.size}"
            " images"
        )
    if not keys.epochs > 0:
        yield f"{name}.epochs {keys.epochs} must be above 0"
    if whole_epochs and keys.epochs != int(keys.epochs):
        yield f"{name}.epochs {keys.epochs} must be a whole number"
    for rate in ("learning_rate", "head_learning_rate"):
        if rate in keys and not 0 <= keys[rate] < float("inf"):
            yield f"{name}.{rate} {keys[rate]} must be a number from 0 on"
    if not 0 <= keys.momentum < 1 or not keys.weight_decay >= 0:
        yield (
            f"{name} needs 0 <= momentum < 1 and weight_decay >= 0, not {keys.momentum} and"
            f" {keys.weight_decay}"
        )
    yield from choice(f"{name}.optimizer", keys.optimizer, OPTIMIZERS)
    yield from choice(f"{name}.schedule", keys.schedule, SCHEDULES)
    yield from choice(f"{name}.weight_decay_on", keys.weight_decay_on, DECAYS)


def _view_problems(name: str, view: Any, data: Dataset) -> Iterator[str]:
    low, high = view.crop_scale
    if not 0 < low <= high <= 1:
        yield (
            f"{name}.crop_scale {view.crop_scale} must be two shares with 0 < smallest <= largest"
            " <= 1"
        )
    for key in ("flip_p", "jitter_p", "grey_p", "blur_p"):
        if not 0 <= view[key] <= 1:
            yield f"{name}.{key} {view[key]} is not a probability"
    if view.size < 0:
        yield f"{name}.size {view.size} must be pixels, or 0 for the image's own"
    if not view.size and data.shape[0] != data.shape[1]:
        yield (
            f"{name}.size must be given, for the images are not square but {data.shape[0]} x"
            f" {data.shape[1]}"
        )
