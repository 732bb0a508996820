"""Refusals before any compute is spent, beyond what `qmx.ranges` says of single values."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax

from qmx import trainers
from qmx.data import Dataset
from qmx.grid import (
    HEADS,
    USES,
    Cell,
    cells,
    columns,
    encoders,
    frozen,
    inits,
    recipe_name,
    recipe_of,
)
from qmx.ledger import access
from qmx.metrics import held_out
from qmx.models.from_torch import split_part
from qmx.models.resnet import ARCHS
from qmx.networks import look
from qmx.ranges import choice, value_problems
from qmx.selection.select import SELECTS
from qmx.sharding import check_batch
from qmx.targets.address import check_address

FROM_FILES = ("torch", "onnx", "recorded")  # kinds of targets whose path is a file


def check_values(config: Any) -> None:
    """Raise ValueError for a value that cannot be meant, whatever the images are."""
    for problem in value_problems(config):
        raise ValueError(problem)


def validate(config: Any, data: Dataset) -> None:
    """Raise ValueError, one line with the value and the cure, for a config that cannot be run.

    Its values are those that `check_values` let pass.
    """
    for problem in _problems(config, data):
        raise ValueError(problem)


def _problems(config: Any, data: Dataset) -> Iterator[str]:
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
        "target.path": config.target.path if config.target.kind in FROM_FILES else "",
        "target.ca_file": config.target.ca_file,
        **{f"pretrain.{init}.path": keys.path for init, keys in config.pretrain.items()},
        **{f"lists[{place}]": path for place, path in enumerate(config.lists)},
    }
    frozen_inits = [init for init in encoders(config) if frozen(config, init)]
    for init in frozen_inits:
        keys = config.pretrain[init]
        if not keys.path:
            yield f"the init {init!r} needs --config.pretrain.{init}.path, its {keys.kind}"
        if keys.kind == "callable":  # no file alone
            files.pop(f"pretrain.{init}.path")
    for key, path in files.items():
        if path and not split_part(path)[0].is_file():
            yield f"{key} {path}: no such file"
    yield from _target_problems(config.target)
    for level in {column.access for column in shown}:
        if access.known(level) and not access.derivable(config.target.access, level):
            yield (
                f"accesses has {level!r}, and a target of target.access={config.target.access}"
                " shows no more than that; lower accesses"
            )
    recipes = _recipes(config, runs)
    trained = {
        f"pretrain.{init}": config.pretrain[init]
        for init in encoders(config)
        if not config.pretrain[init].path and init not in frozen_inits
    }
    if strange := [
        key for key in trained if key.partition(".")[2] not in (*trainers.PRETRAINING, "imported")
    ]:
        yield (
            f"{strange[0]} is no method; it needs a kind: weights, callable or table, as in"
            f" config.{strange[0]} = qmx.settings.public(kind='callable', path='FILE.py:function')"
        )
        return
    if trained.pop("pretrain.imported", None):
        yield "the init 'imported' needs --config.pretrain.imported.path=WEIGHTS"
    if config.target.kind == "train":
        trained["target"] = config.target
    if config.monitor.linear:
        trained["monitor.probe"] = config.monitor.probe
    for name, keys in {**trained, **recipes}.items():
        yield from _training_problems(name, keys, data, whole_epochs=name.startswith("pretrain"))
    size = config.student.size
    if size and config.weak_view.size != size:
        yield (
            f"student.size {size} needs weak_view.size={size}, on which students train, and not"
            f" {config.weak_view.size}; strong_view.size is the encoders'"
        )
    for name in ("strong_view", "weak_view"):
        yield from _view_problems(name, config[name], data)


def check_trainers(config: Any, data: Dataset) -> None:
    """Build everything that will be trained, abstractly, so that nothing is computed.

    Raises:
      ValueError: what its owner says against it, under the key of the config.
    """
    for key, make in _trainers(config, data):
        try:
            trainer, _ = make()
            jax.eval_shape(trainer.init, jax.random.key(0))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None


def _trainers(config: Any, data: Dataset) -> Iterator[tuple[str, Callable[[], tuple]]]:
    """(key, what makes the trainer) of each kind of training that the config asks for."""
    seen, pool = look(data), data.pool.size
    if config.target.kind == "train":
        yield "target", partial(trainers.of_target, config, seen, pool)
    for init in encoders(config):
        if not config.pretrain[init].path and not frozen(config, init):
            yield f"pretrain.{init}", partial(trainers.of_encoder, config, init, seen, pool)
    if config.monitor.linear and any(not frozen(config, init) for init in encoders(config)):
        learn = int((~held_out(pool)).sum())
        yield "monitor.probe", partial(trainers.of_probe, config, seen, learn)
    kinds = {
        (recipe_name(config, cell), cell.use): cell
        for cell in cells(config, pool)
        if cell.use not in HEADS.values()
    }
    for (name, _), cell in kinds.items():
        key = f"recipes.{name}" if name else "distill"
        yield key, partial(trainers.of_student, config, cell, seen, pool)


def _recipes(config: Any, runs: list[Cell]) -> dict[str, Any]:
    """Every recipe that one of the runs is trained by, under the key that it stands at."""
    return {
        f"recipes.{name}" if name else "distill": recipe_of(config, cell)
        for cell in runs
        if cell.use not in HEADS.values()
        for name in [recipe_name(config, cell)]
    }


def _target_problems(keys: Any) -> Iterator[str]:
    if keys.arch or keys.kind != "torch":
        yield from choice("target.arch", keys.arch, ARCHS)
    if keys.kind == "torch" and not keys.path:
        yield "target.kind=torch needs the weights: --config.target.path=FILE.pth"
    if keys.kind in ("train", "served") and keys.path:
        yield (
            f"target.path {keys.path} is read by target.kind=torch, onnx, callable and recorded"
            " alone; set one of them, or leave the path out"
        )
    if keys.kind == "callable" and not keys.path:
        yield "target.kind=callable needs the function: --config.target.path=FILE.py:function"
    if keys.kind == "onnx" and not keys.path:
        yield "target.kind=onnx needs the model: --config.target.path=FILE.onnx"
    if keys.kind == "recorded" and not keys.path:
        yield "target.kind=recorded needs the answers: --config.target.path=ANSWERS.npz or .parquet"
    if keys.kind == "served" and not (keys.url and keys.model):
        yield (
            "target.kind=served needs --config.target.url=https://HOST:PORT and"
            " --config.target.model=NAME"
        )
    if keys.kind in ("train", "torch") and keys.access != "logits":
        yield (
            f"target.access {keys.access} is what target.kind=served, onnx and callable answer"
            " with; of a target that is computed here --config.accesses shows less:"
            f" ({keys.access!r},)"
        )
    try:
        check_address(keys.url or "http://localhost", keys.token_env, keys.headers_env)
    except ValueError as error:
        yield str(error)
    if len(keys.expect) not in (0, 2):
        yield f"target.expect {keys.expect} must be a top-1 and a top-5 accuracy in per cent, or ()"


def _training_problems(name: str, keys: Any, data: Dataset, whole_epochs: bool) -> Iterator[str]:
    try:
        check_batch(keys.batch_size, f"{name}.batch_size")
    except ValueError as error:
        yield str(error)
    if keys.batch_size > data.pool.size:
        yield (
            f"{name}.batch_size {keys.batch_size} is larger than the pool of {data.pool.size}"
            " images"
        )
    if whole_epochs and keys.epochs != int(keys.epochs):
        yield f"{name}.epochs {keys.epochs} must be a whole number"


def _view_problems(name: str, view: Any, data: Dataset) -> Iterator[str]:
    for key in ("crop_scale", "crop_ratio", "blur_sigma"):
        low, high = view[key]
        if low > high:
            yield f"{name}.{key} {view[key]} must be the smallest and then the largest"
    if view.jitter[3] > 0.5:
        yield f"{name}.jitter {view.jitter} turns the hue by more than half a turn; use 0.5 or less"
    if not view.size and data.shape[0] != data.shape[1]:
        yield (
            f"{name}.size must be given, for the images are not square but {data.shape[0]} x"
            f" {data.shape[1]}"
        )
