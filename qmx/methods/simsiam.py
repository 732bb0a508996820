"""SimSiam: two views of an image predict each other, with a stopped gradient and no negatives.

Chen & He 2021, *Exploring Simple Siamese Representation Learning*; `facebookresearch/simsiam`.
"""

from functools import partial

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
from qmx.losses import negative_cosine


def make(net: Network, projector: Network, predictor: Network, view: View) -> Method:
    """SimSiam on a backbone `net`.

    The views go through the network one after the other, each with batch statistics of its own.
    Take these over the whole batch (one group). The paper keeps the predictor's learning rate
    constant, and the rest follows a cosine: give the part "predictor" a rate of its own.

    Args:
      net: f32[B, S, S, C] -> f32[B, F], the last scale of each residual branch zero at first.
      projector: f32[B, F] -> f32[B, D] (`qmx.models.simsiam_projector`), the part "head".
      predictor: f32[B, D] -> f32[B, D] (`qmx.models.simsiam_predictor`).
      view: called twice on the batch, with keys of their own.

    Returns:
      A `Method`; its state is the running statistics. Loss in -1..0 (-1 also where it collapsed);
      metric `z_std`, the mean over D of the std of unit projections: near 1/sqrt(D), 0 where it
      collapsed.
    """
    encode = chain(backbone=net, head=projector)

    def init(rng: jax.Array, batch: Batch) -> tuple[PyTree, PyTree]:
        return chain(backbone=net, head=projector, predictor=predictor).init(
            rng, view_shape(view, batch)
        )

    def loss(
        params: PyTree, state: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple]:
        key1, key2 = jax.random.split(rng)
        stats, head_stats = {k: state[k] for k in ("backbone", "head")}, state["predictor"]
        z1, stats = encode.apply(params, stats, view(key1, batch), True, network_key(rng, 0))
        z2, stats = encode.apply(params, stats, view(key2, batch), True, network_key(rng, 1))
        predict = partial(predictor.apply, params["predictor"])
        p1, head_stats = predict(head_stats, z1, True, network_key(rng, 2))
        p2, head_stats = predict(head_stats, z2, True, network_key(rng, 3))

        stop = jax.lax.stop_gradient
        losses = (negative_cosine(p1, stop(z2)) + negative_cosine(p2, stop(z1))) / 2
        # Guarded as the loss is: rows that are all zeros are the collapse that this shows.
        unit = z1 / jnp.maximum(jnp.linalg.norm(z1, axis=-1, keepdims=True), 1e-12)
        metrics = {"z_std": stop(unit).std(0).mean()}
        return losses.mean(), ({**stats, "predictor": head_stats}, metrics)

    def encoder(params: PyTree, state: PyTree) -> Encoder:
        return Encoder(params["backbone"], state["backbone"])

    return Method(init, loss, encoder, start=begin_from, network=Encoder)
