"""qmx: how few queries does it take to copy an image classifier?

The pieces, each usable alone: the training methods under one contract, the step and loop they run
in, the augmentations, the ledger, the ways to choose what to ask, the metrics. README.md shows them
on one screen. The names of `__all__` and their arguments stay as they are until CHANGELOG.md says
otherwise.

Letters of the shapes, everywhere: B batch (global), H W C image (NHWC), S side of a view,
F features, D embedding, K queue, N classes, G groups of batch statistics, n examples.
"""

__version__ = "0.2.0"

from qmx import augment, losses, models, optim, selection
from qmx.checkpoint import load_encoder
from qmx.contract import Batch, Encoder, Method, Network, View, chain
from qmx.inference import predict
from qmx.ledger import BudgetSpent, Ledger, Unavailable
from qmx.methods import distill, fixmatch, linear, moco, rotation, simsiam
from qmx.metrics import compare, knn
from qmx.models import from_linen
from qmx.selection.propagate import propagate
from qmx.sharding import put_batch, put_state
from qmx.targets.query import network_query
from qmx.train import TrainState, fit, init_state, make_step

__all__ = [
    "Batch",
    "BudgetSpent",
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
    "fit",
    "fixmatch",
    "from_linen",
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
    "selection",
    "simsiam",
]
