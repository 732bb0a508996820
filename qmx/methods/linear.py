"""The linear probe: a classifier on features that do not move.

He et al. 2020 (MoCo), section 4.1, `main_lincls.py`; SimSiam's has the same form and LARS as its
optimiser.
"""

import jax
import jax.numpy as jnp

from qmx.contract import Batch, Encoder, Method, Network, PyTree, View, check_shapes, view_shape
from qmx.losses import soft_cross_entropy


def make(net: Network, head: Network, view: View) -> Method:
    """Cross-entropy of a linear head on a frozen backbone, which runs as in an evaluation.

    Args:
      net: f32[B, S, S, C] -> f32[B, F].
      head: f32[B, F] -> f32[B, N]; `qmx.models.classifier(N, kernel_std=0.01)`, as the reference's.
      view: called once on the batch.

    Returns:
      A `Method` whose params are the head's alone; the backbone's variables are in its state, where
      no gradient, no decay and no batch statistics reach them. `init` makes them at random: put
      the encoder's there with `start_from`. The batch carries "scores" as `qmx.methods.distill`'s
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
        logits, stats = head.apply(params["head"], state["head"], features, True)
        losses = soft_cross_entropy(batch["scores"], logits)
        right = logits.argmax(-1) == batch["scores"].argmax(-1)
        return losses.mean(), ({**state, "head": stats}, {"online_top1": jnp.mean(right)})

    return Method(init, loss, lambda params, state: state["backbone"])


def start_from(state: PyTree, encoder: Encoder) -> PyTree:
    """The probe's state on the features of `encoder`.

    Raises:
      ValueError: a variable is missing, left over, or of another shape; all of them are listed.
    """
    check_shapes(encoder, state["backbone"], "the encoder")
    copy = jax.tree.map(lambda x, like: jnp.array(x, like.dtype), encoder, state["backbone"])
    return {**state, "backbone": copy}
