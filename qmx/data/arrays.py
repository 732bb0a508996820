"""Images that fit in memory: `digits` (inside scikit-learn, offline) and `arrays` (npz files)."""

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np

from qmx.data.classes import number_of
from qmx.data.originals import originals
from qmx.data.sources import Dataset, Source, in_memory


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which need no download.

    0..16 becomes 0..255. Every fifth image of a fixed shuffle is for evaluation: 1,437 in the
    pool and 360 outside, the same for every seed. Alpaydin & Kaynak 1998 (UCI "optdigits").
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    held_out, pool = order[: len(order) // 5 + 1], order[len(order) // 5 + 1 :]
    return from_arrays("digits", images[pool], labels[pool], images[held_out], labels[held_out])


def arrays(path: str, eval_path: str) -> Dataset:
    """Two npz files, each with "image" uint8[n, H, W, C] (or [n, H, W]), and "label" int[n] if it
    has labels. Without `eval_path` there are no evaluation images.

    Or one folder with the files that MNIST's, Fashion-MNIST's or CIFAR-10's authors publish, see
    `qmx.data.originals`; `eval_path` is empty then.

    Raises:
      ValueError: a path is missing, or what is wrong with a file; images in both files; more
        classes than images.
    """
    if path and not eval_path and Path(path).is_dir():
        (images, labels), evaluation = originals(path)
        return from_arrays(Path(path).resolve().name, images, labels, *evaluation)
    if not path:
        raise ValueError(
            "data.source=arrays needs a file of images: data.path=POOL.npz; and to evaluate on,"
            " another one: data.eval_path=EVALUATION.npz; or data.path=FOLDER with MNIST's or"
            " CIFAR-10's original files"
        )
    pool = read_npz(path)
    evaluation = read_npz(eval_path) if eval_path else (pool[0][:0], pool[1][:0])
    if pool[0].shape[1:] != evaluation[0].shape[1:]:
        raise ValueError(
            f"images are {pool[0].shape[1:]} in {path} and {evaluation[0].shape[1:]} in"
            f" {eval_path}; they must have one shape"
        )
    number_of({path: pool[1], eval_path: evaluation[1]})
    return from_arrays(Path(path).stem, *pool, *evaluation)


def read_npz(path: str) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8[n, H, W, C], labels i32[n], or i32[0] if there are none) of a file; ValueError
    says what is wrong."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path}: no data, the file is empty")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: it is not an npz file, which is a zip of arrays, or it is cut off"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            if "image" not in file:
                raise ValueError(
                    f"no array 'image' in it, only {sorted(file)}; save "
                    "image=uint8[n, H, W, C], and label=int[n] if there are labels"
                )
            others = sorted({*file} - {"image", "label"})
            if "label" not in file and others:  # labels by another name, or a damaged name
                raise ValueError(
                    f"no array 'label' in it, but {others}; name the labels 'label', or save "
                    "image alone if there are none"
                )
            if "label" not in file and arrays_written(path) != len(file.files):
                raise ValueError("its list of arrays is damaged, so labels may be missing")
            images = file["image"]
            labels = file["label"] if "label" in file else None
            if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray | None):
                raise ValueError("image and label must be arrays saved by numpy")
    except MemoryError:
        raise  # the file may be sound
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for damaged files
        raise ValueError(f"{path}: {(str(error) or repr(error)).splitlines()[0]}") from None

    if images.ndim == 3:
        images = images[..., None]
    problem = None
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        problem = (
            f"image has shape {images.shape}; it must be [n, H, W, C] with C = 1 or 3, or [n, H, W]"
        )
    elif np.issubdtype(images.dtype, np.floating) and np.isnan(images).any():
        problem = (
            f"image holds NaN in {int(np.isnan(images).any((1, 2, 3)).sum())} of {len(images)}"
            " images"
        )
    elif images.dtype != np.uint8:
        problem = f"image is {images.dtype}; it must be uint8, 0..255"
    elif not len(images):
        problem = "it holds no image"
    elif labels is None:
        pass
    elif labels.shape != (len(images),):
        problem = f"label has shape {labels.shape}; it must be [{len(images)}], one for each image"
    elif not np.issubdtype(labels.dtype, np.integer):
        problem = f"label is {labels.dtype}; it must be an integer, 0..N-1"
    elif labels.min() < 0:
        problem = f"label {labels.min()} is negative; classes are 0..N-1"
    elif labels.max() >= 2**31:
        problem = f"label {labels.max()} is too large; classes are 0..N-1"
    if problem:
        raise ValueError(f"{path}: {problem}")
    return images, np.zeros(0, np.int32) if labels is None else labels.astype(np.int32)


def trigger_images(
    path: str, shape: tuple[int, int, int], classes: int
) -> tuple[Source, np.ndarray, str]:
    """(images, marks i32[n], digest) of a watermark's npz: "image" and "label", the class with
    which a marked model answers.

    Args:
      shape: H, W, C that the images must have.
      classes: N; 0 if it is not known.

    Raises:
      ValueError: what is wrong with the file.
    """
    images, labels = read_npz(path)
    problem = None
    if not len(labels):
        problem = "no array 'label' in it; save label=int[n], the class of each trigger image"
    elif images.shape[1:] != shape:
        problem = f"image has shape {images.shape[1:]}; the model is shown {tuple(shape)}"
    elif classes and labels.max() >= classes:
        problem = f"label {labels.max()} is no class of the model's {classes}, 0..{classes - 1}"
    if problem:
        raise ValueError(f"{path}: {problem}")
    return in_memory(image=images, label=labels), labels, digest(images, labels)


def arrays_written(path: str) -> int:
    """Number of entries that the end of a zip says it has; zipfile does not compare it."""
    with open(path, "rb") as file:
        file.seek(-12, os.SEEK_END)  # of the record's last 22 bytes, numpy writes no comment
        return int.from_bytes(file.read(2), "little")


def from_arrays(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    eval_images: np.ndarray,
    eval_labels: np.ndarray,
) -> Dataset:
    """A data set in memory, with its statistics and digest; labels i32[n], or i32[0] for none.

    Raises:
      ValueError: an evaluation image is in the pool too, which would raise every figure.
    """
    pool = {image.tobytes(): i for i, image in enumerate(images)}
    pairs = [
        (i, pool[data]) for i, image in enumerate(eval_images) if (data := image.tobytes()) in pool
    ]
    if pairs:
        raise ValueError(
            f"{len(pairs)} of {len(eval_images)} evaluation images are in the pool too: number"
            f" {pairs[0][0]} is the pool's number {pairs[0][1]}; remove them from one side"
        )
    counts = np.stack(
        [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    )
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    std = np.sqrt(np.maximum(counts @ values**2 / counts.sum(1) - mean**2, 1e-12))
    return Dataset(
        name=name,
        pool=in_memory(image=images, **_labels(labels)),
        evaluation=in_memory(image=eval_images, **_labels(eval_labels)),
        classes=number_of({f"{name}, pool": labels, f"{name}, evaluation": eval_labels}),
        shape=images.shape[1:],
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        pool_digest=digest(images, labels),
        evaluation_digest=digest(eval_images, eval_labels),
    )


def _labels(labels: np.ndarray) -> dict[str, np.ndarray]:
    return {"label": labels.astype(np.int32)} if len(labels) else {}


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of the bytes, shapes and types of arrays."""
    result = hashlib.sha256()
    for array in (images, labels):
        result.update(str((array.dtype, array.shape)).encode())
        result.update(array.tobytes())
    return result.hexdigest()
