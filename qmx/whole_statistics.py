"""Running statistics of a network's batch norms, measured anew on whole images.

A network that trains on crops has the statistics of crops. On whole images, which are often shown
at another scale than crops are, its activations have others. They need images alone: no label, no
query. Wu & Johnson 2021, *Rethinking "Batch" in BatchNorm*, sections 3 and 5.1; Touvron et al.
2019, *Fixing the train-test resolution discrepancy*, section 4.
"""

from functools import cache

import jax
import numpy as np

from qmx.contract import Encoder, Network, View
from qmx.data import Source
from qmx.data.batches import ahead, batch_ids
from qmx.sharding import enlarged, everywhere, put_batch, rows_here

# Of what a training left, 0.9^50 is half a per cent; the last ten batches count most. Ours.
BATCH, BATCHES = 256, 50


@cache
def _seen(network: Network, view: View):  # one compilation for each network and view
    return jax.jit(
        lambda params, stats, batch: network.apply(
            params, stats, view(jax.random.key(0), batch), True
        )[1],
        out_shardings=everywhere(),
    )


def measured(network: Network, variables: Encoder, view: View, source: Source) -> Encoder:
    """The same network with running statistics of random whole images of a source.

    50 batches of 256 images, more where a batch does not divide over the devices, move the
    statistics as in training. A network without batch norms stays as it is.

    Args:
      network: f32[B, S, S, C] -> f32[B, N]; it draws nothing (no dropout).
      variables: its parameters and running statistics.
      view: of an evaluation.
      source: of uint8[b, H, W, C] by `shown`; a source smaller than a batch is repeated.
    """
    params, stats = variables
    if not jax.tree.leaves(stats):
        return variables
    size = enlarged(BATCH)
    ids = [batch_ids(source.size, size, 0, k, False)[rows_here(size)] for k in range(BATCHES)]
    for _, images in ahead(source.shown, np.concatenate(ids), len(ids[0])):
        stats = _seen(network, view)(params, stats, put_batch({"image": images}))
    return Encoder(params, stats)
