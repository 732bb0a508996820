"""qmx: how few queries does it take to copy an image classifier?

The pieces, each usable alone: the training methods under one contract, the step and loop they run
in, the augmentations, the ledger, the ways to choose what to ask, the metrics. docs/functional.md
shows them at work. The names of `__all__` and their arguments stay as they are until CHANGELOG.md
says otherwise.

Letters of the shapes, everywhere: B batch (global), H W C image (NHWC), S side of a view,
F features, D embedding, K queue, N classes, G groups of batch statistics, n examples.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qmx.version import __version__ as __version__

if TYPE_CHECKING:
    from qmx import augment, losses, models, optim, selection
    from qmx.checkpoint import Checkpoints
    from qmx.contract import Batch, Encoder, Method, Network, View, chain
    from qmx.encoders import encode, load_encoder, save_encoder
    from qmx.inference import predict
    from qmx.ledger import BudgetSpent, Ledger, Unavailable
    from qmx.methods import (
        distill,
        emp_ssl,
        fastsiam,
        features,
        fixmatch,
        linear,
        moco,
        rotation,
        simsiam,
    )
    from qmx.metrics import compare, knn
    from qmx.models import from_equinox, from_linen, from_nnx
    from qmx.selection.propagate import propagate
    from qmx.sharding import put_batch, put_state
    from qmx.targets.query import network_query
    from qmx.train import TrainState, fit, init_state, make_step

MODULES = {
    **{name: f"qmx.{name}" for name in ("augment", "losses", "models", "optim", "selection")},
    **{
        name: f"qmx.methods.{name}"
        for name in (
            "distill",
            "emp_ssl",
            "fastsiam",
            "features",
            "fixmatch",
            "linear",
            "moco",
            "rotation",
            "simsiam",
        )
    },
}
# The module of each other name.
PLACES = {
    **dict.fromkeys(("encode", "load_encoder", "save_encoder"), "qmx.encoders"),
    **dict.fromkeys(("Batch", "Encoder", "Method", "Network", "View", "chain"), "qmx.contract"),
    "Checkpoints": "qmx.checkpoint",
    "predict": "qmx.inference",
    **dict.fromkeys(("BudgetSpent", "Ledger", "Unavailable"), "qmx.ledger"),
    **dict.fromkeys(("compare", "knn"), "qmx.metrics"),
    **dict.fromkeys(("from_equinox", "from_linen", "from_nnx"), "qmx.models"),
    "propagate": "qmx.selection.propagate",
    **dict.fromkeys(("put_batch", "put_state"), "qmx.sharding"),
    "network_query": "qmx.targets.query",
    **dict.fromkeys(("TrainState", "fit", "init_state", "make_step"), "qmx.train"),
}

__all__ = [
    "Batch",
    "BudgetSpent",
    "Checkpoints",
    "Encoder",
    "Ledger",
    "Method",
    "Network",
    "TrainState",
    "Unavailable",
    "View",
    "augment",
    "chain",
    "compare",
    "distill",
    "emp_ssl",
    "encode",
    "fastsiam",
    "features",
    "fit",
    "fixmatch",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "init_state",
    "knn",
    "linear",
    "load_encoder",
    "losses",
    "make_step",
    "moco",
    "models",
    "network_query",
    "optim",
    "predict",
    "propagate",
    "put_batch",
    "put_state",
    "rotation",
    "save_encoder",
    "selection",
    "simsiam",
]


def __getattr__(name: str) -> Any:
    """A public name, imported at its first use: jax and flax take a second, in which the command
    can already be stopped."""
    if name in MODULES:
        return importlib.import_module(MODULES[name])
    if name in PLACES:
        return getattr(importlib.import_module(PLACES[name]), name)
    raise AttributeError(f"module 'qmx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
