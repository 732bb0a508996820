"""Refusals before any compute is spent, beyond what `qmx.ranges` says of single values."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax

from qmx import trainers
from qmx.column_checks import access_problems, head_problems, recipes_of, teacher_problems
from qmx.data import Dataset
from qmx.data.arrays import trigger_images
from qmx.grid import (
    HEADS,
    USES,
    cells,
    columns,
    encoders,
    frozen,
    inits,
    recipe_name,
)
from qmx.metrics import held_out
from qmx.models import ARCHS, NETWORKS
from qmx.models.from_torch import split_part
from qmx.networks import look
from qmx.ranges import choice, rate_problems, size_problems, value_problems, view_problems
from qmx.selection.select import SELECTS
from qmx.settings import leaves
from qmx.sharding import check_batch
from qmx.targets.address import check_address

NO_WEIGHTS = "the init 'imported' needs --config.pretrain.imported.path=WEIGHTS"
FROM_FILES = ("torch", "onnx", "recorded")  # kinds of targets whose path is a file


def check_values(config: Any) -> None:
    """Raise ValueError for a value that cannot be meant, whatever the images are."""
    for problem in chain(value_problems(config), _watch_problems(config)):
        raise ValueError(problem)


def _watch_problems(config: Any) -> Iterator[str]:
    """A line for each file that is to be watched and is not there, whether it is needed or not."""
    for key, files in leaves(config):
        for file in files if key.endswith("watch") else ():
            if not Path(file).is_file():
                yield f"{key} {file}: no such file"


def validate(config: Any, data: Dataset, stage: str = "all") -> None:
    """Raise ValueError, one line with the value and the cure, for a config that cannot be run.

    Its values are those that `check_values` let pass. The stage pretrain needs a pool and its own
    settings, and nothing else.
    """
    problems = _pretraining_problems if stage == "pretrain" else _problems
    for problem in problems(config, data, stage):
        raise ValueError(problem)


def _pretraining_problems(config: Any, data: Dataset, stage: str) -> Iterator[str]:
    try:
        names = encoders(config)
    except ValueError as error:
        yield str(error)
        return
    yield from teacher_problems(config)
    if not config.seeds:
        yield "seeds is empty; name at least one"
    if not names:
        yield (
            f"--stage={stage} has nothing to train, for inits {config.inits} names no pretraining;"
            f" choose among {', '.join(inits(config)[1:])}"
        )
    for init in names:
        yield from choice("inits", init, inits(config))
        keys = config.pretrain[init]
        if frozen(config, init) and not keys.path:
            yield f"the init {init!r} needs --config.pretrain.{init}.path, its {keys.kind}"
        elif frozen(config, init) and keys.kind == "callable":
            continue  # no file alone
        elif keys.path and not split_part(keys.path)[0].is_file():
            yield f"pretrain.{init}.path {keys.path}: no such file"
        elif not keys.path and init == "imported":
            yield NO_WEIGHTS
        elif not keys.path:
            yield from _training_problems(f"pretrain.{init}", keys, data, whole_epochs=True)
    for name in ("strong_view", "weak_view"):
        yield from view_problems(name, config[name], data.shape)


def _problems(config: Any, data: Dataset, stage: str) -> Iterator[str]:
    known = {"inits": inits(config), "selects": SELECTS, "uses": USES}
    for axis in ("seeds", "accesses", *known):
        values = config[axis]
        if not values:
            yield f"{axis} is empty; name at least one"
        if len(set(values)) < len(values):
            yield f"{axis} names one value twice: {values}"
        for value in values if axis in known else ():
            yield from choice(axis, value, known[axis])
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
    yield from teacher_problems(config)
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
    if path := config.audit.watermark:
        try:
            trigger_images(path, data.shape, data.classes)
        except ValueError as error:
            yield f"audit.watermark {error}"
    yield from _target_problems(config.target)
    yield from access_problems(config, data, shown)
    yield from head_problems(config, shown, runs)
    recipes = recipes_of(config, [cell for cell in runs if cell.use not in HEADS.values()])
    yield from _label_problems(config, data, stage, {column.select for column in shown}, recipes)
    trained = {
        f"pretrain.{init}": config.pretrain[init]
        for init in encoders(config)
        if not config.pretrain[init].path and init not in frozen_inits
    }
    if strange := [
        key for key in trained if key.partition(".")[2] not in (*trainers.PRETRAINING, "imported")
    ]:
        yield (
            f"{strange[0]} is no method; it needs a kind: weights, callable or table, as"
            " qmx.frozen_keys.add_encoder gives it"
        )
        return
    if trained.pop("pretrain.imported", None):
        yield NO_WEIGHTS
    if config.target.kind == "train":
        trained["target"] = config.target
    if config.monitor.linear:
        trained["monitor.probe"] = config.monitor.probe
    for name, keys in {**trained, **recipes}.items():
        yield from _training_problems(name, keys, data, whole_epochs=name.startswith("pretrain"))
    yield from size_problems(config.student, config.weak_view, data.shape)
    for name in ("strong_view", "weak_view"):
        yield from view_problems(name, config[name], data.shape)


def _label_problems(
    config: Any, data: Dataset, stage: str, selects: set[str], recipes: dict[str, Any]
) -> Iterator[str]:
    """A line for each thing that is missing of the evaluation images and of the labels."""
    if not data.evaluation.size and stage != "monitor":
        yield (
            "there are no images to evaluate on; name some with data.eval_path, with labels or"
            f" without (--stage=pretrain alone does without, and this is --stage={stage})"
        )
    if data.pool.labelled:
        return
    none = f"and the pool {data.name} has none"
    if config.target.kind == "train":
        yield (
            f"target.kind=train learns from labels, {none}; name the model to audit, as"
            " --config.target.kind=callable --config.target.path=FILE.py:function"
        )
    if "class_balanced" in selects:
        yield f"the selection 'class_balanced' reads labels, {none}; 'typiclust' reads none"
    for name, keys in recipes.items():
        if keys.learn_from == "labels":
            yield f"{name}.learn_from 'labels' reads labels, {none}; set it to 'scores'"
    if config.monitor.linear:
        yield f"monitor.linear trains on labels, {none}; set it to False"
    if stage == "monitor":
        yield f"--stage=monitor compares with labels, {none}; --stage=pretrain trains the encoders"


def check_trainers(config: Any, data: Dataset, stage: str = "all") -> None:
    """Build everything that will be trained, abstractly, so that nothing is computed.

    Raises:
      ValueError: what its owner says against it, under the key of the config.
    """
    # A number of classes that is not known yet changes nothing that could be wrong.
    data = data._replace(classes=data.classes or 2)
    for key, make in _trainers(config, data, stage):
        try:
            trainer, _ = make()
            jax.eval_shape(trainer.init, jax.random.key(0))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None


def _trainers(config: Any, data: Dataset, stage: str) -> Iterator[tuple[str, Callable[[], tuple]]]:
    """(key, what makes the trainer) of each kind of training that the config asks for."""
    seen, pool = look(data), data.pool.size
    if config.target.kind == "train" and stage != "pretrain":
        yield "target", partial(trainers.of_target, config, seen, pool)
    for init in encoders(config):
        if not config.pretrain[init].path and not frozen(config, init):
            yield f"pretrain.{init}", partial(trainers.of_encoder, config, init, seen, pool)
    if stage == "pretrain":
        return
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


def _target_problems(keys: Any) -> Iterator[str]:
    if keys.arch or keys.kind != "torch":
        yield from choice("target.arch", keys.arch, NETWORKS if keys.kind == "torch" else ARCHS)
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
    of_a_server = ("url", "model", "version", "token_env", "headers_env", "ca_file")
    if keys.kind != "served" and (strange := [key for key in of_a_server if keys[key]]):
        yield (
            f"target.{strange[0]} is read by target.kind=served alone, and it is {keys.kind}; set"
            " --config.target.kind=served, or leave the key out"
        )
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
    yield from rate_problems(name, keys)
    if whole_epochs and keys.epochs != int(keys.epochs):
        yield f"{name}.epochs {keys.epochs} must be a whole number"
