"""Rotation prediction: tell by how many quarter turns an image was turned.

Gidaris et al. 2018, *Unsupervised Representation Learning by Predicting Image Rotations*.
"""

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


def rotations(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each square image turned by 0, 90, 180 and 270 degrees counter-clockwise.

    f32[B, S, S, C] -> (f32[4B, S, S, C], i32[4B]): the B images unturned, then the B images
    turned once, and so on, with the number of quarter turns.
    """
    turned = jnp.concatenate([jnp.rot90(x, turns, (1, 2)) for turns in range(4)])
    return turned, jnp.repeat(jnp.arange(4), len(x))


def make(net: Network, head: Network, view: View) -> Method:
    """Rotation prediction on a backbone `net`; every image enters with all four rotations.

    Args:
      net: f32[4B, S, S, C] -> f32[4B, F].
      head: f32[4B, F] -> f32[4B, 4] (`qmx.models.classifier(4)`).
      view: called once on the batch; crop and flip in the paper.

    Returns:
      A `Method`; its state is the running statistics. Metric `rotation_acc1`, chance is 1/4.
    """
    network = chain(backbone=net, head=head)

    def init(rng: jax.Array, batch: Batch) -> tuple[PyTree, PyTree]:
        return network.init(rng, rotations(view_shape(view, batch))[0])

    def loss(
        params: PyTree, state: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple]:
        x, turns = rotations(view(rng, batch))
        logits, state = network.apply(params, state, x, True, network_key(rng))
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(wide(logits), turns)
        return losses.mean(), (state, {"rotation_acc1": (logits.argmax(-1) == turns).mean()})

    def encoder(params: PyTree, state: PyTree) -> Encoder:
        return Encoder(params["backbone"], state["backbone"])

    return Method(init, loss, encoder, start=begin_from, network=Encoder)
