"""Optimisers and schedules by name, rates by part of the network, decay masks, and the EMA.

Everything here is optax; this file writes the recipes of the papers in its terms. All schedules
count in epochs; only this file converts them to steps.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qmx.contract import PyTree, wide

SCHEDULES = ("constant", "cosine", "cosine_by_epoch", "step")
DECAYS = ("all", "kernels")
TRUST_COEFFICIENT = 0.001  # of LARS, as the SimSiam reference's linear evaluation has it
CLIPPED_COEFFICIENT = 0.005  # of LARC, as `main.py` of EMP-SSL's reference has it
# Vectors of vision transformers that have two axes and more: tokens, a table of them, and biases.
VECTORS = ("class", "registers", "positions", "qv_bias", "bias", "scale")

Mask = Callable[[PyTree], PyTree]  # params -> True for each leaf that decays


def schedule(
    name: str,
    learning_rate: float,
    *,
    epochs: float,
    steps: int,
    warmup_epochs: float = 0,
    warmup_start: float = 0,
    milestones: tuple[float, ...] = (),
    factor: float = 0.1,
) -> optax.Schedule:
    """A learning rate as a function of the step.

    Args:
      name: "constant"; "cosine" (to 0 over all steps); "cosine_by_epoch" (the same curve, constant
        in each epoch, as in the code of MoCo and SimSiam: lr (1 + cos(pi epoch / epochs)) / 2 with
        whole epochs); "step" (times `factor` at each of `milestones`).
      learning_rate: the rate after the warm-up.
      epochs: length of the run, in epochs, the unit of `warmup_epochs` and `milestones` too.
      steps: length of the run, in steps; one epoch is steps / epochs.
      warmup_epochs: the rate climbs linearly over these. Then it follows the curve, which starts at
        step 0 and not after the warm-up.
      warmup_start: share of the rate at the start of the climb.
      factor: for "step".

    Raises:
      ValueError: an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if name in ("cosine_by_epoch", "step"):
        changes: Iterable[float] = (
            range(1, math.ceil(epochs)) if name == "cosine_by_epoch" else milestones
        )
        # Whole steps in float64: in float32, on the device, they would be off by some steps.
        boundaries = np.ceil(np.round(np.array(list(changes)) * steps / epochs, 6)).astype(np.int32)

    def rate(step: jax.Array) -> jax.Array:
        done = jnp.asarray(step, jnp.float32) / steps
        if name == "constant":
            value = jnp.float32(learning_rate)
        elif name == "cosine":
            value = learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(done, 1)))
        else:
            passed = jnp.sum(jnp.asarray(step)[..., None] >= boundaries, -1)
            if name == "cosine_by_epoch":
                value = learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * passed / epochs))
            else:
                value = learning_rate * jnp.float32(factor) ** passed
        if warmup_epochs:
            climbed = jnp.minimum(1.0, done * (epochs / warmup_epochs))
            value = value * (warmup_start + (1 - warmup_start) * climbed)
        return value

    return rate


def kernels_only(params: PyTree) -> PyTree:
    """True for kernels: leaves of rank 2 and more, but not a vision transformer's tokens and
    positions, as in timm and MAE. Biases and the scales of norms are none, of whatever rank:
    equinox's convolutions have biases [C, 1, 1]."""

    def name(path: tuple) -> str:
        return str(getattr(path[-1], "key", "")).rpartition("/")[2]

    return jax.tree_util.tree_map_with_path(
        lambda path, p: p.ndim > 1 and name(path) not in VECTORS, params
    )


Decayed = Callable[[Mask | None, optax.Schedule], optax.GradientTransformation]


def sgd(
    rates: optax.Schedule | Mapping[str, optax.Schedule],
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    weight_decay_on: str = "all",
    decayed: Decayed | None = None,
) -> optax.GradientTransformation:
    """SGD in PyTorch's form: add the decay to the gradient, then momentum, then the rate.

    Args:
      rates: one schedule for all parameters, or one for each top-level part of `params`
        ("backbone", "head", ...).
      weight_decay_on: "all" parameters, including batch-norm scales and biases (MoCo, SimSiam,
        torchvision), or only "kernels" (S4L; MAE's fine-tuning), see `kernels_only`.
      decayed: (mask of what decays, rate) -> what makes the decayed gradient; None adds the decay.

    Raises:
      ValueError: an unknown `weight_decay_on`; at the first call, a part of params without a rate.
    """
    mask = _mask(weight_decay_on)
    decayed = decayed or (lambda mask, rate: optax.add_decayed_weights(weight_decay, mask=mask))

    def one(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            decayed(mask, rate), optax.sgd(rate, momentum=momentum or None, nesterov=nesterov)
        )

    return _by_part(rates, one)


def adamw(
    rates: optax.Schedule | Mapping[str, optax.Schedule],
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    weight_decay_on: str = "all",
) -> optax.GradientTransformation:
    """AdamW with beta_1 = `momentum`, beta_2 = 0.999 and epsilon 1e-8; arguments as `sgd`.

    The decay is not part of the gradient: a step takes rate x decay x parameter off.
    Source: Loshchilov & Hutter 2019, as in PyTorch, whose defaults the last two are; so fine-tune
    BEiT and MAE.
    """
    mask = _mask(weight_decay_on)

    def one(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(
            rate, b1=momentum, weight_decay=weight_decay, mask=mask, nesterov=nesterov
        )

    return _by_part(rates, one)


def lars(
    rates: optax.Schedule | Mapping[str, optax.Schedule],
    *,
    weight_decay: float = 0.0,
    **keywords: Any,
) -> optax.GradientTransformation:
    """SGD whose decayed gradient is scaled by 0.001 |w| / (|g| + decay |w|) first, for each
    parameter; arguments as `sgd`.

    Source: You et al. 2017, as apex's `LARC(trust_coefficient=0.001, clip=False)` in the SimSiam
    reference's linear evaluation (apex/parallel/LARC.py): biases too, and where |w| or |g| is 0
    neither decay nor scaling.
    """
    return sgd(rates, decayed=lambda mask, rate: _scaled(weight_decay, mask), **keywords)


def _scaled(weight_decay: float, mask: Mask | None) -> optax.GradientTransformation:
    """Decay and scaling of `lars`."""

    def scaled(decayed: bool, g: jax.Array, w: jax.Array) -> jax.Array:
        decay = weight_decay if decayed else 0.0
        size, slope = jnp.linalg.norm(w), jnp.linalg.norm(g)
        rate = TRUST_COEFFICIENT * size / (slope + decay * size + 1e-8)  # apex's epsilon
        return jnp.where((size > 0) & (slope > 0), rate * (g + decay * w), g)

    def update(grads: PyTree, params: PyTree | None = None) -> PyTree:
        chosen = mask(params) if mask else jax.tree.map(lambda _: True, params)
        return jax.tree.map(scaled, chosen, grads, params)

    return optax.stateless(update)


def larc(
    rates: optax.Schedule | Mapping[str, optax.Schedule],
    *,
    weight_decay: float = 0.0,
    **keywords: Any,
) -> optax.GradientTransformation:
    """SGD whose rate is, for each parameter, at most 0.005 |w| / (|g| + decay |w|); arguments as
    `sgd`.

    No parameter moves by much more than 0.5 % of its length in one step, however large the loss.
    What does not decay is not limited either.
    Source: You et al. 2017, as solo-learn's `LARSWrapper(clip=True)`, in `lars.py` of EMP-SSL's
    reference, where biases and batch-norm scales are left out ("kernels" here): where |w| or |g| is
    0 neither decay nor limit.
    """
    return sgd(rates, decayed=lambda mask, rate: _limited(weight_decay, mask, rate), **keywords)


def _limited(
    weight_decay: float, mask: Mask | None, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Decay and limit of `larc`."""

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(
        grads: PyTree, state: optax.ScaleByScheduleState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.ScaleByScheduleState]:
        rate = schedule(state.count)

        def limited(chosen: bool, g: jax.Array, w: jax.Array) -> jax.Array:
            if not chosen:
                return g
            size, slope = jnp.linalg.norm(w), jnp.linalg.norm(g)
            most = CLIPPED_COEFFICIENT * size / (slope + weight_decay * size + 1e-8)  # its epsilon
            share = jnp.minimum(most / rate, 1).astype(g.dtype)
            return jnp.where((size > 0) & (slope > 0), share * (g + weight_decay * w), g)

        chosen = mask(params) if mask else jax.tree.map(lambda _: True, params)
        changed = jax.tree.map(limited, chosen, grads, params)
        return changed, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    "adamw": adamw,
    "lars": lars,
    "larc": larc,
}


def _mask(weight_decay_on: str) -> Mask | None:
    """Leaves that decay; None for all of them."""
    if weight_decay_on not in DECAYS:
        raise ValueError(
            f"weight_decay_on {weight_decay_on!r} is unknown; choose one of {', '.join(DECAYS)}"
        )
    return kernels_only if weight_decay_on == "kernels" else None


def _by_part(
    rates: optax.Schedule | Mapping[str, optax.Schedule],
    one: Callable[[optax.Schedule], optax.GradientTransformation],
) -> optax.GradientTransformation:
    """Make an optimiser by `one` of the rate of all parameters, or of each top-level part's."""
    if not isinstance(rates, Mapping):
        return one(rates)

    def part_names(params: dict) -> dict:
        missing = sorted(set(params) - set(rates))
        if missing:
            raise ValueError(f"no learning rate for {missing}; rates are given for {sorted(rates)}")
        return {name: jax.tree.map(lambda _, n=name: n, part) for name, part in params.items()}

    return optax.partition({name: one(rate) for name, rate in rates.items()}, part_names)


class EmaState(NamedTuple):
    """State of `ema`."""

    average: PyTree  # the same tree as the parameters; f32 and wider where these are floats


def ema(decay: float) -> optax.GradientTransformation:
    """Exponential moving average of parameters: average <- decay * average + (1 - decay) * params.

    It is a `GradientTransformation` whose "updates" are the current parameters:
    `average, state = ema(0.999).update(params, state)`. It starts as an exact copy, so it needs no
    bias correction. Decay 0 copies, 1 freezes. `optax.ema` starts from zero and is for gradients.
    That of bfloat16 is kept in float32, which loses no small step. Counters are taken over.
    Source: He et al. 2020 (MoCo), equation 2, where `decay` is m.
    """

    def is_float(p: jax.Array) -> bool:
        return jnp.issubdtype(p.dtype, jnp.inexact)

    def init(params: PyTree) -> EmaState:
        return EmaState(jax.tree.map(lambda p: jnp.array(wide(p) if is_float(p) else p), params))

    def moved(p: jax.Array, average: jax.Array) -> jax.Array:
        if not is_float(p):
            return p
        return optax.incremental_update(p.astype(average.dtype), average, 1 - decay)

    def update(params: PyTree, state: EmaState, _: PyTree | None = None) -> tuple[PyTree, EmaState]:
        average = jax.tree.map(moved, params, state.average)
        return jax.tree.map(lambda a, p: a.astype(p.dtype), average, params), EmaState(average)

    return optax.GradientTransformation(init, update)
