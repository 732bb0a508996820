"""A target that is the user's Python function."""

import hashlib
import importlib.util
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from qmx.checkpoint import file_digest
from qmx.ledger import Refused
from qmx.ledger.access import received
from qmx.targets.query import Outside, limiter
from qmx.targets.shown import UNCHANGED, Shown, prepare, resolved
from qmx.targets.shown import name as name_of


def connect(
    path: str,
    *,
    shape: tuple[int, int, int],
    classes: int,
    access: str = "logits",
    shown: Shown = UNCHANGED,
    watch: Sequence[str] = (),
    rate: float = 0.0,
) -> Outside:
    """A query function around the user's function, images [b, ...] -> numbers [b, N].

    The user's function may raise `qmx.ledger.Unavailable`, with the seconds to wait, to be called
    again, and `qmx.ledger.Refused` for images that it cannot answer, to be called with fewer.

    The digest is of the file, the function's name and the files of `watch`, and is part of the
    ledger's keys. A changed file is therefore another target. A change in other files that the
    function reads (weights, other modules) goes unnoticed.

    Args:
      path: "FILE.py:function" or "module:function". The file is executed. It finds modules that
        lie beside it, and the module those of the current directory, after all that is installed.
      shape: of the images, H, W, C.
      classes: N, 0 if it is not known.
      watch: more files that the function is made of, as weights.
      shown: how the function gets them; by default uint8[b, H, W, C].
      access: level of its results, "logits", "probs" or "label"; see
        `qmx.ledger.access.received`.
      rate: most calls in a second; 0 is no limit.

    Raises:
      ValueError: there is no such file or function, or it cannot be loaded. By the query: the
        function raised anything but an OSError, or its result is not an answer of that level.
    """
    name, function = load(path, watch=watch)
    file = path.rpartition(":")[0]
    known, pause = resolved(shown, shape, "", []), limiter(rate)

    def query(images: np.ndarray) -> np.ndarray:
        pause()
        try:
            answer = np.asarray(function(prepare(images, known)))
            numeric = answer.dtype.kind in "biuf"
        except (OSError, Refused, MemoryError):  # Unavailable is an OSError
            raise
        except (Exception, SystemExit) as error:
            raise ValueError(f"target.path {path} failed: {_place(error)}") from error
        if not numeric:
            raise ValueError(f"target.path {path} returned {answer.dtype}, and it must be numbers")
        return received(answer, len(images), classes, access)

    return Outside(query, f"{name} of {Path(file).name}", digest(path, watch), name_of(known))


def encoder(
    path: str, *, dimension: int | None = None, key: str = "path", watch: Sequence[str] = ()
) -> Callable[[np.ndarray], np.ndarray]:
    """The user's function of an encoder, uint8[b, H, W, C] -> f32[b, D], with its results checked.

    Args:
      path: as `connect`'s. The file is executed.
      dimension: D, if it is known already.
      key: name of the path in errors.
      watch: more files that the function is made of.

    Raises:
      ValueError: see `connect`; or a result of another shape, or that is not finite.
    """
    _, function = load(path, key, watch)

    def rows(images: np.ndarray) -> np.ndarray:
        try:
            result = np.asarray(function(images))
            numeric = result.dtype.kind in "biuf"
        except (OSError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise ValueError(f"{key} {path} failed: {_place(error)}") from error
        wanted = (len(images), dimension or (result.shape + (0, 0))[1])
        if not numeric or result.shape != wanted or not result.size:
            raise ValueError(
                f"{key} {path} returned {result.dtype}{list(result.shape)} for {len(images)}"
                f" images; it must be float32[{len(images)}, {dimension or 'D'}]"
            )
        if not np.isfinite(result).all():
            raise ValueError(f"{key} {path} returned features that are not finite")
        return result.astype(np.float32)

    return rows


def load(
    path: str, key: str = "target.path", watch: Sequence[str] = ()
) -> tuple[str, Callable[[np.ndarray], object]]:
    """(name, function) of the user's; see `connect`. A file is executed once in a process, until it
    or a file of `watch` changes: a large model would not fit into memory twice."""
    file, _, name = path.rpartition(":")
    # Last, so that no file there takes the place of a library; for good, as functions import too.
    beside = str(_source(file, path, key).parent.absolute())
    if file.endswith(".py") and beside not in sys.path:
        sys.path.append(beside)
    return name, _load(file, name, path, key, digest(path, watch, key))


def digest(path: str, watch: Sequence[str] = (), key: str = "target.path") -> str:
    """SHA-256 of the function's file and name, and of the files to watch.

    Raises:
      ValueError: there is no such file.
    """
    file, _, name = path.rpartition(":")
    result = hashlib.sha256(f"{name}\0".encode() + _source(file, path, key).read_bytes())
    for other in watch:
        if not Path(other).is_file():
            raise ValueError(f"{_watch(key)} {other}: no such file")
        result.update(file_digest(other).encode())
    return result.hexdigest()


def _watch(key: str) -> str:
    """The key of the files to watch, beside that of a path: "target.watch", "audit.zero_watch"."""
    return key.removesuffix("path") + "watch" if key.endswith("path") else f"{key}_watch"


def _source(file: str, path: str, key: str) -> Path:
    """The file of a module, or the file itself."""
    if not file:
        raise ValueError(f"{key} {path} must be FILE.py:function or module:function")
    if file.endswith(".py"):
        origin = file
    else:
        if os.getcwd() not in sys.path:  # as `python -m` has it, and the command `qmx` does not
            sys.path.append(os.getcwd())
        try:
            spec = importlib.util.find_spec(file)
        except (ImportError, ValueError):
            spec = None
        origin = (spec and spec.origin) or ""
    if not Path(origin).is_file():
        raise ValueError(
            f"{key} {path}: there is no {'file' if file.endswith('.py') else 'module'} {file}"
        )
    return Path(origin)


def forget() -> None:
    """Execute each file anew at its next use, also where no digest tells that it changed."""
    _load.cache_clear()


@lru_cache(maxsize=4)
def _load(file: str, name: str, path: str, key: str, sha256: str) -> Callable[[np.ndarray], object]:
    del sha256  # another file of this name is executed anew
    try:
        names = (
            runpy.run_path(file) if file.endswith(".py") else vars(importlib.import_module(file))
        )
    except (Exception, SystemExit) as error:
        raise ValueError(f"{key} {path} does not load: {_place(error)}") from error
    function = names.get(name)
    if not callable(function):
        raise ValueError(f"{key} {path}: {file} has no function {name!r}")
    return function


def _place(error: BaseException) -> str:
    """An error of the user's code, with the line where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
