"""Small pictures of images that were asked about, for the page."""

import base64
import io
from typing import NamedTuple

import numpy as np

SIDE = 96  # pixels, at most; a screen shows small images as large, in whole pixels


class Picture(NamedTuple):
    """An image and its name."""

    name: str
    png: bytes

    @property
    def address(self) -> str:
        """The picture itself, as an address within a page."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def picture(name: str, image: np.ndarray) -> Picture:
    """A picture of an image uint8[H, W, C], no larger than `SIDE`; of other than three channels the
    first, as grey."""
    from PIL import Image

    drawn = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    drawn.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    drawn.save(stream, format="png")
    return Picture(name, stream.getvalue())
