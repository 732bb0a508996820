"""Files of a run: stages are done once, and a file is whole or absent."""

import json
import os
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

import qmx
from qmx.sharding import from_first


class Mismatch(ValueError):
    """Raised for a workdir of another config or another version of qmx."""


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
    """Read the arrays of a `write_arrays` file by name; nothing in it is executed."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON; keys in the order given, floats exactly."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Differences of two JSON values, as "key: old value there, new value now"."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in differences(
                old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key
            )
        ]
    return [] if old == new else [f"{prefix}: {json.dumps(old)} there, {json.dumps(new)} now"]


class NotDone(ValueError):
    """Raised where a stage has no result of these inputs, and this call must not run it."""


def stage(
    directory: Path,
    inputs: dict,
    run: Callable[[], dict],
    say: Callable[[str], None],
    refuse: str | None = None,
) -> dict:
    """Return the result of a stage: from the disk if it has the same inputs, else a new one.

    Args:
      directory: the stage's own; `run` writes its files there.
      inputs: JSON of everything that the result depends on: the config's part, digests of the files
        that are read. qmx's version is added.
      run: does the work and returns JSON.
      say: gets a message when an old result is thrown away, with the reason.
      refuse: if not None, the reason why `run` must not be called.

    Returns:
      The result of `run`. It is written last, so a killed stage never counts as done. The files of
      a killed stage are kept if the inputs are still the same, so that the stage can go on.

    Raises:
      NotDone: there is no result of these inputs, and `refuse` is not None.
    """
    inputs = json.loads(json.dumps({"qmx": qmx.__version__, **inputs}))
    begun, done = directory / "inputs.json", directory / "result.json"

    def find() -> dict | None:
        changed = (
            differences(json.loads(begun.read_text()), inputs)
            if begun.exists()
            else ["it was never begun"]
        )
        if not changed and done.exists():
            return json.loads(done.read_text())
        if refuse:
            return None
        if changed:
            if done.exists():
                say(f"{directory.name} is done again, because {changed[0]}")
            # This removes the checkpoints of a run with other inputs too.
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(begun, inputs)
        return None

    known = from_first(find)
    if known is not None:
        return known
    if refuse:
        raise NotDone(refuse)
    result = run()

    def finish() -> dict:
        write_json(done, result)
        return json.loads(json.dumps(result))

    return from_first(finish)


def stages_version(workdir: Path) -> str | None:
    """Version of qmx in a workdir's stages, rather another than this one; None if no stages.

    qmx 0.1 wrote its version nowhere else.
    """
    versions = [
        json.loads(path.read_text()).get("qmx", "0.1")
        for depth in ("*", "*/*")
        for path in sorted(workdir.glob(f"{depth}/inputs.json"))
    ]
    return ([name for name in versions if name != qmx.__version__] or versions or [None])[0]


def claim(workdir: Path, config: dict, update: bool) -> None:
    """Mark a workdir with this config and version, or refuse one of others.

    Raises:
      Mismatch: the config or qmx's version differs from the one in the workdir, and `update` is
        false. It names the versions, or the first key, and the way to go on.
    """
    config = json.loads(json.dumps({"qmx": qmx.__version__, **config}))
    path = workdir / "config.json"

    def write() -> None:
        old = json.loads(path.read_text()) if path.exists() else {}
        version = old.pop("qmx", None) or stages_version(workdir)
        if version not in (None, qmx.__version__) and not update:
            raise Mismatch(
                f"{workdir} was made by qmx {version}, and this is qmx {qmx.__version__}; take"
                " another --workdir, or give --update to keep the ledger's answers and do the"
                " stages again"
            )
        if old and not update:
            changed = differences({"qmx": qmx.__version__, **old}, config)
            if changed:
                more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
                raise Mismatch(
                    f"{workdir} was made with another config: {changed[0]}{more}; take another"
                    " --workdir, or give --update to keep the stages that still fit and do the"
                    " others again"
                )
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, config)

    from_first(write)
