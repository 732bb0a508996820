"""FixMatch: the images that were not asked about, labelled by an average of the student itself.

Sohn et al. 2020, *FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence*,
with the teacher of Cai et al. 2021, *Exponential Moving Average Normalization for Self-supervised
and Semi-supervised Learning* (EMAN), whose batch-norm statistics are averaged as its parameters
are. It asks nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from qmx.contract import (
    Batch,
    Encoder,
    Method,
    Network,
    PyTree,
    View,
    begin_from,
    chain,
    network_key,
    view_shape,
    wide,
)
from qmx.losses import kl_target_student
from qmx.optim import EmaState, ema


class FixmatchState(NamedTuple):
    """State that FixMatch carries from step to step beside the parameters."""

    stats: PyTree  # running statistics of the network that is trained
    teacher: EmaState  # of an Encoder: the average of its parameters and of these statistics


def make(
    net: Network,
    head: Network,
    weak_view: View,
    strong_view: View,
    *,
    threshold: float = 0.7,
    weight: float = 10.0,
    decay: float = 0.999,
    target_temperature: float = 1.5,
    student_temperature: float = 1.0,
) -> Method:
    """Distillation on what was asked about, and FixMatch's consistency on what was not.

    One step: the teacher moves; it sees the pool's images in the weak view, as in an evaluation,
    and names a class for each. The asked images in the weak view and the pool's in the strong one
    go through the network in one batch, with batch statistics of all of them, as in both
    references. The loss is that of `qmx.methods.distill` on the asked images, and `weight` times
    the cross-entropy with the teacher's class on the pool's, which counts as 0 where the teacher is
    less sure than `threshold`; the mean is over all of the pool's images, those too. The teacher's
    class is hard, as in both papers: with a threshold it replaces the sharpening of soft ones
    (FixMatch, section 2.2).

    Args:
      net: f32[B, S, S, C] -> f32[B, F].
      head: f32[B, F] -> f32[B, N] (`qmx.models.classifier`).
      weak_view, strong_view: of one side S; the weak one is called on the asked images and on the
        pool's, with keys of their own. The papers' strong view is RandAugment, on ImageNet.
      threshold: tau, on the teacher's softmax. EMAN's on ImageNet; FixMatch's on CIFAR-10 is 0.95.
        A student of soft scores is less sure than one of labels.
      weight: lambda_u. EMAN's and FixMatch's on ImageNet; FixMatch's on CIFAR-10 is 1.
      decay: the teacher's share of itself. With 0.999 it averages over a thousand steps: shorter
        runs need less.
      target_temperature, student_temperature: see `qmx.methods.distill.make`.

    Returns:
      A `Method`. The batch carries "image" and "scores" of B asked images as distillation's does,
      and "pool_image", uint8[mu B, H, W, C], whatever else of the pool's the views read having the
      same prefix; mu is a whole number (5 in EMAN, 7 in FixMatch on CIFAR-10). `encoder` and
      `network` give the teacher, which both papers evaluate.
      Metrics: `agreement_top1` as distillation's; `confident`, the share of the pool's images that
      count; `pool_agreement`, the share of them all on which the student, in the strong view, names
      the teacher's class; `pool_loss`, before `weight`.

    Raises:
      ValueError: in `loss`, when the pool's images are no multiple of the asked.
    """
    network = chain(backbone=net, head=head)
    average = ema(decay)

    def init(rng: jax.Array, batch: Batch) -> tuple[PyTree, FixmatchState]:
        params, stats = network.init(rng, view_shape(weak_view, batch))
        return params, FixmatchState(stats, average.init(Encoder(params, stats)))

    def loss(
        params: PyTree, state: FixmatchState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple]:
        asked_key, weak_key, strong_key = jax.random.split(rng, 3)
        pool = {
            name.removeprefix("pool_"): rows
            for name, rows in batch.items()
            if name.startswith("pool_")
        }
        asked, ratio = len(batch["image"]), len(pool["image"]) // len(batch["image"])
        if not ratio or len(pool["image"]) % asked:
            raise ValueError(
                f"{len(pool['image'])} images of the pool beside {asked} that were asked about are"
                " no whole number for each; make them a multiple"
            )

        # Both references move the teacher after the optimiser: that is here, before the next step.
        teacher, averaged = average.update(
            jax.lax.stop_gradient(Encoder(params, state.stats)), state.teacher
        )
        guess, _ = network.apply(teacher.params, teacher.stats, weak_view(weak_key, pool), False)
        classes, sure = guess.argmax(-1), jax.nn.softmax(wide(guess)).max(-1) >= threshold

        # Each asked image is followed by its share of the pool's, so that neither has to change its
        # device.
        parts = weak_view(asked_key, batch), strong_view(strong_key, pool)
        x = jnp.concatenate([part.reshape(asked, -1, *part.shape[1:]) for part in parts], 1)
        logits, stats = network.apply(
            params, state.stats, x.reshape(-1, *x.shape[2:]), True, network_key(rng)
        )
        logits = logits.reshape(asked, 1 + ratio, -1)
        on_asked, on_pool = logits[:, 0], logits[:, 1:].reshape(asked * ratio, -1)

        known = kl_target_student(
            batch["scores"], on_asked, target_temperature, student_temperature
        ).mean()
        guessed = (
            optax.losses.softmax_cross_entropy_with_integer_labels(wide(on_pool), classes) * sure
        ).mean()
        metrics = {
            "agreement_top1": (on_asked.argmax(-1) == batch["scores"].argmax(-1)).mean(),
            "confident": sure.mean(),
            "pool_agreement": (on_pool.argmax(-1) == classes).mean(),
            "pool_loss": guessed,
        }
        return known + weight * guessed, (FixmatchState(stats, averaged), metrics)

    def encoder(params: PyTree, state: FixmatchState) -> Encoder:
        teacher = state.teacher.average
        return Encoder(teacher.params["backbone"], teacher.stats["backbone"])

    def start(
        params: PyTree, state: FixmatchState, encoder: Encoder
    ) -> tuple[PyTree, FixmatchState]:
        params, stats = begin_from(params, state.stats, encoder)
        # The teacher starts as a copy, with the same fresh head.
        copy = jax.tree.map(jnp.copy, Encoder(params, stats))
        return params, FixmatchState(stats, EmaState(copy))

    def kept(params: PyTree, state: FixmatchState) -> Encoder:
        return state.teacher.average  # of the last step

    return Method(init, loss, encoder, start, kept)
