"""Files that are whole or absent, and readers that name the file in their errors."""

import hashlib
import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

SUMS = "SHA256SUMS"  # `sha256sum -c` reads it
SEAL = "sum"  # key of a sum in a JSON file that has no such file beside it


class Unreadable(ValueError):
    """Raised for a file of a workdir that is missing, or is not as it was written."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, also after a kill.

    Raises:
      OSError: no space or no permission; names the file. No part of the new file is left.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text."""
    write_bytes(path, text.encode())


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """`write_bytes` of arrays by name, as numpy's npz."""
    file = BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    write_bytes(path, file.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a `write_arrays` file by name; nothing in it is executed.

    Raises:
      Unreadable: see `check_file`.
    """
    check_file(path)
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON; keys in the order given, floats exactly."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      Unreadable: it is missing, or holds no such thing.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Unreadable(f"{path} is missing") from None
    except ValueError as error:  # not UTF-8, not JSON
        raise Unreadable(f"{path} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise Unreadable(f"{path} cannot be read (it holds no JSON object)")
    return value


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """`write_json` with a sum of its own in it, for a file outside the stages' directories."""
    write_json(path, {**value, SEAL: _seal(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The object of a `write_sealed` file; of a file without a sum, as it is.

    Raises:
      Unreadable: it is missing, or is not as it was written.
    """
    value = read_json(path)
    seal = value.pop(SEAL, None)
    if seal not in (None, _seal(value)):
        raise Unreadable(f"{path} is not as it was written")
    return value


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_sums(directory: Path, names: list[str], file: str = SUMS) -> None:
    """Write down the SHA-256 of files of a directory, for `check_file`, which reads `SUMS`."""
    write_text(directory / file, "".join(f"{_sum(directory / name)}  {name}\n" for name in names))


def read_sums(directory: Path) -> dict[str, str]:
    """Read the file of `write_sums`: SHA-256 by name; nothing if there is no such file."""
    path = directory / SUMS
    if not path.exists():
        return {}
    lines = path.read_text(errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def check_file(path: Path) -> None:
    """Raise Unreadable unless a file is as it was when its directory's sums were written."""
    wanted = read_sums(path.parent).get(path.name)
    if not path.exists():
        raise Unreadable(f"{path} is missing")
    if wanted and _sum(path) != wanted:
        raise Unreadable(f"{path} is not as it was written")


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
