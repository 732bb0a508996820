"""Images of some of a target's classes, numbered as the target numbers them."""

import hashlib
import json
from pathlib import Path

import numpy as np

from qmx.data.sources import Dataset, Source

SHOWN = 3  # names in a message


def named(data: Dataset, path: str) -> Dataset:
    """The data set with the classes of a target, of which the images may show a few.

    Each class folder, or each name of the source's classes, is looked up in the file; case does not
    matter. Where the source has numbers alone, they are the target's already.

    Args:
      path: a text file with one class a line, in the order of the target's scores; a line may have
        several names of it, with tabs or commas between them ("n01440764, tench, Tinca tinca").

    Returns:
      The same images with N = the number of lines, and labels among 0..N-1.

    Raises:
      ValueError: the file cannot be read, or names a class twice; a class of the images is in no
        line.
    """
    return with_names(data, read(path), f"target.classes {path}")


def with_names(data: Dataset, lines: list[list[str]], where: str) -> Dataset:
    """The same by the names of each class, in the order of the target's scores.

    Args:
      where: they come from, for messages.
    """
    if data.class_names:
        columns = matched(data.class_names, lines, where)
    elif data.classes <= len(lines):
        columns = np.arange(data.classes, dtype=np.int32)
    else:
        raise ValueError(f"{where} names {len(lines)} classes and {data.name} has {data.classes}")
    facts = json.dumps([len(lines), columns.tolist()])

    def digest(side: Source, before: str) -> str:
        # A side without labels stays as it is.
        return hashlib.sha256((before + facts).encode()).hexdigest() if side.labelled else before

    return data._replace(
        classes=len(lines),
        class_names=tuple(names[0] for names in lines),
        pool=renumbered(data.pool, columns),
        evaluation=renumbered(data.evaluation, columns),
        pool_digest=digest(data.pool, data.pool_digest),
        before_numbering=data.pool_digest,
        evaluation_digest=digest(data.evaluation, data.evaluation_digest),
    )


def read(path: str) -> list[list[str]]:
    """The names of each class in a file, in its order."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"target.classes {path} cannot be read as text: {error}") from None
    lines = [
        [name.strip() for name in line.replace("\t", ",").split(",") if name.strip()]
        for line in text.splitlines()
        if line.strip()
    ]
    if not lines:
        raise ValueError(f"target.classes {path} names no class; write one a line")
    return lines


def matched(names: tuple[str, ...], lines: list[list[str]], where: str) -> np.ndarray:
    """The line of each name, i32[len(names)]."""
    columns: dict[str, list[int]] = {}
    for column, aliases in enumerate(lines):
        for alias in {*(alias.casefold() for alias in aliases), ", ".join(aliases).casefold()}:
            columns.setdefault(alias, []).append(column)
    lost = [name for name in names if name.casefold() not in columns]
    if lost:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        raise ValueError(
            f"{len(lost)} of {len(names)} classes of the images are in no line of {where}:"
            f" {', '.join(lost[:SHOWN])}{more}; name the folders as the lines do"
        )
    for name in names:
        if len(found := columns[name.casefold()]) > 1:
            both = " and ".join(str(column + 1) for column in found[:2])
            raise ValueError(
                f"the class {name} is in the lines {both} of {where}; name its folder by a name"
                " that is in one alone"
            )
    return np.array([columns[name.casefold()][0] for name in names], np.int32)


def renumbered(source: Source, columns: np.ndarray) -> Source:
    """A source whose label l has become columns[l]; the same source if it has no labels."""

    if not source.labelled:
        return source

    def read_renumbered(ids: np.ndarray) -> dict[str, np.ndarray]:
        batch = source.read(ids)
        return {**batch, "label": columns[batch["label"]]}

    held = source.held
    if held is not None:
        held = held._replace(arrays={**held.arrays, "label": columns[held.arrays["label"]]})
    return source._replace(read=read_renumbered, labels=columns[source.labels], held=held)
