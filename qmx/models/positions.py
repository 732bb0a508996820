"""Tables of positions at another size, once when weights are read, in float64.

A table is resampled as an image is, and three rules are in use, which differ by up to a standard
deviation of the table from 37 x 37 to 16 x 16:

  offset     cubic, a = -0.75, no antialias; distances are those of a table larger by 0.1: DINO's
             and DINOv2's own code, without registers
  size       cubic, a = -0.75, no antialias: transformers
  antialias  cubic, a = -0.5, with antialias: DINOv2's own code with registers, and timm
"""

import numpy as np

OFFSET = 0.1  # interpolate_offset of DINOv2's own code
RULES = ("offset", "size", "antialias")


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel. Keys 1981, equation 4, of any a."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def weights(entering: int, leaving: int, rule: str) -> np.ndarray:
    """The matrix f64[leaving, entering] that resamples one axis by one of `RULES`."""
    to = np.arange(leaving)[:, None]
    if rule == "antialias":
        scale = entering / leaving
        centre = (to + 0.5) * scale - 0.5
        result = cubic((np.arange(entering) - centre) / max(scale, 1), -0.5)
        return result / result.sum(1, keepdims=True)
    scale = entering / (leaving + OFFSET if rule == "offset" else leaving)
    centre = (to + 0.5) * scale - 0.5
    first = np.floor(centre).astype(int)
    result = np.zeros((leaving, entering))
    for tap in range(-1, 3):  # beyond an edge its value counts
        place = np.clip(first + tap, 0, entering - 1)
        np.add.at(result, (to, place), cubic(centre - first - tap, -0.75))
    return result


def resample(table: np.ndarray, rows: int, columns: int, rule: str) -> np.ndarray:
    """A table of positions f32[R, C, D] at another size, f32[rows, columns, D].

    A table of that size stays as it is, as in all three code bases.
    """
    if table.shape[:2] == (rows, columns):
        return table
    down = weights(table.shape[0], rows, rule)
    across = weights(table.shape[1], columns, rule)
    wide = np.einsum("yr,rcd,xc->yxd", down, table.astype(np.float64), across, optimize=True)
    return wide.astype(table.dtype)
