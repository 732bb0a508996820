"""Networks by their names in a config: built once for each data set, and how they are evaluated."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qmx import models
from qmx.augment import plain_view
from qmx.contract import Batch, Encoder, Network, View, chain, variable_shapes
from qmx.data import Dataset
from qmx.targets.query import PRECISIONS


class Look(NamedTuple):
    """Facts of a data set that networks are told; hashable, so that compilations can be shared."""

    shape: tuple[int, int, int]  # H, W, C
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int  # N


def look(data: Dataset) -> Look:
    """The `Look` of a data set."""
    return Look(data.shape, data.mean, data.std, data.classes)


def evaluated_in(dtype: str) -> str:
    """The dtype in which a network is evaluated that was trained in `dtype`: at least float32."""
    return "float64" if dtype == "float64" else "float32"


@cache
def backbone(
    arch: str, dtype: str, seen: Look, features: str = "class", drop_path: float = 0.0
) -> Network:
    """A backbone as every stage but MoCo's and SimSiam's trains and runs it."""
    del seen  # one object for each data set, on which the compilations hang
    return models.backbone(arch, dtype=jnp.dtype(dtype), features=features, drop_path=drop_path)


@cache
def classifier(
    arch: str, dtype: str, seen: Look, standardize: bool = False, features: str = "class"
) -> Network:
    """f32[B, S, S, C] -> f32[B, N]: the target's network, and the student's."""
    head = models.classifier(seen.classes, standardize=standardize)
    return chain(backbone=backbone(arch, dtype, seen, features), head=head)


def for_inference(
    arch: str, precision: str, seen: Look, weights: Encoder, features: str = "class"
) -> tuple[Network, Encoder]:
    """A `classifier` and its weights with the batch norm, if any, folded into the convolutions."""
    dtype = jnp.dtype(PRECISIONS[precision][0])
    if arch in models.VITS:
        return classifier(arch, dtype.name, seen, features=features), weights
    network = chain(
        backbone=models.backbone(arch, dtype=dtype, folded=True),
        head=models.classifier(seen.classes),
    )
    params, stats = weights
    folded = models.fold(params["backbone"], stats["backbone"])
    return network, Encoder(
        {**params, "backbone": folded.params}, {**stats, "backbone": folded.stats}
    )


def shape_at(seen: Look, size: int = 0) -> tuple[int, int, int]:
    """Shape of the images that a network sees at a side of `size`; 0 is their own."""
    return (size, size, seen.shape[-1]) if size else seen.shape


@cache
def random_backbone(
    arch: str, dtype: str, seen: Look, size: int = 0
) -> Callable[[jax.Array], tuple]:
    """rng -> the variables of a backbone that was never trained, for images of side `size`."""
    image = jnp.zeros((2, *shape_at(seen, size)))
    return jax.jit(
        lambda rng: backbone(arch, dtype, seen).init(rng, image),
        compiler_options={"xla_backend_optimization_level": 0},
    )


@cache
def variables(network: Network, seen: Look, size: int = 0) -> Encoder:
    """`qmx.contract.variable_shapes` of a network, for reading weights; traced once."""
    return variable_shapes(network, shape_at(seen, size))


@cache
def shown_view(mean: tuple[float, ...], std: tuple[float, ...], size: int = 0) -> View:
    """The view of a network that somebody else trained, as `qmx.augment.plain_view`; grey images
    are shown to one of three channels in three equal ones."""
    plain = plain_view(mean, std, size)

    def view(rng: jax.Array, batch: Batch) -> jax.Array:
        images = batch["image"]
        if images.shape[-1] == 1 and len(mean) == 3:
            images = jnp.repeat(images, 3, -1)
        return plain(rng, {"image": images})

    return view


@cache
def evaluation_view(seen: Look, size: int = 0) -> View:
    """The view of a network that is evaluated or asked: the image, normalised, and resized to
    `size` if that is not 0."""
    return plain_view(seen.mean, seen.std, size)
