"""FastSiam: SimSiam with more views of an image, each of which predicts the mean of the others.

Pototzky, Sultan & Schmidt-Thieme 2022, *FastSiam: Resource-Efficient Self-Supervised Learning on a
Single GPU*; `lightly-ai/lightly`, whose benchmarks have it beside SimSiam.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qmx.contract import Batch, Method, Network, PyTree, View, chain, network_key
from qmx.losses import negative_cosine
from qmx.methods import simsiam


def make(
    net: Network, projector: Network, predictor: Network, view: View, *, views: int = 4
) -> Method:
    """SimSiam's method on a backbone `net`, with a steadier target.

    The target of each view is the mean of the other views' projections, with a stopped gradient.
    The loss is the mean over the views. The views go through the network one after the other, each
    with batch statistics of its own. The activations of all are kept, `views` times the memory of
    one pass. Two views are SimSiam, to the bit.

    Args:
      net, projector, predictor: see `qmx.methods.simsiam.make`.
      view: called `views` times on the batch, with keys of their own.
      views: number for each image in one step, 2 or more. The paper has 4: one, and its K = 3
        targets.

    Returns:
      A `Method`; its state is the running statistics. Loss and `z_std` as SimSiam's, `z_std` of the
      first view.

    Raises:
      ValueError: fewer than two views.
    """
    if views < 2:
        raise ValueError(f"views {views} leaves nothing to predict; use 2 or more")
    encode = chain(backbone=net, head=projector)

    def loss(
        params: PyTree, state: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple]:
        stats, head_stats = {k: state[k] for k in ("backbone", "head")}, state["predictor"]
        zs, ps = [], []
        for place, key in enumerate(jax.random.split(rng, views)):
            z, stats = encode.apply(params, stats, view(key, batch), True, network_key(rng, place))
            zs.append(z)
        predict = partial(predictor.apply, params["predictor"])
        for place, z in enumerate(zs):
            p, head_stats = predict(head_stats, z, True, network_key(rng, views + place))
            ps.append(p)

        others = jax.lax.stop_gradient(zs)
        targets = [_mean(others[:place] + others[place + 1 :]) for place in range(views)]
        losses = _mean([negative_cosine(p, target) for p, target in zip(ps, targets, strict=True)])
        unit = others[0] / jnp.maximum(jnp.linalg.norm(others[0], axis=-1, keepdims=True), 1e-12)
        metrics = {"z_std": unit.std(0).mean()}
        return losses.mean(), ({**stats, "predictor": head_stats}, metrics)

    # All else is SimSiam's: the same parts, the same backbone that is handed on.
    return simsiam.make(net, projector, predictor, view)._replace(loss=loss)


def _mean(arrays: list[jax.Array]) -> jax.Array:
    return sum(arrays[1:], arrays[0]) / len(arrays)
