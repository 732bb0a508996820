"""From a config to things that train: views, networks, optimisers, methods, compiled once each."""

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qmx import models
from qmx.augment import make_view
from qmx.contract import Batch, Method, Network, View
from qmx.data import epoch_steps
from qmx.grid import Cell, recipe_of
from qmx.methods import (
    distill,
    emp_ssl,
    fastsiam,
    features,
    fixmatch,
    linear,
    moco,
    rotation,
    simsiam,
)
from qmx.networks import Look, backbone, evaluated_in
from qmx.recipes import Recipe, distill_steps, optimiser, pretrain_steps
from qmx.train import TrainState, init_state, make_step


def recipe(keys: Any) -> Recipe:
    """The `Recipe` of a config's training keys, which may hold others too."""
    return Recipe(**{name: keys[name] for name in Recipe._fields if name in keys})


class Trainer(NamedTuple):
    """A method and its optimiser, compiled once for all runs that share them."""

    method: Method
    init: Callable[[jax.Array], TrainState]  # rng -> the state before the first step
    step: Callable


def view(keys: Any, seen: Look) -> View:
    """The view that a config's `strong_view` or `weak_view` describes."""
    keywords = {**keys, "size": keys["size"] or seen.shape[0]}
    return make_view(**keywords, mean=seen.mean, std=seen.std)


def fixmatch_steps(keys: Recipe, fixmatch_keys: Any, asked: int, pool: int) -> int:
    """Steps of a student that labels the pool itself: its recipe's, or those of `epochs` over the
    pool if more."""
    over_pool = fixmatch_keys.epochs * epoch_steps(
        pool, keys.batch_size * fixmatch_keys.mu, drop_last=False
    )
    return max(distill_steps(keys, asked), -int(-over_pool // 1))


class Pretraining(NamedTuple):
    """A line of the table of methods that pretrain without labels."""

    # (the config's keys, options -> the backbone, view) -> the method
    make: Callable[[Any, Callable[..., Network], View], Method]
    view: str = "strong_view"  # or "weak_view": the config's view that it trains on
    parts: tuple[str, ...] = ("backbone", "head")  # of its params
    # Parts whose learning rate stays as it is, by the keys.
    constant: Callable[[Any], tuple[str, ...]] = lambda keys: ()


def _moco(keys: Any, net: Callable[..., Network], view: View) -> Method:
    if keys.batch_size % keys.group_size:
        # The whole batch is the last resort: qmx.cautions says why.
        half = range(2, keys.batch_size // 2 + 1)
        sizes = [size for size in half if keys.batch_size % size == 0] or [keys.batch_size]
        near = sorted(sorted(sizes, key=lambda size: abs(size - keys.group_size))[:2])
        raise ValueError(
            f"group_size {keys.group_size} does not divide batch_size {keys.batch_size} into groups"
            f" of two images and more; use {' or '.join(map(str, near))}"
        )
    head = (models.moco_head if keys.head == "mlp" else models.classifier)(keys.features)
    return moco.make(
        net(stats_groups=keys.batch_size // keys.group_size),
        head,
        view,
        queue_size=keys.queue_size,
        temperature=keys.temperature,
        decay=keys.decay,
    )


def _siamese(make: Callable[..., Method], *also: str) -> Pretraining:
    """The line of `simsiam.make` or of `fastsiam.make`, which takes the keys `also` too."""
    return Pretraining(
        lambda keys, net, view: make(
            net(zero_init=True),
            models.simsiam_projector(keys.features, keys.layers),
            models.simsiam_predictor(keys.hidden),
            view,
            **{key: keys[key] for key in also},
        ),
        parts=("backbone", "head", "predictor"),
        constant=lambda keys: ("predictor",) if keys.fix_predictor_rate else (),
    )


# By the name in `config.inits` and `config.pretrain`. A new method is one file in qmx/methods, a
# line here, and its keys in qmx/settings.py.
PRETRAINING: dict[str, Pretraining] = {
    "moco": Pretraining(_moco),
    "simsiam": _siamese(simsiam.make),
    "fastsiam": _siamese(fastsiam.make, "views"),
    "emp_ssl": Pretraining(
        lambda keys, net, view: emp_ssl.make(
            net(),
            models.emp_ssl_projector(keys.features, keys.hidden),
            view,
            views=keys.views,
            similarity=keys.similarity,
            distortion=keys.distortion,
        )
    ),
    "rotation": Pretraining(
        lambda keys, net, view: rotation.make(net(), models.classifier(4), view), view="weak_view"
    ),
    "features": Pretraining(
        lambda keys, net, view: features.make(
            net(), partial(models.classifier, standardize=True), view
        ),
        view="weak_view",
    ),
}


@cache
def pretrainer(
    name: str, keys: Any, student: Any, view_keys: Any, seen: Look, steps: int, width: int = 0
) -> Trainer:
    """The `Trainer` of a method of the table `PRETRAINING`, by its keys of the config; `width` as
    `of_encoder`'s."""
    row = PRETRAINING[name]

    def net(**options: Any) -> Network:
        if not options:
            return backbone(student.arch, student.dtype, seen)
        return models.backbone(student.arch, dtype=jnp.dtype(student.dtype), **options)

    view_keys = {**view_keys, "crop_scale": keys.get("crop_scale", view_keys["crop_scale"])}
    method = row.make(keys, net, view(view_keys, seen))
    constant = row.constant(keys)
    rates = {
        part: (keys.learning_rate, "constant" if part in constant else keys.schedule)
        for part in row.parts
    }
    tx = optimiser(recipe(keys), steps, **rates)
    learned = {"features": width} if "of" in keys else {}
    return _trainer(method, tx, seen, keys.batch_size, **learned)


@cache
def distiller(
    keys: Recipe, arch: str, dtype: str, view_keys: Any, seen: Look, steps: int
) -> Trainer:
    """The `Trainer` of a student, or of a target trained on labels."""
    head, weak, tx, temperatures = _student(keys, view_keys, seen, steps)
    net = backbone(arch, dtype, seen, drop_path=keys.drop_path)
    method = distill.make(net, head, weak, **temperatures)
    return _trainer(method, tx, seen, keys.batch_size, scores=seen.classes)


@cache
def self_labeller(
    keys: Recipe,
    fixmatch_keys: Any,
    arch: str,
    dtype: str,
    weak_keys: Any,
    strong_keys: Any,
    seen: Look,
    steps: int,
) -> Trainer:
    """The `Trainer` of a student that labels the pool itself; see `qmx.methods.fixmatch`."""
    head, weak, tx, temperatures = _student(keys, weak_keys, seen, steps)
    method = fixmatch.make(
        backbone(arch, dtype, seen, drop_path=keys.drop_path),
        head,
        weak,
        view(strong_keys, seen),
        **temperatures,
        **{key: fixmatch_keys[key] for key in fixmatch_keys if key not in ("mu", "epochs")},
    )
    return _trainer(method, tx, seen, keys.batch_size, scores=seen.classes)


def _student(
    keys: Recipe, view_keys: Any, seen: Look, steps: int
) -> tuple[Network, View, optax.GradientTransformation, dict[str, Any]]:
    """The head, the weak view, the optimiser and the temperatures of a student's recipe."""
    if any(keys.jitter):
        view_keys = {**view_keys, "jitter": keys.jitter, "jitter_p": 1.0}
    head = models.classifier(seen.classes, standardize=keys.standardize)
    rate = keys.head_learning_rate
    tx = optimiser(
        keys,
        steps,
        backbone=(keys.learning_rate, keys.schedule),
        head=(keys.learning_rate if rate is None else rate, keys.schedule),
    )
    given = {
        "target_temperature": keys.target_temperature,
        "student_temperature": keys.student_temperature,
    }
    temperatures = {name: value for name, value in given.items() if value is not None}
    return head, view(view_keys, seen), tx, temperatures


@cache
def prober(keys: Recipe, arch: str, dtype: str, view_keys: Any, seen: Look, steps: int) -> Trainer:
    """The `Trainer` of a linear probe."""
    head = models.classifier(seen.classes, kernel_std=0.01)  # the reference's initialisation
    method = linear.make(backbone(arch, dtype, seen), head, view(view_keys, seen))
    tx = optimiser(keys, steps, head=(keys.learning_rate, keys.schedule))
    return _trainer(method, tx, seen, keys.batch_size, scores=seen.classes)


def _trainer(
    method: Method, tx: optax.GradientTransformation, seen: Look, batch_size: int, **widths: int
) -> Trainer:
    """The trainer of batches of images and of arrays f32[B, width] beside them, by their names."""
    batch: Batch = {"image": jnp.zeros((batch_size, *seen.shape), jnp.uint8)}
    batch |= {name: jnp.zeros((batch_size, width)) for name, width in widths.items()}
    # It runs once, so it need not be compiled well: 0.6 s and not 2.7 for MoCo on digits, two
    # cores.
    init = jax.jit(
        lambda rng: init_state(method, tx, rng, batch),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return Trainer(method, init, make_step(method, tx, quickly()))


def of_target(config: Any, seen: Look, pool: int) -> tuple[Trainer, int]:
    """The trainer of a target that is trained on a pool of so many images, and its steps."""
    keys, target = recipe(config.target), config.target
    steps, dtype = distill_steps(keys, pool), evaluated_in(target.precision)
    return distiller(keys, target.arch, dtype, config.weak_view, seen, steps), steps


def of_encoder(
    config: Any, init: str, seen: Look, pool: int, width: int = 2
) -> tuple[Trainer, int]:
    """The trainer of a pretraining, and its steps.

    Args:
      width: D of the features that it learns, if it learns an encoder's. Before they are known any
        number will do, as it changes nothing that could be wrong.
    """
    keys, view_keys = config.pretrain[init], config[PRETRAINING[init].view]
    steps = pretrain_steps(keys, pool)
    return pretrainer(init, keys, config.student, view_keys, seen, steps, width), steps


def of_probe(config: Any, seen: Look, size: int) -> tuple[Trainer, int]:
    """The trainer of a linear probe on so many images, and its steps."""
    keys, student = recipe(config.monitor.probe), config.student
    steps, dtype = distill_steps(keys, size), evaluated_in(student.dtype)
    return prober(keys, student.arch, dtype, config.weak_view, seen, steps), steps


def of_student(config: Any, cell: Cell, seen: Look, pool: int) -> tuple[Trainer, int]:
    """The trainer of a cell's student, and its steps."""
    keys, student, weak = recipe(recipe_of(config, cell)), config.student, config.weak_view
    if cell.use == "fixmatch":
        own, strong = config.fixmatch, config.strong_view
        steps = fixmatch_steps(keys, own, cell.queries, pool)
        made = self_labeller(keys, own, student.arch, student.dtype, weak, strong, seen, steps)
        return made, steps
    steps = distill_steps(keys, pool if cell.use == "pool" else cell.queries)
    return distiller(keys, student.arch, student.dtype, weak, seen, steps), steps


def quickly() -> dict[str, int] | None:
    """Compiler options for CPUs: LLVM's first level, which makes steps as quick in half the time
    (benchmarks/README.md, "Start"), unless the user set another."""
    if jax.default_backend() != "cpu" or "xla_backend_optimization_level" in os.environ.get(
        "XLA_FLAGS", ""
    ):
        return None
    return {"xla_backend_optimization_level": 1}
