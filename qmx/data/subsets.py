"""Which images of the pool: nested subsets of a given share."""

import math
from decimal import Decimal

import numpy as np


def subset_size(fraction: float, size: int) -> int:
    """int(fraction * size), in decimal: 0.29 of 100 is 29, which binary floats make 28.

    Raises:
      ValueError: a fraction outside (0, 1], or one that leaves no image.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} is outside (0, 1]; 0.01 is one image in a hundred")
    count = int(Decimal(repr(float(fraction))) * size)
    if count == 0:
        digits = 10 ** (1 - math.floor(math.log10(1 / size)))
        least = math.ceil(digits / size) / digits  # rounded up, to two digits
        raise ValueError(f"fraction {fraction} of {size} images is none; use at least {least:g}")
    return count


def random_order(size: int, seed: int) -> np.ndarray:
    """A seeded order of 0..size-1, i64[size]. Its first images are the subset of any share, so
    that the 1 % lies inside the 10 %."""
    return np.random.default_rng(seed).permutation(size)
