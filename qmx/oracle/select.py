"""Which images of the pool to ask about."""

import numpy as np

from qmx.data.subsets import random_order

# name -> (pool size, budget, seed) -> the ids to ask about, i64[budget]
SELECTS = {"random": lambda size, budget, seed: random_order(size, seed)[:budget]}


def select(name: str, size: int, budget: int, seed: int) -> np.ndarray:
    """`budget` ids out of 0..size-1; for one seed a smaller budget's choice lies inside a larger one's."""
    return SELECTS[name](size, budget, seed)
