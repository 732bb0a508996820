"""MoCo v2: a query encoder learns to tell its image's key from a queue of other images' keys.

He et al. 2020, *Momentum Contrast for Unsupervised Visual Representation Learning*; Chen et al.
2020, *Improved Baselines with Momentum Contrastive Learning*; `facebookresearch/moco`.
"""

from typing import NamedTuple

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
    wide,
)
from qmx.losses import info_nce
from qmx.optim import EmaState, ema


class MocoState(NamedTuple):
    """State that MoCo carries from step to step beside the query encoder's parameters."""

    stats: PyTree  # running statistics of the query encoder
    key: EmaState  # the momentum encoder's parameters
    key_stats: PyTree  # its own running statistics; not averaged, its batch norm trains
    queue: jax.Array  # f32[K, D], unit rows
    pointer: jax.Array  # i32[], the row that the next batch of keys starts at


def make(
    net: Network,
    head: Network,
    view: View,
    *,
    queue_size: int = 65536,
    temperature: float = 0.2,
    decay: float = 0.999,
) -> Method:
    """MoCo v2 on a backbone `net` with a projection `head` (`qmx.models.moco_head`).

    One step follows the reference's order. It makes the queries, moves the momentum encoder (its
    parameters only), makes the keys of the second view, compares the queries with their keys and
    with the queue as it was, and replaces the queue's oldest keys. The optimiser follows, outside.

    The keys are made in shuffled order, so that their groups of batch statistics differ from the
    queries' ("ShuffleBN", over the groups that the network's batch norm takes). With one group the
    batch norm leaks which key belongs to which query: give `net` groups of 32 images.

    Args:
      net: f32[B, S, S, C] -> f32[B, F].
      head: f32[B, F] -> f32[B, D].
      view: called twice on the batch, with keys of their own.
      queue_size: K, a multiple of the batch; all batches are of one size. A queue larger than the
        data set has false negatives.
      temperature: T of the loss.
      decay: m, the momentum encoder's share of itself.

    Returns:
      A `Method`. Its metrics are of instances and not of classes: `contrast_acc1` and
      `contrast_acc5` (share of queries whose key ranks first, among the first five), and `z_std`
      (mean over D of the std of unit queries; near 1/sqrt(D), 0 where it collapsed).

    Raises:
      ValueError: when K is not a multiple of the batch.
    """
    encode = chain(backbone=net, head=head)
    average = ema(decay)

    def init(rng: jax.Array, batch: Batch) -> tuple[PyTree, MocoState]:
        x = view_shape(view, batch)
        refuse_batch(queue_size, len(x))
        net_key, queue_key = jax.random.split(rng)
        params, stats = encode.init(net_key, x)
        features = jax.eval_shape(lambda: encode.apply(params, stats, x, False)[0])
        rows = jax.random.normal(queue_key, (queue_size, features.shape[-1]), jnp.float32)
        queue = _unit(rows.astype(jnp.promote_types(features.dtype, jnp.float32)))
        copy = jax.tree.map(jnp.copy, stats)
        return params, MocoState(stats, average.init(params), copy, queue, jnp.int32(0))

    def loss(
        params: PyTree, state: MocoState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple]:
        query_key, key_key, shuffle_key = jax.random.split(rng, 3)
        q, stats = encode.apply(params, state.stats, view(query_key, batch), True, network_key(rng))
        q = _unit(q)

        key_params, key_state = average.update(jax.lax.stop_gradient(params), state.key)
        shuffle = jax.random.permutation(shuffle_key, len(q))
        x_key = view(key_key, batch)[shuffle]
        k, key_stats = encode.apply(key_params, state.key_stats, x_key, True, network_key(rng, 1))
        k = jax.lax.stop_gradient(_unit(k)[jnp.argsort(shuffle)])
        refuse_batch(queue_size, len(k))  # as of a last batch that is smaller

        losses, logits = info_nce(q, k, state.queue, temperature)
        queue = jax.lax.dynamic_update_slice_in_dim(state.queue, k, state.pointer, 0)
        pointer = (state.pointer + len(k)) % queue_size
        rank = (logits[:, 1:] > logits[:, :1]).sum(1)
        metrics = {
            "contrast_acc1": (rank < 1).mean(),
            "contrast_acc5": (rank < 5).mean(),
            "z_std": q.std(0).mean(),
        }
        return losses.mean(), (MocoState(stats, key_state, key_stats, queue, pointer), metrics)

    def encoder(params: PyTree, state: MocoState) -> Encoder:
        return Encoder(params["backbone"], state.stats["backbone"])

    def start(params: PyTree, state: MocoState, encoder: Encoder) -> tuple[PyTree, MocoState]:
        params, stats = begin_from(params, state.stats, encoder)
        copy = jax.tree.map(jnp.copy, stats)  # the momentum encoder starts as a copy, as in `init`
        return params, state._replace(stats=stats, key=average.init(params), key_stats=copy)

    def network(params: PyTree, state: MocoState) -> Encoder:
        return Encoder(params, state.stats)

    return Method(init, loss, encoder, start, network)


def refuse_batch(queue_size: int, size: int) -> None:
    """Raise ValueError if a queue is no multiple of a batch."""
    if queue_size % size:
        raise ValueError(
            f"queue_size {queue_size} is not a multiple of batch_size {size}; "
            f"{max(queue_size // size, 1) * size} is"
        )


def _unit(x: jax.Array) -> jax.Array:
    """Rows of unit length; torch's `normalize` guards with the same epsilon."""
    x = wide(x)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
