"""Recipe of a training: its numbers, its optimiser, and its number of steps."""

from typing import NamedTuple

import optax

from qmx import optim
from qmx.data import epoch_steps
from qmx.layer_rates import by_layer


class Recipe(NamedTuple):
    """Keys of a training in a config, by their names there."""

    epochs: float
    batch_size: int
    optimizer: str
    learning_rate: float
    schedule: str
    warmup_epochs: float
    warmup_start: float
    milestones: tuple[float, ...]
    factor: float
    momentum: float
    nesterov: bool
    weight_decay: float
    weight_decay_on: str
    # Of students alone.
    head_learning_rate: float | None = None  # None is the backbone's
    min_steps: int = 0
    target_temperature: float | None = None  # None is the method's own
    student_temperature: float | None = None
    jitter: tuple[float, ...] = ()
    standardize: bool = False
    layer_decay: float = 1.0
    drop_path: float = 0.0


def optimiser(keys: Recipe, steps: int, **rates: tuple[float, str]) -> optax.GradientTransformation:
    """The optimiser of a recipe; `rates` gives each part its (learning rate, schedule)."""
    schedules = {
        part: optim.schedule(
            name,
            rate,
            epochs=keys.epochs,
            steps=steps,
            warmup_epochs=keys.warmup_epochs,
            warmup_start=keys.warmup_start,
            milestones=keys.milestones,
            factor=keys.factor,
        )
        for part, (rate, name) in rates.items()
    }
    make = optim.OPTIMIZERS[keys.optimizer]
    tx = make(
        schedules,
        momentum=keys.momentum,
        nesterov=keys.nesterov,
        weight_decay=keys.weight_decay,
        weight_decay_on=keys.weight_decay_on,
    )
    return tx if keys.layer_decay == 1 else optax.chain(tx, by_layer(keys.layer_decay))


def pretrain_steps(keys: Recipe, pool: int) -> int:
    """Steps of a pretraining: whole epochs, each without its last, smaller batch."""
    return int(keys.epochs) * int(epoch_steps(pool, keys.batch_size, drop_last=True))


def distill_steps(keys: Recipe, size: int) -> int:
    """Steps over a transfer set of `size` images: `epochs` seamless ones, but at least
    `min_steps`."""
    return max(
        -int(-keys.epochs * epoch_steps(size, keys.batch_size, drop_last=False) // 1),
        keys.min_steps,
    )
