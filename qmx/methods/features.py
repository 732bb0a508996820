"""Feature distillation: a network learns the features that another one has of the same images.

Navaneet, Koohpayegani, Tejankar & Pirsiavash 2021, *Regression as a Simple Yet Effective Tool for
Self-supervised Knowledge Distillation* (SimReg); `UCDvision/simreg`, whose forms with cached
features (`--use_cache`) and with a linear predictor (`--linear_pred`) this is.
"""

from collections.abc import Callable

import jax

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


def make(net: Network, predictor: Callable[[int], Network], view: View) -> Method:
    """Regression of unit features: |p/|p| - f/|f||^2 = 2 - 2 cos(p, f), the mean over the batch.

    No query and no label is needed: the features are those of an encoder that everybody has. They
    are of the whole image, computed once; the network sees a view of it. A crop that leaves out
    what the features tell is asked for the impossible, so a mild view suits. A teacher that sees
    the same crop teaches more in long trainings, at the price of a pass of it in each step (Beyer
    et al. 2022, *Knowledge distillation: A good teacher is patient and consistent*).

    Args:
      net: f32[B, S, S, C] -> f32[B, F].
      predictor: D -> a network f32[B, F] -> f32[B, D], the part "head"; in the reference a batch
        norm and a linear layer, `partial(qmx.models.classifier, standardize=True)`, or four layers.
      view: called once on the batch; crop and flip in the reference's script.

    Returns:
      A `Method`; its state is the running statistics. The batch carries "features", f32[B, D],
      not all zeros in a row; best about their mean over the pool, since a mean that all images
      share makes all cosines alike. Metric `similarity`, the mean cosine.
    """

    def network(batch: Batch) -> Network:
        return chain(backbone=net, head=predictor(batch["features"].shape[-1]))

    def init(rng: jax.Array, batch: Batch) -> tuple[PyTree, PyTree]:
        return network(batch).init(rng, view_shape(view, batch))

    def loss(
        params: PyTree, state: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple]:
        x = view(rng, batch)
        p, state = network(batch).apply(params, state, x, True, network_key(rng))
        similarity = -negative_cosine(p, batch["features"]).mean()
        return 2 - 2 * similarity, (state, {"similarity": similarity})

    def encoder(params: PyTree, state: PyTree) -> Encoder:
        return Encoder(params["backbone"], state["backbone"])

    return Method(init, loss, encoder, start=begin_from, network=Encoder)
