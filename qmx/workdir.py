"""The directory of a run: one process works in it, and its stages are done once."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import qmx
from qmx.board import NAME
from qmx.files import SUMS, Unreadable, check_file, read_json, read_sums, write_json, write_sums
from qmx.sharding import from_first

# Files of a stage that are for people: no stage reads another's.
FOR_PEOPLE = ("metrics.jsonl", NAME)
CONFIG = "config.json"  # what the workdir was made with
LONG = 60  # seconds; work that took longer is thrown away only where the user says so


class Mismatch(ValueError):
    """Raised for a workdir of another config or version of qmx, or of other data."""


class NotDone(ValueError):
    """Raised where a stage has no result of these inputs, and this call must not run it."""


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep other processes of this machine out of a workdir; any death of ours lets them in.

    The lock is `flock` on a file of the workdir. On a network file system other machines see it
    where the system passes such locks on (NFS 4 does; Lustre if it is mounted with `flock`); where
    it has none, the user is left to take care.

    Raises:
      Mismatch: somebody else holds it; nothing was changed.
    """

    def take() -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        file = os.open(workdir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        held.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(file, 200).decode(errors="replace").strip() or "another process"
            raise Mismatch(
                f"{who} works in {workdir}; wait until it has ended, or take another --workdir"
            ) from None
        except OSError:  # no such locks on this file system
            return
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    held: list[int] = []
    try:
        from_first(take)
        yield
    finally:
        for file in held:
            os.close(file)


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


def stage(
    directory: Path,
    inputs: dict,
    run: Callable[[], dict],
    say: Callable[[str], None],
    *,
    refuse: str | None = None,
    update: bool = False,
    lacking: Callable[[], str | None] = lambda: None,
) -> dict:
    """Return the result of a stage: from the disk if it has the same inputs, else a new one.

    Args:
      directory: the stage's own; `run` writes its files there. What it needs to go on after a kill
        is in `checkpoints`, which is removed when the stage is done.
      inputs: JSON of everything that the result depends on: the config's part, digests of the files
        that are read. qmx's version is added.
      run: does the work and returns JSON.
      say: gets a message when an old result is thrown away, with the reason.
      refuse: if not None, the reason why `run` must not be called.
      update: old work may be thrown away, however long it took.
      lacking: says what a result that was found lacks outside its directory, if anything; then the
        stage runs again on top of what is there.

    Returns:
      The result of `run`. The sums of its files are written last, so a killed stage never counts as
      done. The files of a killed stage are kept if the inputs are still the same, so that the stage
      can go on.

    Raises:
      NotDone: there is no result of these inputs, and `refuse` is not None.
      Mismatch: more than a minute of work is there and would be thrown away, and `update` is false.
    """
    inputs = json.loads(json.dumps({"qmx": qmx.__version__, **inputs}))

    def find() -> dict | None:
        reason = _unlike(directory, inputs)
        try:
            if not reason and (directory / SUMS).exists():
                # Who may not run it again looks at the other files when it reads them.
                for name in ["result.json"] if refuse else read_sums(directory):
                    check_file(directory / name)
                result = read_json(directory / "result.json")
                if refuse or not (missing := lacking()):
                    return result
                say(f"{directory.name} is done again, because {missing}")
        except Unreadable as error:
            reason = str(error)
        if refuse:
            return None
        if reason and directory.exists():
            seconds = _seconds(directory)
            if seconds > LONG and not update:
                raise Mismatch(
                    f"{directory} would be done again, because {reason}; it took {_long(seconds)}."
                    " --update throws that away, another --workdir keeps it"
                )
            if any((directory / name).exists() for name in (SUMS, "result.json")):
                say(f"{directory.name} is done again, because {reason}")
            # This removes the checkpoints of a run with other inputs too.
            shutil.rmtree(directory, ignore_errors=True)
        (directory / SUMS).unlink(missing_ok=True)
        if not (directory / "inputs.json").exists():
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / "inputs.json", inputs)
        return None

    known = from_first(find)
    if known is not None:
        return known
    if refuse:
        raise NotDone(refuse)
    result = run()

    def finish() -> dict:
        write_json(directory / "result.json", result)
        files = sorted(path.name for path in directory.iterdir() if path.is_file())
        write_sums(directory, [name for name in files if name not in FOR_PEOPLE])
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        return json.loads(json.dumps(result))

    return from_first(finish)


def _unlike(directory: Path, inputs: dict) -> str | None:
    """Why a stage's directory is not of these inputs; None if it is."""
    try:
        check_file(directory / "inputs.json")
        changed = differences(read_json(directory / "inputs.json"), inputs)
    except Unreadable as error:
        return str(error)
    return changed[0] if changed else None


def _seconds(directory: Path) -> float:
    """Seconds from the beginning of a stage to its end, or to its last checkpoint."""
    ends = [directory / SUMS, *directory.glob("checkpoints/*")]
    times = [path.stat().st_mtime for path in [directory / "inputs.json", *ends] if path.exists()]
    return max(times) - min(times) if times else 0.0


def _long(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def stages_version(workdir: Path) -> str | None:
    """Version of qmx in a workdir's stages, rather another than this one; None if no stages.

    qmx 0.1 wrote its version nowhere else.
    """
    versions = []
    for depth in ("*", "*/*"):
        for path in sorted(workdir.glob(f"{depth}/inputs.json")):
            try:
                versions.append(read_json(path).get("qmx", "0.1"))
            except Unreadable:
                continue  # the stage says so
    return ([name for name in versions if name != qmx.__version__] or versions or [None])[0]


def changed_keys(workdir: Path, config: dict, free: Container[str] = ()) -> list[str]:
    """Lines on the keys, without those of `free`, that a workdir's config has otherwise, or its
    version of qmx.

    Raises:
      Unreadable: there is no config, or not a whole one.
    """
    there, here = ({"qmx": qmx.__version__, **x} for x in (read_json(workdir / CONFIG), config))
    changed = differences(there, json.loads(json.dumps(here)))
    return [line for line in changed if line.partition(":")[0] not in free]


def claim(
    workdir: Path,
    config: dict,
    update: bool,
    say: Callable[[str], None] = print,
    free: Container[str] = (),
) -> None:
    """Mark a workdir with this config and version, or refuse one of others.

    Args:
      say: gets a message if the config that was there cannot be read; then the stages tell by their
        inputs what still fits.
      free: keys that may differ, for no result depends on them.

    Raises:
      Mismatch: the config or qmx's version differs from the one in the workdir, and `update` is
        false. It names the versions, or the first key, and the way to go on.
    """
    path = workdir / CONFIG

    def write() -> None:
        old, changed = {}, []
        try:
            if path.exists():
                old, changed = read_json(path), changed_keys(workdir, config, free)
        except Unreadable as error:
            say(f"{error}; it is written anew")
        version = old.get("qmx") or stages_version(workdir)
        if version not in (None, qmx.__version__) and not update:
            raise Mismatch(
                f"{workdir} was made by qmx {version}, and this is qmx {qmx.__version__}; take"
                " another --workdir, or give --update to keep the ledger's answers and do the"
                " stages again"
            )
        if changed and not update:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise Mismatch(
                f"{workdir} was made with another config, says {path.name}: {changed[0]}{more};"
                " give --update to keep the answers and the stages that still fit and do the others"
                " again, or take another --workdir, which asks the target everything"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, {"qmx": qmx.__version__, **config})

    from_first(write)
