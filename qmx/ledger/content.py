"""Contents of a ledger's rows: keys of images, scores as bytes, and checksums."""

import hashlib
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from qmx.ledger.access import ACCESS

# Types of the stored scores: our name -> NumPy's name for the bytes in the file.
DTYPES = {"float32": "<f4", "float16": "<f2"}


def pixel_digests(images: np.ndarray) -> list[bytes]:
    """SHA-256 of the shape and pixels of each image; uint8[n, ...] -> n times 32 bytes.

    Raises:
      ValueError: the images are not uint8.
    """
    if images.dtype != np.uint8:
        raise ValueError(
            f"images are {images.dtype}; the ledger keys the exact uint8 pixels that are sent"
        )
    shape = str(images.shape[1:]).encode()
    return [hashlib.sha256(shape + image.tobytes()).digest() for image in images]


def keys_of_digests(digests: Iterable[bytes], target: str, preprocessing: str) -> list[bytes]:
    """The ledger's keys of images by their `pixel_digests`."""
    suffix = f"\0{target}\0{preprocessing}".encode()
    return [hashlib.sha256(digest + suffix).digest() for digest in digests]


def keys_of(images: np.ndarray, target: str, preprocessing: str) -> list[bytes]:
    """Keys of images in a ledger of this target and preprocessing; see `Ledger.keys`."""
    return keys_of_digests(pixel_digests(images), target, preprocessing)


def checksum(key: bytes, image: bytes, access: str, dtype: str, scores: bytes) -> int:
    """CRC-32 of an answer. It misses one damaged answer in 2^32."""
    return zlib.crc32(
        scores, zlib.crc32(b"%b%b%b %b" % (key, image, access.encode(), dtype.encode()))
    )


def is_whole(
    key: object, image: object, access: object, dtype: object, written: object, scores: object
) -> bool:
    """True if an answer is as it was written; damage may have made anything of its values."""
    return (
        isinstance(key, bytes)
        and isinstance(image, bytes)
        and isinstance(scores, bytes)
        and isinstance(access, str)
        and isinstance(dtype, str)
        and access in ACCESS
        and dtype in DTYPES
        and checksum(key, image, access, dtype, scores) == written
    )


def count_classes(size: object, dtype: object) -> int | None:
    """N of stored scores of `size` bytes; None if damage made this meaningless."""
    if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(size, int) or size < 1:
        return None
    classes, rest = divmod(size, int(DTYPES[dtype][-1]))
    return None if rest else classes


def named(targets: list[str], beginning: str) -> list[str]:
    """The targets that a user's word names: the one that is called so, else those that begin so."""
    return [name for name in targets if name == beginning] or [
        name for name in targets if name.startswith(beginning)
    ]


def checked(answer: np.ndarray, rows: int, classes: int | None) -> np.ndarray:
    """The query's answer as f32[rows, classes]; a row that is not finite stays so.

    Raises:
      ValueError: the shape is another one.
    """
    with np.errstate(over="ignore"):
        scores = np.asarray(answer, np.float32)
    if (
        scores.ndim != 2
        or len(scores) != rows
        or scores.shape[1] != (classes or max(scores.shape[1], 1))
    ):
        raise ValueError(
            f"the query answered {rows} images with shape {scores.shape}; it must be "
            f"[{rows}, {classes or 'N'}]. Nothing of this batch was kept"
        )
    return scores


def packed(scores: np.ndarray, dtype: str) -> list[tuple[str, bytes]]:
    """Dtype and bytes of each row of finite scores f32[n, N], as they are stored.

    A row with a score beyond float16's largest number, 65504, stays float32.
    """
    with np.errstate(over="ignore"):
        stored = scores.astype(DTYPES[dtype])
    return [
        (dtype, row.tobytes())
        if np.isfinite(row).all()
        else ("float32", whole.astype(DTYPES["float32"]).tobytes())
        for row, whole in zip(stored, scores, strict=True)
    ]


def unpacked(scores: Sequence[bytes], dtypes: Sequence[str]) -> np.ndarray:
    """Stored scores of n answers, each with its dtype, as f32[n, N].

    Raises:
      ValueError: the answers differ in N.
    """
    if len(set(dtypes)) == 1 and len(set(map(len, scores))) == 1:
        return (
            np.frombuffer(b"".join(scores), DTYPES[dtypes[0]])
            .reshape(len(scores), -1)
            .astype(np.float32)
        )
    return np.stack(
        [
            np.frombuffer(row, DTYPES[dtype]).astype(np.float32)
            for row, dtype in zip(scores, dtypes, strict=True)
        ]
    )
