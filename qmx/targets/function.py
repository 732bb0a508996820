"""A target that is a Python function of the user's."""

import hashlib
import importlib.util
import runpy
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qmx.ledger.access import received
from qmx.targets.query import Outside


def connect(path: str, *, classes: int, access: str = "logits") -> Outside:
    """A query function around a function of the user's, uint8[b, H, W, C] -> numbers [b, N].

    It may raise `qmx.ledger.Unavailable` to be called again, with the seconds to wait.

    The digest stands for the file and the function's name. It is part of the ledger's keys: a
    changed file is another target and everything is asked again, while what the function reads
    elsewhere (weights, other modules) may change and it is taken for the same target.

    Args:
      path: "FILE.py:function" or "module:function". The file is executed.
      classes: N.
      access: level of what it returns, "logits", "probs" or "label"; see
        `qmx.ledger.access.received`.

    Raises:
      ValueError: there is no such file or function, or it cannot be loaded. By the query: the
        function raised anything but an OSError, or returned what is no answer of that level.
    """
    file, _, name = path.rpartition(":")
    _source(file, path)
    function = _load(file, name, path)

    def query(images: np.ndarray) -> np.ndarray:
        try:
            answer = np.asarray(function(images))
            numeric = answer.dtype.kind in "biuf"
        except OSError:  # Unavailable is one
            raise
        except Exception as error:
            raise ValueError(f"target.path {path} failed: {_place(error)}") from error
        if not numeric:
            raise ValueError(f"target.path {path} returned {answer.dtype}, and it must be numbers")
        return received(answer, len(images), classes, access)

    return Outside(query, f"{name} of {Path(file).name}", digest(path))


def digest(path: str) -> str:
    """SHA-256 of the function's file and name. Raises ValueError if there is no such file."""
    file, _, name = path.rpartition(":")
    return hashlib.sha256(f"{name}\0".encode() + _source(file, path).read_bytes()).hexdigest()


def _source(file: str, path: str) -> Path:
    """The file of a module, or the file itself."""
    if not file:
        raise ValueError(f"target.path {path} must be FILE.py:function or module:function")
    if file.endswith(".py"):
        found = file
    else:
        try:
            spec = importlib.util.find_spec(file)
        except (ImportError, ValueError):
            spec = None
        found = (spec and spec.origin) or ""
    if not Path(found).is_file():
        raise ValueError(
            f"target.path {path}: there is no {'file' if file.endswith('.py') else 'module'} {file}"
        )
    return Path(found)


def _load(file: str, name: str, path: str) -> Callable[[np.ndarray], object]:
    try:
        found = (
            runpy.run_path(file) if file.endswith(".py") else vars(importlib.import_module(file))
        )
    except Exception as error:
        raise ValueError(f"target.path {path} does not load: {_place(error)}") from error
    function = found.get(name)
    if not callable(function):
        raise ValueError(f"target.path {path}: {file} has no function {name!r}")
    return function


def _place(error: Exception) -> str:
    """An error of somebody else's code, with the line that it came from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
