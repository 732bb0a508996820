"""Networks as pairs of pure functions. The only folder that knows flax."""

from collections import ChainMap
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qmx.contract import Network, PyTree
from qmx.models.foreign import from_equinox, from_nnx
from qmx.models.heads import (
    Classifier,
    EmpSslProjector,
    MocoHead,
    SimsiamPredictor,
    SimsiamProjector,
)
from qmx.models.norm import fold
from qmx.models.resnet import ARCHS, ResNet
from qmx.models.vit import VITS, ViT

__all__ = [
    "ARCHS",
    "NETWORKS",
    "VITS",
    "backbone",
    "classifier",
    "emp_ssl_projector",
    "fold",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "moco_head",
    "simsiam_predictor",
    "simsiam_projector",
]


# Of all names that `backbone` knows, the ResNets first, and of those that are added later.
NETWORKS: ChainMap[str, Any] = ChainMap(VITS, ARCHS)


def from_linen(module: nn.Module) -> Network:
    """A `Network` around a linen module.

    Args:
      module: called as `module(x, train)`; it may keep "batch_stats", and draw from "dropout".

    Raises:
      ValueError: at `init`, a module that keeps anything else.
    """

    def init(rng: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        variables = module.init({"params": rng, "dropout": jax.random.fold_in(rng, 1)}, x, True)
        if others := sorted(set(variables) - {"params", "batch_stats"}):
            raise ValueError(
                f"the module keeps {others[0]!r}; only params and batch_stats are kept"
            )
        return variables.get("params", {}), variables.get("batch_stats", {})

    def apply(
        params: PyTree, stats: PyTree, x: jax.Array, train: bool, rng: jax.Array | None = None
    ) -> tuple[jax.Array, PyTree]:
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return module.apply(variables, x, False), stats  # type: ignore[return-value]
        rngs = None if rng is None else {"dropout": rng}
        y, new = module.apply(variables, x, True, mutable=["batch_stats"], rngs=rngs)
        return y, new.get("batch_stats", stats)

    return Network(init, apply)


def backbone(
    arch: str,
    *,
    stats_groups: int = 1,
    zero_init: bool = False,
    dtype: Any = jnp.float32,
    folded: bool = False,
    features: str = "class",
    drop_path: float = 0.0,
) -> Network:
    """A network by name up to its features: a ResNet or ResNeXt, see `qmx.models.resnet.ResNet`; or
    a ViT, see `qmx.models.vit.ViT`, for which `dtype`, `features` and `drop_path` alone count.

    Raises:
      ValueError: an unknown name, with the known ones; a ResNet with `drop_path`.
    """
    if arch in VITS:
        return from_linen(ViT(VITS[arch], features, dtype, drop_path))
    if arch not in ARCHS:
        raise ValueError(f"network {arch!r} is unknown; choose one of {', '.join(NETWORKS)}")
    if drop_path:
        raise ValueError(f"drop_path {drop_path} is of vision transformers; set it to 0 for {arch}")
    return from_linen(ResNet(ARCHS[arch], stats_groups, zero_init, dtype, folded))


def classifier(
    classes: int, *, standardize: bool = False, kernel_std: float | None = None
) -> Network:
    """A linear layer to `classes` scores, or MoCo v1's head; see `qmx.models.heads.Classifier`."""
    return from_linen(Classifier(classes, standardize, kernel_std))


def moco_head(features: int = 128, hidden: int | None = None) -> Network:
    """MoCo v2's two-layer head; see `qmx.models.heads.MocoHead`."""
    return from_linen(MocoHead(features, hidden))


def emp_ssl_projector(features: int = 1024, hidden: int = 4096, stats_groups: int = 1) -> Network:
    """EMP-SSL's projector; see `qmx.models.heads.EmpSslProjector`."""
    return from_linen(EmpSslProjector(features, hidden, stats_groups))


def simsiam_projector(features: int = 2048, layers: int = 3, stats_groups: int = 1) -> Network:
    """SimSiam's projector; see `qmx.models.heads.SimsiamProjector`."""
    return from_linen(SimsiamProjector(features, layers, stats_groups))


def simsiam_predictor(hidden: int = 512, stats_groups: int = 1) -> Network:
    """SimSiam's predictor; see `qmx.models.heads.SimsiamPredictor`."""
    return from_linen(SimsiamPredictor(hidden, stats_groups))
