"""FixMatch: an average of the student labels the images that were not asked about.

Sohn et al. 2020, *FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence*,
with the teacher of Cai et al. 2021, *Exponential Moving Average Normalization for Self-supervised
and Semi-supervised Learning* (EMAN), which averages batch-norm statistics as it does parameters.
It asks nothing.

`RULES` say how much each guess counts, `ALIGNMENTS` how it is corrected by class:

Berthelot et al. 2022, *AdaMatch: A Unified Approach to Semi-Supervised Learning and Domain
Adaptation*; Wang et al. 2023, *FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning*;
Chen et al. 2023, *SoftMatch: Addressing the Quantity-Quality Trade-off in Semi-supervised
Learning*. `microsoft/Semi-supervised-learning` (USB) has all of them; the constants are its own.
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
from qmx.losses import kl_target_student, soft_cross_entropy
from qmx.optim import EmaState, ema

RULES = ("fixed", "relative", "free", "soft")
ALIGNMENTS = ("none", "uniform", "asked")
SIGMAS = 2.0  # n_sigma of SoftMatch: its weights fall with half the standard deviation
ALIGNED = 1e-6  # what USB adds to both sides of a ratio of shares


class Guesses(NamedTuple):
    """Moving averages that the rules and the alignment need."""

    pool: jax.Array  # f32[N], mean probabilities on the pool's images, before any alignment
    asked: jax.Array  # f32[N], the student's mean probabilities on the asked images
    confidence: jax.Array  # f32[], mean of the pool's largest probabilities, after it
    variance: jax.Array  # f32[], variance of those


class FixmatchState(NamedTuple):
    """State that FixMatch carries from step to step beside the parameters."""

    stats: PyTree  # running statistics of the network that is trained
    teacher: EmaState  # of an Encoder: the average of its parameters and of these statistics
    guesses: Guesses


def make(
    net: Network,
    head: Network,
    weak_view: View,
    strong_view: View,
    *,
    rule: str = "fixed",
    threshold: float = 0.7,
    align: str = "none",
    guess_temperature: float = 0.0,
    guess_decay: float = 0.999,
    weight: float = 10.0,
    decay: float = 0.999,
    target_temperature: float = 1.5,
    student_temperature: float = 1.0,
) -> Method:
    """Distillation on what was asked about, and FixMatch's consistency on what was not.

    One step: the teacher moves; it sees the pool's images in the weak view, as in an evaluation,
    and names a class for each. The asked images in the weak view and the pool's in the strong one
    go through the network in one batch, with batch statistics of all of them, as in both
    references. On the asked images the loss is that of `qmx.methods.distill`. On an image of the
    pool it is the cross-entropy with the teacher's guess, times how much the guess counts by
    `rule`. The mean over all of the pool's images, also those that count as 0, is added `weight`
    times.

    The rules, for a guess whose largest probability is c, of class k:
      "fixed": 1 where c >= `threshold`, else 0. FixMatch.
      "relative": the same with `threshold` times the student's mean confidence on the asked images
        of the batch. AdaMatch. A student of soft scores is less sure than one of labels; this
        follows it.
      "free": the same with the average confidence, times the average share of k over that of the
        most frequent class. FreeMatch, without its fairness term, whose weight is 0.001 on
        CIFAR-10. It starts at 1 / N, so that all count at first.
      "soft": exp(-(c - m)^2 / (2 s^2)) below m, 1 above; m is the average confidence and s half its
        standard deviation. SoftMatch. It starts at m = 1 / N and a variance of 1.
    The averages are over the steps, with `guess_decay`, the step's own images among them.

    Args:
      net: f32[B, S, S, C] -> f32[B, F].
      head: f32[B, F] -> f32[B, N] (`qmx.models.classifier`).
      weak_view, strong_view: of one side S; the weak one is called on the asked images and on the
        pool's, with keys of their own. The papers' strong view is RandAugment, on ImageNet.
      rule: how much a guess counts, see above.
      threshold: tau, on the teacher's softmax. EMAN's on ImageNet; FixMatch's on CIFAR-10 is 0.95,
        and so is AdaMatch's share. "free" and "soft" have none.
      align: "none" leaves the guesses. "uniform" and "asked" multiply each guess, class by class,
        by the wanted share over the average share, and bring it back to a sum of 1. The wanted
        shares are equal ("uniform", SoftMatch's), or the asked images' average ("asked",
        AdaMatch's). With the rule "soft" alignment is for the weights alone, as in its reference.
        USB's averages start from a first batch, these from 1/N.
      guess_temperature: 0 takes the guess's class, as all four papers do; with a threshold that
        replaces sharpening (FixMatch, section 2.2). Above 0 the guess stays soft, and its
        log-probabilities are divided by this value: 1 leaves them as they are, USB has 0.5.
      guess_decay: decay of the averages, USB's `ema_p`. 0.999 averages over a thousand steps:
        shorter runs need less.
      weight: lambda_u. EMAN's and FixMatch's on ImageNet; FixMatch's on CIFAR-10 is 1.
      decay: the teacher's share of itself. With 0.999 it averages over a thousand steps: shorter
        runs need less.
      target_temperature, student_temperature: see `qmx.methods.distill.make`.

    Returns:
      A `Method`. The batch carries "image" and "scores" of B asked images as distillation's does,
      and "pool_image", uint8[mu B, H, W, C]. Other arrays of the pool that the views read have the
      same prefix. mu is a whole number (5 in EMAN, 7 in FixMatch on CIFAR-10). `encoder` and
      `network` give the teacher, which both papers evaluate.
      Metrics: `agreement_top1` as distillation's; `confident`, the share of the pool's images that
      count, or the mean of what they count; `pool_agreement`, the share of them all on which the
      student, in the strong view, names the teacher's class; `pool_loss`, before `weight`.

    Raises:
      ValueError: an unknown rule or alignment; in `loss`, when the pool's images are no multiple of
        the asked.
    """
    for name, word, words in (("rule", rule, RULES), ("align", align, ALIGNMENTS)):
        if word not in words:
            raise ValueError(f"{name} {word!r} is unknown; choose one of {', '.join(words)}")
    network = chain(backbone=net, head=head)
    average = ema(decay)

    def init(rng: jax.Array, batch: Batch) -> tuple[PyTree, FixmatchState]:
        x = view_shape(weak_view, batch)
        params, stats = network.init(rng, x)
        scores = jax.eval_shape(lambda: network.apply(params, stats, x, False)[0])
        classes, dtype = scores.shape[-1], jnp.promote_types(scores.dtype, jnp.float32)
        equal = jnp.full(classes, 1 / classes, dtype)
        guesses = Guesses(equal, jnp.copy(equal), equal[0], jnp.ones((), dtype))
        return params, FixmatchState(stats, average.init(Encoder(params, stats)), guesses)

    def loss(
        params: PyTree, state: FixmatchState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple]:
        asked_key, weak_key, strong_key = jax.random.split(rng, 3)
        pool = {
            name.removeprefix("pool_"): rows
            for name, rows in batch.items()
            if name.startswith("pool_")
        }
        if "image" not in pool:
            raise ValueError(
                f"the batch has {', '.join(batch)}; it needs pool_image too, images of the pool"
            )
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
        guess = jax.lax.stop_gradient(guess)

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
        guess, counts, guesses = judged(state.guesses, guess, on_asked)
        classes = guess.argmax(-1)
        if guess_temperature:
            losses = soft_cross_entropy(guess, on_pool, guess_temperature)
        else:
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(wide(on_pool), classes)
        guessed = (losses * counts).mean()
        metrics = {
            "agreement_top1": (on_asked.argmax(-1) == batch["scores"].argmax(-1)).mean(),
            "confident": counts.mean(),
            "pool_agreement": (on_pool.argmax(-1) == classes).mean(),
            "pool_loss": guessed,
        }
        return known + weight * guessed, (FixmatchState(stats, averaged, guesses), metrics)

    def judged(
        old: Guesses, guess: jax.Array, on_asked: jax.Array
    ) -> tuple[jax.Array, jax.Array, Guesses]:
        """The guesses, aligned, as unnormalised log-probabilities; how much each counts; and the
        averages after them."""
        raw, asked = jax.nn.softmax(wide(guess)), jax.nn.softmax(wide(on_asked))
        asked = jax.lax.stop_gradient(asked)

        def moved(before: jax.Array, now: jax.Array) -> jax.Array:
            return guess_decay * before + (1 - guess_decay) * now

        shares, asked_shares = moved(old.pool, raw.mean(0)), moved(old.asked, asked.mean(0))
        aligned = guess
        if align != "none":
            wanted = asked_shares if align == "asked" else 1 / len(shares)
            aligned = wide(guess) + jnp.log((wanted + ALIGNED) / (shares + ALIGNED))
        sure = jax.nn.softmax(wide(aligned)).max(-1)
        confidence = moved(old.confidence, sure.mean())
        variance = moved(old.variance, sure.var(ddof=1))
        if rule == "soft":
            below = jnp.minimum(sure - confidence, 0)
            counts = jnp.exp(-(below**2) / (2 * variance / SIGMAS**2))
        else:
            least: jax.Array | float = threshold
            if rule == "relative":
                least = threshold * asked.max(-1).mean()
            if rule == "free":
                least = confidence * (shares / shares.max())[aligned.argmax(-1)]
            counts = sure >= least
        kept = guess if rule == "soft" else aligned
        return kept, counts, Guesses(shares, asked_shares, confidence, variance)

    def encoder(params: PyTree, state: FixmatchState) -> Encoder:
        teacher = state.teacher.average
        return Encoder(teacher.params["backbone"], teacher.stats["backbone"])

    def start(
        params: PyTree, state: FixmatchState, encoder: Encoder
    ) -> tuple[PyTree, FixmatchState]:
        params, stats = begin_from(params, state.stats, encoder)
        # The teacher starts as a copy, with the same fresh head.
        copy = jax.tree.map(jnp.copy, Encoder(params, stats))
        return params, state._replace(stats=stats, teacher=EmaState(copy))

    def kept(params: PyTree, state: FixmatchState) -> Encoder:
        return state.teacher.average  # of the last step

    return Method(init, loss, encoder, start, kept)
