"""qmx: how few queries does it take to copy an image classifier?

The pieces, each usable alone: the training methods under one contract, the step and loop they run
in, the augmentations, the ledger, the metrics. README.md shows them on one screen.

Letters of the shapes, everywhere: B batch (global), H W C image (NHWC), S side of a view,
F features, D embedding, K queue, N classes, G groups of batch statistics, n examples.
"""

__version__ = "0.2.0"

from qmx import augment, losses, models, optim
from qmx.contract import Encoder, Method, Network, chain
from qmx.inference import predict
from qmx.ledger import BudgetSpent, Ledger
from qmx.methods import distill, fixmatch, moco, rotation, simsiam
from qmx.metrics import compare, knn
from qmx.targets.query import network_query
from qmx.train import TrainState, fit, init_state, make_step

__all__ = [
    "BudgetSpent",
    "Encoder",
    "Ledger",
    "Method",
    "Network",
    "TrainState",
    "augment",
    "chain",
    "compare",
    "distill",
    "fit",
    "fixmatch",
    "init_state",
    "knn",
    "losses",
    "make_step",
    "moco",
    "models",
    "network_query",
    "optim",
    "predict",
    "rotation",
    "simsiam",
]
