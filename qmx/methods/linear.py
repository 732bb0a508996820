"""The linear probe: a classifier on features that do not move.

He et al. 2020 (MoCo), section 4.1, `main_lincls.py`; SimSiam's has the same form and LARS as its
optimiser.
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
    check_shapes,
    network_key,
    view_shape,
)
from qmx.losses import soft_cross_entropy


def make(net: Network, head: Network, view: View) -> Method:
    """Cross-entropy of a linear head on a frozen backbone, which runs as in an evaluation.

    Args:
      net: f32[B, S, S, C] -> f32[B, F].
      head: f32[B, F] -> f32[B, N]; `qmx.models.classifier(N, kernel_std=0.01)`, as the reference's.
      view: called once on the batch.

    Returns:
      A `Method` whose params are the head's alone; the backbone's variables are in its state, where
      no gradient, no decay and no batch statistics reach them. `init` makes random ones; `start`
      puts an encoder's in their place. The batch carries "scores" as `qmx.methods.distill`'s
      does. Metric `online_top1`: the share of the batch that is classified rightly.
    """

    def init(rng: jax.Array, batch: Batch) -> tuple[PyTree, PyTree]:
        net_key, head_key = jax.random.split(rng)
        x = view_shape(view, batch)
        backbone = Encoder(*net.init(net_key, x))
        features = jax.eval_shape(lambda: net.apply(backbone.params, backbone.stats, x, False)[0])
        params, stats = head.init(head_key, jnp.zeros(features.shape, features.dtype))
        return {"head": params}, {"head": stats, "backbone": backbone}

    def loss(
        params: PyTree, state: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple]:
        features, _ = net.apply(
            state["backbone"].params, state["backbone"].stats, view(rng, batch), False
        )
        logits, stats = head.apply(params["head"], state["head"], features, True, network_key(rng))
        losses = soft_cross_entropy(batch["scores"], logits)
        right = logits.argmax(-1) == batch["scores"].argmax(-1)
        return losses.mean(), ({**state, "head": stats}, {"online_top1": jnp.mean(right)})

    def start(params: PyTree, state: PyTree, encoder: Encoder) -> tuple[PyTree, PyTree]:
        frozen = state["backbone"]
        check_shapes(encoder, frozen, "the encoder")
        copy = jax.tree.map(lambda x, like: jnp.array(x, like.dtype), encoder, frozen)
        return params, {**state, "backbone": copy}

    def network(params: PyTree, state: PyTree) -> Encoder:
        frozen = state["backbone"]
        return Encoder(
            {"backbone": frozen.params, "head": params["head"]},
            {"backbone": frozen.stats, "head": state["head"]},
        )

    return Method(init, loss, lambda params, state: state["backbone"], start, network)
