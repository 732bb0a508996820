"""Small data sets in the files that their authors publish: MNIST's and CIFAR-10's.

Neither needs a download by this package, nor a pickle to be opened.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8[n, H, W, C], labels uint8[n]

# LeCun et al. 1998; Fashion-MNIST (Xiao et al. 2017) and KMNIST have the same names.
IDX = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    (
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ),
)
# Krizhevsky 2009, "CIFAR-10 binary version": a byte of label, then 3 x 32 x 32 bytes.
BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)
ROW = 1 + 3 * 32 * 32


def originals(folder: str) -> tuple[Arrays, Arrays]:
    """The training and the test images of a folder, the pool and the evaluation images.

    Args:
      folder: with MNIST's four idx files (also as `.gz`), or CIFAR-10's six binary batches.

    Raises:
      ValueError: neither is in it, a file is missing, or one is cut off.
    """
    root = Path(folder)
    if any((root / f"{IDX[0][0]}{end}").is_file() for end in ("", ".gz")):
        pool, evaluation = (pair(root, *names) for names in IDX)
        if pool[0].shape[1:] != evaluation[0].shape[1:]:
            raise ValueError(
                f"{folder}: training images are {list(pool[0].shape[1:3])} pixels and test images"
                f" {list(evaluation[0].shape[1:3])}; fetch both again"
            )
        return pool, evaluation
    if (root / BATCHES[0][0]).is_file():
        training, test = (
            np.concatenate([rows(root / name) for name in names]) for names in BATCHES
        )
        return split(training), split(test)
    raise ValueError(
        f"{folder}: it has neither {IDX[0][0]}.gz (MNIST, Fashion-MNIST) nor {BATCHES[0][0]}"
        " (CIFAR-10, binary version); give a folder with those, or data.path=POOL.npz and"
        " data.eval_path=EVALUATION.npz"
    )


def pair(root: Path, images: str, labels: str) -> Arrays:
    """The images of an idx file, and their labels of another."""
    pixels, classes = idx(root, images), idx(root, labels)
    if pixels.ndim != 3 or classes.shape != (len(pixels),) or not pixels.size:
        raise ValueError(
            f"{root / images} holds {list(pixels.shape)} and {labels} {list(classes.shape)}; they"
            " must be [n, H, W] and [n]; fetch both again"
        )
    return pixels[..., None], classes


def idx(root: Path, name: str) -> np.ndarray:
    """One idx file: two zero bytes, 8 for uint8, the number of axes, their lengths, the values."""
    path = root / f"{name}.gz" if (root / f"{name}.gz").is_file() else root / name
    data = whole(path)
    axes = data[3] if len(data) > 3 else 0
    shape = tuple(int(n) for n in np.frombuffer(data[4 : 4 + 4 * axes], ">u4"))
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * axes + int(np.prod(shape)):
        raise ValueError(f"{path}: it is not a whole idx file of bytes; fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def rows(path: Path) -> np.ndarray:
    """uint8[n, ROW] of one of CIFAR-10's batches."""
    data = whole(path)
    if not data or len(data) % ROW:
        raise ValueError(f"{path}: {len(data)} bytes are no multiple of {ROW}; fetch it again")
    return np.frombuffer(data, np.uint8).reshape(-1, ROW)


def split(batch: np.ndarray) -> Arrays:
    """(images, labels) of CIFAR-10's rows, whose pixels are in planes."""
    return batch[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), batch[:, 0]


def whole(path: Path) -> bytes:
    """The bytes of a file, unpacked if it is a `.gz`."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; the folder must have all of them") from None
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: {error}; fetch it again") from None
