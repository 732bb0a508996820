"""Distillation: the student learns the scores that the target gave. Supervised training too.

Hinton et al. 2015; Jagielski et al. 2020, whose temperature acts on the target alone.
"""

import jax
import jax.numpy as jnp

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
)
from qmx.losses import kl_target_student


def make(
    net: Network,
    head: Network,
    view: View,
    *,
    target_temperature: float = 1.5,
    student_temperature: float = 1.0,
) -> Method:
    """KL from the target's scores to the student's, see `qmx.losses.kl_target_student`.

    Args:
      net: f32[B, S, S, C] -> f32[B, F].
      head: f32[B, F] -> f32[B, N] (`qmx.models.classifier`).
      view: called once on the batch; the scores stay those of the image as it was asked.
      target_temperature, student_temperature: the predecessor's are 1.5 and 1; Hinton's are equal.

    Returns:
      A `Method`; its state is the running statistics. The batch carries "scores", f32[B, N]:
      unnormalised log-probabilities (`qmx.ledger.access.as_logits`); the logarithm of a one-hot
      row is a true label, so supervised training is this method too. Metric `agreement_top1`,
      the share of the batch on which student and scores name the same class.
    """
    network = chain(backbone=net, head=head)

    def init(rng: jax.Array, batch: Batch) -> tuple[PyTree, PyTree]:
        return network.init(rng, view_shape(view, batch))

    def loss(
        params: PyTree, state: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple]:
        logits, state = network.apply(params, state, view(rng, batch), True, network_key(rng))
        losses = kl_target_student(batch["scores"], logits, target_temperature, student_temperature)
        agree = logits.argmax(-1) == batch["scores"].argmax(-1)
        return losses.mean(), (state, {"agreement_top1": jnp.mean(agree)})

    def encoder(params: PyTree, state: PyTree) -> Encoder:
        return Encoder(params["backbone"], state["backbone"])

    return Method(init, loss, encoder, start=begin_from, network=Encoder)
