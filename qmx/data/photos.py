"""Photographs: decoding, and the two squares that are made from one.

Training cuts its views on the device from a `canvas`, the whole photo squashed onto a square.
Targets and evaluations get the pixels `shown`: the short side resized and the centre cut out, bit
for bit as torchvision does it.
"""

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from PIL import Image

from qmx.data.sources import Files, Photos, Source

EXIF_ORIENTATION = 0x0112
LONGEST = 32  # sides of a photo: more of it is cut off before it is resized; ours
MEMORY = 1 << 30  # bytes of canvases that are kept: 21,845 photos at 128 pixels
# Not EPS, for which Pillow starts Ghostscript: images may come from strangers.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF"),
    "WEBP",
)
CHUNK = 4  # photos that a thread takes at a time; handing out single ones costs more


@cache
def formats() -> tuple[str, ...]:
    """The formats that photos are read in, by Pillow's names: those of `FORMATS` that it has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(data: bytes, name: str) -> Image.Image:
    """Read a file's header; ValueError names a file without one."""
    if not data:
        raise ValueError(f"{name}: the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=formats())
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: not an image that Pillow can read") from None
    except Exception as error:  # a header can be wrong in as many ways as there are formats
        raise ValueError(f"{name}: {' '.join(str(error).split()) or repr(error)}") from None


def decode(data: bytes, name: str) -> Image.Image:
    """A file's pixels in RGB, as `PIL.Image.open(file).convert("RGB")` has them, 16 bits apart.

    Grey, CMYK and palettes are converted. Grey of 16 bits is divided by 257, so that 65535 becomes
    255; Pillow and torchvision's loader clip it at 255. The content decides the format, not the
    file's name. EXIF orientation is *not* applied. torchvision's loader does not apply it either,
    so the target was trained on the pixels as stored, and must be asked about the same. So are
    students.

    Args:
      data: the file.
      name: for the message.

    Raises:
      ValueError: the file is empty, cut off, damaged, suspiciously large, or not an image; its
        pixels are floats or 32-bit integers, whose range no file says.
    """
    image = open_image(data, name)
    try:
        image.load()
        return as_rgb(image)
    except MemoryError:  # which says nothing of the file
        raise
    except Exception as error:  # OSError, SyntaxError, EOFError, struct.error, zlib.error ...
        raise ValueError(f"{name}: {' '.join(str(error).split()) or repr(error)}") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """A loaded image in RGB; ValueError if the range of its pixels is unknown. See `decode`."""
    deep = image.mode.startswith("I")
    # Pillow reads a PGM of 16 bits as 32, and scales it to 0..65535.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        low, high = image.getextrema()
        raise ValueError(
            f"{kind} pixels, {low:g} .. {high:g}, of unknown range; scale them to 0 .. 255 and save"
            " them with 8 bits"
        )
    if deep:
        image = Image.fromarray(np.round(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() always copies


def oddities(data: bytes, name: str) -> tuple[str, ...]:
    """Oddities of a file that can be decoded, in words, for a count of each."""
    image = open_image(data, name)
    words = [
        {"L": "greyscale", "P": "palette"}.get(image.mode, image.mode)
        if not image.mode.startswith("I")
        else "16-bit greyscale"
    ]
    if image.mode == "RGB":
        words = []
    if name.lower().endswith((".jpg", ".jpeg")) and image.format not in ("JPEG", "MPO"):
        words.append(f"{image.format} named JPEG")
    try:
        if image.getexif().get(EXIF_ORIENTATION, 1) in range(2, 9):
            words.append("EXIF-rotated, used as stored")
    except Exception:  # unreadable EXIF: no rotation
        pass
    return tuple(words)


def shown(image: Image.Image, resize: int, crop: int) -> np.ndarray:
    """The centre of a photo, uint8[crop, crop, 3], by torchvision's Resize and CenterCrop.

    The short side becomes `resize`, the other int(resize * long / short), by Pillow's antialiased
    bilinear filter. A result smaller than the crop is padded with zeros. Of a photo more than 32
    times as long as wide its middle is resized: the whole would take gigabytes. Source:
    torchvision 0.29, `transforms.functional` (`_compute_resized_output_size`, `center_crop`).
    """
    width, height = image.size
    if max(width, height) > LONGEST * min(width, height):  # of which the rest is never seen
        half = LONGEST * min(width, height) / 2
        left, upper = (round(max(side / 2 - half, 0)) for side in (width, height))
        image = image.crop((left, upper, width - left, height - upper))
        width, height = image.size
    other = int(resize * max(width, height) / min(width, height))
    size = (resize, other) if width <= height else (other, resize)
    pixels = np.asarray(
        image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
    )
    missing = [max(crop - side, 0) for side in pixels.shape[:2]]
    if any(missing):
        pixels = np.pad(pixels, [*((m // 2, (m + 1) // 2) for m in missing), (0, 0)])
    # Halves round to even, as in torchvision.
    top, left = (round((side - crop) / 2) for side in pixels.shape[:2])
    return pixels[top : top + crop, left : left + crop]


def canvas(image: Image.Image, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """(the whole photo squashed onto a square, uint8[side, side, 3]; its own height and width)."""
    width, height = image.size
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)), (height, width)


@cache
def workers() -> ThreadPoolExecutor:
    """One thread for each core, shared by the whole process. Pillow decodes without the GIL."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="photos")


def in_threads(work: Callable[[int, int], None], ids: np.ndarray) -> None:
    """Call work(row, id) for each of `ids`; the first error stops the rest and is raised."""

    def some(first: int) -> None:
        for row in range(first, min(first + CHUNK, len(ids))):
            work(row, int(ids[row]))

    waiting = [workers().submit(some, first) for first in range(0, len(ids), CHUNK)]
    try:
        for done in waiting:
            done.result()
    finally:
        for rest in waiting:
            rest.cancel()


def canvases(photos: Photos, side: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A reader of the files: ids i64[b] -> (uint8[b, side, side, 3], f32[b, 2] heights, widths)."""

    def squashed(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, sizes = (
            np.empty((len(ids), side, side, 3), np.uint8),
            np.empty((len(ids), 2), np.float32),
        )

        def one(row: int, i: int) -> None:
            images[row], sizes[row] = canvas(usable(photos, i), side)

        in_threads(one, ids)
        return images, sizes

    return squashed


def remembered(
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], size: int, side: int
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The same reader of canvases, which decodes each of `size` photos once if all of them fit into
    `MEMORY`: large photos take longer to decode than a small network to train on."""
    if size * side * side * 3 > MEMORY:
        return read
    images = np.empty((size, side, side, 3), np.uint8)  # taken by the system as it is filled
    sizes, known = np.empty((size, 2), np.float32), np.zeros(size, bool)

    def remember(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        new = ids[~known[ids]]
        if len(new):
            images[new], sizes[new] = read(new)
            known[new] = True
        return images[ids], sizes[ids]

    return remember


def usable(photos: Photos, i: int) -> Image.Image:
    """Decode photo i; ValueError names it and the cure."""
    try:
        return decode(photos.load(i), photos.title(i))
    except ValueError as error:
        raise ValueError(
            f"{error}; repair it, or leave it out with data.leave_out=FILE, a text file that holds"
            f" {photos.title(i)}"
        ) from None


def photo_source(
    photos: Photos,
    *,
    canvas: int,
    resize: int,
    crop: int,
    squashed: Callable | None = None,
    kept: np.ndarray | None = None,
) -> Source:
    """A source of photos.

    Args:
      photos: the files.
      canvas: side of the square that photos are squashed onto for training.
      resize, crop: short side and centre of the pixels that a target gets.
      squashed: ids i64[b] -> canvases and sizes out of a cache, as `canvases` returns them.
      kept: i64[n], the photos to use, by default all; example k of the source is photo kept[k].
    """
    ids_of = np.arange(photos.size) if kept is None else kept
    files = Files(photos, ids_of, squashed is not None)
    labels = photos.labels[ids_of] if len(photos.labels) else photos.labels
    from_files = remembered(canvases(photos, canvas), photos.size, canvas)

    def read(ids: np.ndarray) -> dict[str, np.ndarray]:
        images, sizes = squashed(ids) if squashed else from_files(ids_of[ids])
        known = {"label": labels[ids]} if len(labels) else {}
        return {"image": images, "size": sizes, **known}

    def show(ids: np.ndarray) -> np.ndarray:
        images = np.empty((len(ids), crop, crop, 3), np.uint8)

        def one(row: int, i: int) -> None:
            images[row] = shown(usable(photos, i), resize, crop)

        in_threads(one, ids_of[ids])
        return images

    names = (
        tuple(photos.names[i] for i in ids_of)
        if photos.names and kept is not None
        else photos.names
    )
    return Source(len(ids_of), read, show, labels, names, files=files)
