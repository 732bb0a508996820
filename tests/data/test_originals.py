"""Folders with the files that the authors of small data sets publish."""

import gzip
import struct

import numpy as np
import pytest

from qmx.data.arrays import arrays
from qmx.data.originals import BATCHES, IDX, originals


def write_idx(path, values, packed):
    """An idx file, written as its specification says."""
    data = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.with_name(path.name + ".gz" * packed).write_bytes(gzip.compress(data) if packed else data)


@pytest.fixture
def sets():
    """Two (images, labels), of 7 and 3."""
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8))
        for n in (7, 3)
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_mnist(sets, tmp_path, packed):
    """Images, labels and sides are what was written; the folder is a data set of that name."""
    for names, values in zip(IDX, sets, strict=True):
        for name, value in zip(names, values, strict=True):
            write_idx(tmp_path / name, value, packed)
    for (images, labels), wanted in zip(originals(str(tmp_path)), sets, strict=True):
        np.testing.assert_array_equal(images[..., 0], wanted[0])
        np.testing.assert_array_equal(labels, wanted[1])
    data = arrays(str(tmp_path), "")
    assert (data.name, data.pool.size, data.evaluation.size) == (tmp_path.name, 7, 3)
    assert data.shape == (28, 28, 1)


@pytest.mark.parametrize(
    "place, change, said",
    [
        (1, lambda pair: (pair[0][:, :20], pair[1]), r"training images are \[28, 28\]"),
        (0, lambda pair: (pair[0], pair[1][:-1]), r"holds \[7, 28, 28\] and train-labels"),
        (0, lambda pair: (pair[0][:0], pair[1][:0]), r"holds \[0, 28, 28\]"),
        (0, lambda pair: (pair[0][..., None].repeat(3, 3), pair[1]), r"holds \[7, 28, 28, 3\]"),
    ],
)
def test_files_that_do_not_fit(sets, tmp_path, place, change, said):
    sets[place] = change(sets[place])
    for names, values in zip(IDX, sets, strict=True):
        for name, value in zip(names, values, strict=True):
            write_idx(tmp_path / name, np.ascontiguousarray(value), packed=False)
    with pytest.raises(ValueError, match=said):
        originals(str(tmp_path))


def test_cifar10(tmp_path):
    """Planes become pixels; the five batches follow each other."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 32, 32, 3), np.uint8), np.arange(12) % 10
    parts = iter(range(0, 12, 2))
    for name in (*BATCHES[0], *BATCHES[1]):
        first = next(parts)
        (tmp_path / name).write_bytes(
            b"".join(
                bytes([labels[i]]) + b"".join(images[i, :, :, c].tobytes() for c in range(3))
                for i in (first, first + 1)
            )
        )
    pool, evaluation = originals(str(tmp_path))
    np.testing.assert_array_equal(np.concatenate([pool[0], evaluation[0]]), images)
    np.testing.assert_array_equal(np.concatenate([pool[1], evaluation[1]]), labels)


def test_what_is_wrong(sets, tmp_path):
    """A line that names the file."""
    with pytest.raises(ValueError, match="neither train-images.* nor data_batch_1.bin"):
        originals(str(tmp_path))
    for names, values in zip(IDX, sets, strict=True):
        for name, value in zip(names, values, strict=True):
            write_idx(tmp_path / name, value, packed=True)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for data, words in ((whole[:-9], "fetch it again"), (b"<html>", "fetch it again")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{path.name}: .*{words}"):
            originals(str(tmp_path))
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ValueError, match=f"{path.name}: it is not a whole idx file"):
        originals(str(tmp_path))
    path.unlink()
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte: no such file"):
        originals(str(tmp_path))
    for name in (*BATCHES[0], *BATCHES[1]):
        (tmp_path / name).write_bytes(b"\0" * 3000)
    for name in IDX[0]:
        (tmp_path / f"{name}.gz").unlink()
    with pytest.raises(ValueError, match="data_batch_1.bin: 3000 bytes are no multiple of 3073"):
        originals(str(tmp_path))
