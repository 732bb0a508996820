"""EMP-SSL: many crops of an image agree, and the images spread over all directions there are.

Tong, Chen, Ma & LeCun 2023, *EMP-SSL: Towards Self-Supervised Learning in One Training Epoch*;
`tsb0601/EMP-SSL`. The constants are those of its `main.py` and `model/model.py`.
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
    wide,
)
from qmx.losses import negative_cosine


def make(
    net: Network,
    projector: Network,
    view: View,
    *,
    views: int = 20,
    similarity: float = 200.0,
    distortion: float = 0.2,
) -> Method:
    """EMP-SSL on a backbone `net`, with `views` crops of each image in one step.

    All crops go through the network as one batch, with batch statistics of all of them, as in the
    reference on one GPU. Unit projections of a crop should lie near the mean of their image's
    crops; those of the images should fill the space. A step holds the activations of B x `views`
    crops; if memory is short, take fewer images. The reference's linear probes see the mean of 128
    crops behind the projector's first layer. Here the next stage starts from the backbone and sees
    whole images.

    Args:
      net: f32[B, S, S, C] -> f32[B, F].
      projector: f32[B, F] -> f32[B, D] (`qmx.models.emp_ssl_projector`), the part "head".
      view: called once, on a batch in which each image stands `views` times. The paper's cuts a
        quarter of the area.
      views: n, crops of each image, 2 or more. The README's 20 for one epoch; 200 gain 1 to 2
        points there.
      similarity: lambda, the weight of the mean cosine.
      distortion: eps^2 of the total coding rate.

    Returns:
      A `Method`; its state is the running statistics. Loss: minus `coding_rate`, minus `similarity`
      times the metric of that name. Metrics: `similarity`, the mean cosine of crops to their
      image's mean; `coding_rate`, see `total_coding_rate`, the mean over the crops' places; and
      `z_std`, the mean over D of the std of unit projections, near 1/sqrt(D), 0 where it collapsed.

    Raises:
      ValueError: fewer than two views.
    """
    if views < 2:
        raise ValueError(f"views {views} leaves nothing to agree with; use 2 or more")
    network = chain(backbone=net, head=projector)

    def init(rng: jax.Array, batch: Batch) -> tuple[PyTree, PyTree]:
        return network.init(rng, view_shape(view, batch))

    def loss(
        params: PyTree, state: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple]:
        # Each image's crops follow one another, so that none has to change its device.
        images = {name: jnp.repeat(rows, views, axis=0) for name, rows in batch.items()}
        z, state = network.apply(params, state, view(rng, images), True, network_key(rng))
        z = wide(z)
        # The reference's `normalize` guards with the same epsilon.
        z = z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, -1, keepdims=True), 1e-24))
        z = z.reshape(-1, views, z.shape[-1])

        agree = -negative_cosine(z, z.mean(1, keepdims=True)).mean()
        # The first crops of all images, the second ones, ...
        rate = jax.vmap(total_coding_rate, (1, None))(z, distortion).mean()
        spread = jax.lax.stop_gradient(z[:, 0]).std(0).mean()
        metrics = {"similarity": agree, "coding_rate": rate, "z_std": spread}
        return -rate - similarity * agree, (state, metrics)

    def encoder(params: PyTree, state: PyTree) -> Encoder:
        return Encoder(params["backbone"], state["backbone"])

    return Method(init, loss, encoder, start=begin_from, network=Encoder)


def total_coding_rate(z: jax.Array, distortion: float) -> jax.Array:
    """R(Z) = 1/2 log det(I + D / (B eps^2) Z^T Z), in nats; f32[] of f32[B, D].

    Number of nats that tell the rows apart up to eps. It is large if they point everywhere.
    Source: Yu et al. 2020, *Learning Diverse and Discriminative Representations via the Principle
    of Maximal Coding Rate Reduction*; Tong et al. 2023.

    Args:
      distortion: eps^2 > 0, of rows of unit length.
    """
    z = wide(z)
    count, features = z.shape
    if count < features:  # the determinant is the same, and the matrix smaller
        z = z.T
    gram = jnp.matmul(z.T, z, precision="highest")  # not TF32: it is multiplied by D / (B eps^2)
    matrix = jnp.eye(len(gram), dtype=z.dtype) + features / (count * distortion) * gram
    # Half the logarithm of the determinant: that of its triangular root.
    return jnp.log(jnp.diagonal(jnp.linalg.cholesky(matrix))).sum()
