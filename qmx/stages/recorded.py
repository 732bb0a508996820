"""Targets that are a table of recorded answers: into the ledger with them, and no question
beyond."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qmx.data import Dataset, Source
from qmx.grid import budget_keys
from qmx.ledger import Ledger, keys_of_digests, pixel_digests
from qmx.ledger import access as levels
from qmx.ledger.table import CHUNK, Recorded, load
from qmx.progress import progress
from qmx.targets.query import Outside


def connect(keys: Any, data: Dataset) -> Outside:
    """The target whose answers the table at the config's `target.path` holds.

    Raises:
      ValueError: the table cannot be read, or is not of `data`'s classes, or is poorer than
        `target.access`.
    """
    table = load(Path(keys.path))
    if table.scores.shape[1] != (data.classes or table.scores.shape[1]):
        raise ValueError(
            f"{keys.path} scores {table.scores.shape[1]} classes and {data.name} has"
            f" {data.classes}; they must be the same classes in the same order, or target.classes"
            " names a file with a line for each of the target's"
        )
    for have in np.unique(table.access).tolist():
        if not levels.derivable(have, keys.access):
            raise ValueError(
                f"{keys.path} holds answers of access {have}, which is less than "
                f"target.access={keys.access}; set --config.target.access={have} and"
                f" --config.accesses=\"('{have}',)\""
            )
    return Outside(
        _refuse,
        f"recorded answers of {table.target} in {Path(keys.path).name}",
        table.target,
        table.preprocessing,
    )


def _refuse(images: np.ndarray) -> np.ndarray:
    raise ValueError(f"{len(images)} images have no recorded answer, and there is nobody to ask")


def enter(ledger: Ledger, path: Path) -> None:
    """The table's answers into the ledger, where they count for nothing until they are used.

    Raises:
      ValueError: the ledger has other answers of this target to some of the images.
    """
    table = load(path)
    digests = [row.tobytes() for row in table.image]
    keys = keys_of_digests(digests, ledger.target, ledger.preprocessing)
    if changed := _changed(ledger, table, digests):
        raise ValueError(
            f"{path} answers {changed} images otherwise than it did when {ledger.path} got its"
            f" answers; --update=new-target takes those of the table"
        )
    if not ledger.count_missing_keys(keys):
        return
    with progress(f"recorded answers of {path.name}", len(digests), unit="answers") as shown:
        for start in range(0, len(digests), CHUNK):
            for level, found, scores in _by_level(table, digests, slice(start, start + CHUNK)):
                ledger.record(found, scores, level)
            shown.update(min(start + CHUNK, len(digests)))


def _changed(ledger: Ledger, table: Recorded, digests: list[bytes]) -> int:
    """Number of images to which the ledger has another answer than the table."""
    changed = 0
    for start in range(0, len(digests), CHUNK):
        some = slice(start, start + CHUNK)
        for level, found, scores in _by_level(table, digests, some):
            changed += ledger.differing(found, scores.astype(np.float32), level)
    return changed


def _by_level(
    table: Recorded, digests: list[bytes], some: slice
) -> Iterator[tuple[str, list[bytes], np.ndarray]]:
    """(level, digests, scores) of some rows of a table."""
    found, scores, access = digests[some], table.scores[some], table.access[some]
    for level in np.unique(access):
        places = np.flatnonzero(access == level)
        yield str(level), [found[place] for place in places], scores[places]


def refuse_missing(config: Any, data: Dataset, ids: np.ndarray) -> None:
    """Raise ValueError if the table lacks an evaluation image or a pool image to ask about."""
    path = Path(config.target.path)
    have = {row.tobytes() for row in load(path).image}
    asked = {
        "evaluation": (data.evaluation, np.arange(data.evaluation.size)),
        "pool": (data.pool, ids),
    }
    missing = {
        name: _missing(have, source, wanted, f"look for the {name} images in {path.name}")
        for name, (source, wanted) in asked.items()
    }
    if any(missing.values()):
        told = " and ".join(
            f"{missing[name]} of {len(wanted)} {name} images"
            for name, (_, wanted) in asked.items()
            if missing[name]
        )
        # Fewer queries change nothing in what evaluates.
        fewer = "" if missing["evaluation"] else f", or lower {budget_keys(config)}"
        raise ValueError(
            f"{path} has no answer to {told} that would be asked about; record those too{fewer}"
        )


def _missing(have: set[bytes], source: Source, ids: np.ndarray, name: str) -> int:
    missing = 0
    with progress(name, len(ids), unit="images") as shown:
        for start in range(0, len(ids), CHUNK):
            some = ids[start : start + CHUNK]
            missing += sum(digest not in have for digest in pixel_digests(source.shown(some)))
            shown.update(start + len(some))
    return missing
