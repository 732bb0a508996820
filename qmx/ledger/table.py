"""Recorded answers: a table that an owner hands out in place of a model.

The columns, in an npz (a value for each row, or one for all) or a parquet file:

  image          SHA-256 of an image, see `qmx.ledger.pixel_digests`: uint8[n, 32], or binary
  scores         f32 or f16 [n, N], or lists
  access         level of the scores: "logits", "probs" or "label"
  target         the target's digest or name
  preprocessing  name of the steps between the image and the target's own input
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qmx.ledger.access import ACCESS, received
from qmx.ledger.content import count_classes, is_whole, keys_of_digests, named, unpacked
from qmx.ledger.file import Damaged, File, looked_into

COLUMNS = ("image", "scores", "access", "target", "preprocessing")
KINDS = (".npz", ".parquet")
CHUNK = 4096  # answers read from a ledger, or written to one, at a time


class Recorded(NamedTuple):
    """Answers of one target, by content."""

    image: np.ndarray  # uint8[n, 32], no two alike
    scores: np.ndarray  # f32 or f16 [n, N]
    access: np.ndarray  # str[n]
    target: str
    preprocessing: str


def check_kind(path: Path) -> None:
    """Raise ValueError unless the file's name ends with one of `KINDS`."""
    if path.suffix not in KINDS:
        raise ValueError(f"{path} must be a table in a file that ends in {' or '.join(KINDS)}")


def load(path: Path) -> Recorded:
    """Read a table of one target's answers; nothing in the file is executed.

    Raises:
      ValueError: the file is not such a table; the message says why.
    """
    check_kind(path)
    try:
        columns = _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
    except Exception as error:  # the readers of damaged and foreign files raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a table of answers with the columns {', '.join(COLUMNS)}: "
            f"{reason}"
        ) from None
    image, scores = columns["image"], columns["scores"]
    if image.dtype != np.uint8 or image.ndim != 2 or image.shape[1] != 32:
        raise ValueError(
            f"{path}: image is {image.dtype}{list(image.shape)}; it must hold SHA-256 digests, "
            "uint8[n, 32]"
        )
    if (
        scores.dtype not in (np.float32, np.float16)
        or scores.shape[:1] != image.shape[:1]
        or scores.ndim != 2
        or not scores.shape[1]
    ):
        raise ValueError(
            f"{path}: scores are {scores.dtype}{list(scores.shape)}; they must be float32 or"
            f" float16 [{len(image)}, N], a row for each image"
        )
    if not len(image) or not np.isfinite(scores).all():
        raise ValueError(f"{path} holds {len(image)} answers, and every one needs finite scores")
    if len(np.unique(image, axis=0)) < len(image):
        raise ValueError(f"{path} has several answers to one image; keep one of each")
    for name in COLUMNS[2:]:
        if columns[name].dtype.kind != "U" or columns[name].shape not in ((), (1,), (len(image),)):
            raise ValueError(
                f"{path}: {name} is {columns[name].dtype}{list(columns[name].shape)}; it must be a"
                f" text, or {len(image)} of them"
            )
    texts = {name: np.broadcast_to(columns[name], len(image)) for name in COLUMNS[2:]}
    for name in ("target", "preprocessing"):
        if len(values := np.unique(texts[name]).tolist()) > 1:
            raise ValueError(
                f"{path} holds answers of several {name}s, {values[0]!r} and {values[1]!r}; take"
                " one for each table, as `python -m qmx.ledger export --target` does"
            )
    if unknown := {*np.unique(texts["access"]).tolist()} - {*ACCESS}:
        raise ValueError(
            f"{path} has answers of the unknown access {min(unknown)!r}; choose among"
            f" {', '.join(ACCESS)}"
        )
    for access in np.unique(texts["access"]).tolist():
        some = scores[texts["access"] == access]
        try:
            received(some, len(some), some.shape[1], access)
        except ValueError as error:
            raise ValueError(f"{path} says that its answers are {access}: {error}") from None
    return Recorded(
        image, scores, texts["access"], str(texts["target"][0]), str(texts["preprocessing"][0])
    )


def save(path: Path, table: Recorded) -> None:
    """Write a table in the format that the file's name ends with.

    Raises:
      FileExistsError: the file is there already.
      OSError: the file cannot be written; no part of it is left.
    """
    check_kind(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already; move it away or give another name")
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            if path.suffix == ".npz":
                access: Any = table.access[0] if len({*table.access}) == 1 else table.access
                np.savez(
                    file,
                    image=table.image,
                    scores=table.scores,
                    access=access,
                    target=np.array(table.target),
                    preprocessing=np.array(table.preprocessing),
                )
            else:
                _write_parquet(file, table)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def from_ledger(path: Path, target: str | None = None) -> tuple[Recorded, int]:
    """A ledger's answers as a table, and the number of answers to views, which it leaves out.

    A view shows another image, and the table pairs answers with images.

    Args:
      target: digest or name of a target, or its beginning; needed if the ledger has several.

    Raises:
      ValueError: the file is not a ledger, or no target or several targets match.
      Damaged: an answer is not as it was written.
    """
    with looked_into(path) as file:
        names = file.run(
            "SELECT DISTINCT target, preprocessing FROM requests WHERE id IN "
            "(SELECT request FROM answers)"
        )
        if not all(isinstance(text, str) for name in names for text in name):
            raise Damaged(path, "the name of a target or a preprocessing is not a text")
        meant = named([name for name, _ in names], target or "")
        chosen = [name for name in names if name[0] in meant]
        if len(chosen) != 1:
            what = f"{path} has {len(chosen)} targets with answers" + (
                f" that begin with {target!r}" if target else ""
            )
            listed = "; ".join(
                f"{name} ({preprocessing})" for name, preprocessing in chosen or names
            )
            raise ValueError(f"{what}; give --target=BEGINNING of one of: {listed or 'none'}")
        return _answers(file, *chosen[0])


def _answers(file: File, target: str, preprocessing: str) -> tuple[Recorded, int]:
    images, access, scores, views = list[bytes](), list[str](), list[np.ndarray](), 0
    widths = set[int | None]()
    for rows in file.stream(
        "SELECT key, image, access, dtype, checksum, scores FROM answers JOIN scores USING (row)"
        " JOIN requests ON request = id WHERE target = ? AND preprocessing = ? ORDER BY row",
        [target, preprocessing],
        CHUNK,
    ):
        if not all(is_whole(*row) for row in rows):
            raise Damaged(file.path, "an answer is not as it was written")
        widths |= {count_classes(len(row[5]), row[3]) for row in rows}
        if len(widths) > 1:
            raise Damaged(file.path, f"the answers have {len(widths)} numbers of classes")
        keys = keys_of_digests([row[1] for row in rows], target, preprocessing)
        whole = [row for row, key in zip(rows, keys, strict=True) if row[0] == key]
        views += len(rows) - len(whole)
        images += [row[1] for row in whole]
        access += [row[2] for row in whole]
        if whole:
            values = unpacked([row[5] for row in whole], [row[3] for row in whole])
            scores.append(
                values.astype(np.float16) if {row[3] for row in whole} == {"float16"} else values
            )
    if not images:
        raise ValueError(f"{file.path} has no answers that a table could hold")
    return (
        Recorded(
            np.frombuffer(b"".join(images), np.uint8).reshape(-1, 32),
            np.concatenate(scores),
            np.array(access),
            target,
            preprocessing,
        ),
        views,
    )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        return {name: np.asarray(file[name]) for name in COLUMNS}


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    pyarrow = _pyarrow(path)
    table = pyarrow.parquet.read_table(path, columns=list(COLUMNS))
    if empty := [name for name in COLUMNS if table[name].null_count]:
        raise ValueError(f"{empty[0]} is missing in some rows")
    scores = table["scores"].combine_chunks()
    widths = sorted({len(row) for row in scores})
    if len(widths) != 1:
        raise ValueError(f"its rows have {widths} scores")
    images = table["image"].to_pylist()
    if {len(row) for row in images} != {32}:
        raise ValueError("some images are not SHA-256 digests of 32 bytes")
    return {
        "image": np.frombuffer(b"".join(images), np.uint8).reshape(len(table), -1),
        "scores": scores.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1),
        **{name: np.array(table[name].to_pylist(), str) for name in COLUMNS[2:]},
    }


def _write_parquet(file: Any, table: Recorded) -> None:
    pyarrow, size = _pyarrow(file.name), len(table.image)
    pyarrow.parquet.write_table(
        pyarrow.table(
            {
                "image": pyarrow.array([row.tobytes() for row in table.image], pyarrow.binary(32)),
                "scores": pyarrow.FixedSizeListArray.from_arrays(
                    pyarrow.array(table.scores.ravel()), table.scores.shape[1]
                ),
                "access": pyarrow.array(table.access.tolist()),
                "target": pyarrow.array([table.target] * size),
                "preprocessing": pyarrow.array([table.preprocessing] * size),
            }
        ),
        file,
    )


def _pyarrow(path: Any) -> Any:
    try:
        import pyarrow.parquet  # tensorflow-datasets brings it
    except ImportError:
        raise ValueError(
            f"{path} needs pyarrow (pip install pyarrow), or take .npz, which needs nothing"
        ) from None
    return pyarrow
