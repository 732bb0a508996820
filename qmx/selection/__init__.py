"""Choice of the images to ask about, and propagation of their answers to the others."""

from qmx.selection.by_answers import entropy, margin
from qmx.selection.by_features import balanced, kcenter, maxherding, probcover, typiclust, unit
from qmx.selection.orders import class_balanced_order, random_order

__all__ = [
    "balanced",
    "class_balanced_order",
    "entropy",
    "kcenter",
    "margin",
    "maxherding",
    "probcover",
    "random_order",
    "typiclust",
    "unit",
]
