"""Images as a target that is elsewhere is shown them: size, numbers and order of the axes.

What a deployed model expects is part of it, and no server says it. The field's words for it are
foolbox's `preprocessing` and `bounds`, ART's `channels_first` and `preprocessing`, and timm's
`pretrained_cfg`.
"""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

LAYOUTS = ("", "nhwc", "nchw")
DTYPES = ("", "uint8", "float32", "float16")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
USUAL = (
    "target.shown.scale=1 for 0..1 (Keras);"
    " scale=1 with mean=(0.485,0.456,0.406) and std=(0.229,0.224,0.225) (torchvision, timm);"
    " scale=1 with mean=(0.5,0.5,0.5) and std=(0.5,0.5,0.5) for -1..1;"
    " scale=255 for the pixels as they are"
)


class Shown(NamedTuple):
    """Preparation of an image before a target gets it; the defaults change nothing."""

    layout: str = ""  # nhwc or nchw; "" is what the target says, else nhwc
    dtype: str = ""  # uint8, float32, float16; "" is what the target says, else uint8
    scale: float = 0.0  # what 255 becomes; 0 is not said, which uint8 alone may leave so
    mean: tuple[float, ...] = ()  # of each channel, subtracted after scaling
    std: tuple[float, ...] = ()  # of each channel, divided by after that
    size: int = 0  # side of the square that the image is resized to; 0 leaves it
    interpolation: str = "bilinear"  # of the resizing, with antialias
    channels: int = 0  # 3 shows a grey image in three equal channels, 1 its luma; 0 leaves them


UNCHANGED = Shown()


def resolved(shown: Shown, shape: tuple[int, int, int], dtype: str, sizes: list[int]) -> Shown:
    """The same with nothing left open.

    Args:
      shape: H, W, C of the images.
      dtype: that the target says it takes, "" if it does not say.
      sizes: of its input, with -1 for any, [] if it does not say.

    Raises:
      ValueError: numbers that are not whole without their scale; an input that these images do not
        fit.
    """
    said, dtype = dtype, shown.dtype or dtype or "uint8"
    if dtype != "uint8" and not shown.scale:
        raise ValueError(f"the target takes {dtype}, and nobody says in what numbers; set {USUAL}")
    if dtype == "uint8" and (shown.mean or shown.std or shown.scale not in (0, 255)):
        raise ValueError(
            "target.shown has a scale, a mean or a std, and the target takes uint8; leave them out"
            + ("" if said else ", or set target.shown.dtype=float32")
        )
    known = shown._replace(dtype=dtype, scale=shown.scale or 255.0)
    layouts = [shown.layout] if shown.layout else ["nhwc", "nchw"]
    fitting = [
        known._replace(layout=layout)
        for layout in layouts
        if _fits(sizes, image_shape(known._replace(layout=layout), shape))
    ]
    if not fitting:
        ours = list(image_shape(known._replace(layout=layouts[0]), shape))
        raise ValueError(
            f"the target's input has the shape {sizes} and images are shown as {[-1, *ours]};"
            " target.shown.size, .channels and .layout say how they are to be shown"
        )
    channels = image_shape(fitting[0]._replace(layout="nhwc"), shape)[2]
    for key in ("mean", "std"):
        if len(getattr(known, key)) not in (0, 1, channels):
            raise ValueError(
                f"target.shown.{key} {getattr(known, key)} must have {channels} numbers, one for"
                " each channel"
            )
    return fitting[0]


def image_shape(shown: Shown, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape of one image as it is shown, for images of H, W, C."""
    height, width = (shown.size, shown.size) if shown.size else shape[:2]
    channels = shown.channels or shape[2]
    return (channels, height, width) if shown.layout == "nchw" else (height, width, channels)


def _fits(sizes: list[int], ours: tuple[int, ...]) -> bool:
    return not sizes or (
        len(sizes) == len(ours) + 1
        and all(theirs in (-1, size) for theirs, size in zip(sizes[1:], ours, strict=True))
    )


def prepare(images: np.ndarray, shown: Shown) -> np.ndarray:
    """Images uint8[b, H, W, C] as a target gets them, of `image_shape` and `shown.dtype`.

    Args:
      shown: `resolved`.
    """
    if shown.size and images.shape[1:3] != (shown.size, shown.size):
        how = INTERPOLATIONS[shown.interpolation]
        images = np.stack([_resized(image, shown.size, how) for image in images])
    if shown.channels and shown.channels != images.shape[-1]:
        if shown.channels == 3:
            images = np.repeat(images, 3, axis=-1)
        else:
            grey = [np.asarray(Image.fromarray(image).convert("L")) for image in images]
            images = np.stack(grey)[..., None]
    if shown.dtype != "uint8":
        values: np.ndarray = images.astype(np.float32) * np.float32(shown.scale / 255)
        mean, std = shown.mean or (0.0,), shown.std or (1.0,)
        values = (values - np.array(mean, np.float32)) / np.array(std, np.float32)
        images = values.astype(shown.dtype)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if shown.layout == "nchw" else images


def _resized(image: np.ndarray, size: int, how: Any) -> np.ndarray:
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    out = np.asarray(Image.fromarray(pixels).resize((size, size), how))
    return out[..., None] if image.shape[-1] == 1 else out


def name(shown: Shown) -> str:
    """Name of a `resolved` preparation in the ledger's keys: "as-is" leaves pixels as they are."""
    if shown._replace(layout="", dtype="", scale=0.0, interpolation="bilinear") == UNCHANGED and (
        (shown.layout, shown.dtype) == ("nhwc", "uint8")
    ):
        return "as-is"
    parts = [shown.layout, shown.dtype]
    if shown.dtype != "uint8":
        parts.append(f"0..{shown.scale:g}")
        parts += [f"{key} {getattr(shown, key)}" for key in ("mean", "std") if getattr(shown, key)]
    if shown.size:
        parts.append(f"{shown.size} pixels {shown.interpolation}")
    if shown.channels:
        parts.append(f"{shown.channels} channels")
    return ", ".join(parts)
