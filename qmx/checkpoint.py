"""Saving and restoring: a run's whole state while it trains (orbax), weights when it is done.

Orbax writes a step beside the others and renames it, so a kill leaves the older ones whole; it has
no checksums, casts silently, counts any directory with a number for a name as a step, and refuses
to save an older step than the newest. Hence the digests of all leaves beside the state, and a
restore that goes from the newest to the first good one and removes what it passed over.
"""

import errno
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from shutil import disk_usage
from typing import Any, Self

import jax
import numpy as np

from qmx.contract import PyTree, by_path, check_shapes
from qmx.sharding import first
from qmx.train import TrainState

log = logging.getLogger(__name__)


def leaf_digests(tree: PyTree) -> dict[str, str]:
    """dtype, shape and SHA-256 of the bytes of every leaf, by its path."""

    def digest(leaf: Any) -> str:
        # No copy; bfloat16 has no buffer of its own.
        data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        return f"{leaf.dtype} {leaf.shape} {hashlib.sha256(data.data).hexdigest()}"

    leaves = by_path(tree)
    with ThreadPoolExecutor() as hashing:  # which leaves Python to the others
        return dict(zip(leaves, hashing.map(digest, leaves.values()), strict=True))


# What passes: too many open files, no memory, no right, an answer that a file server did not give.
PASSING = ("EMFILE", "ENFILE", "ENOMEM", "EACCES", "EPERM", "EIO", "ESTALE", "ETIMEDOUT")


def of_the_machine(error: Exception) -> bool:
    """True for an error that says nothing of the file that was read: a checkpoint behind it may be
    good."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return True
    numbers = [getattr(errno, name) for name in PASSING if hasattr(errno, name)]
    # Libraries in C++ give the system's words and no number.
    said = any(os.strerror(number) in str(error) for number in numbers)
    return said or (isinstance(error, OSError) and error.errno in numbers)


class Checkpoints:
    """The last few states of one run, in a directory of their own; a context that ends when all is
    on the disk.

    Args:
      directory: made at the first save.
      keep: how many to keep.
    """

    def __init__(self, directory: Path | str, keep: int = 2):
        self.directory, self.keep = Path(directory).absolute(), keep
        self._manager: Any = None

    def save(self, ts: TrainState) -> None:
        """Write a state under its step: returns when it is copied, so that it may be donated, and
        writes meanwhile.

        What goes wrong while it writes is raised by the next call, or at the end of the context.
        """
        import orbax.checkpoint as ocp  # 2.4 s

        step, bytes_needed = int(ts.step), sum(leaf.nbytes for leaf in jax.tree.leaves(ts))
        free = disk_usage(self.directory.parent).free
        if free < bytes_needed:  # orbax would say it in a page for each array
            raise OSError(
                f"{self.directory}: no room for a state of {bytes_needed} bytes, {free} are free;"
                " make room, and the same command goes on"
            )
        with self._explained():
            saved = self._open().save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(ts),
                    meta=ocp.args.JsonSave({"digests": leaf_digests(ts)}),
                ),
            )
        if not saved:
            raise OSError(
                f"{self.directory}: step {step} was not saved, for the newest there is"
                f" {self.newest()}"
            )

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest good state, in the shapes and shardings of `like`; None if there is none.

        A checkpoint that cannot be read, or whose bytes are not those that were written, is named
        in a warning, removed, and the one before it taken. Where the machine could not read it, as
        without memory, the error is raised and nothing is removed.

        Raises:
          ValueError: a whole checkpoint is of another tree than `like`, as of another network or
            optimiser; it stays.
        """
        if not self.directory.is_dir():
            return None
        import orbax.checkpoint as ocp

        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        as_target = ocp.checkpoint_utils.construct_restore_args(target)
        wanted = {name: f"{leaf.dtype} {leaf.shape}" for name, leaf in by_path(like).items()}
        for step in sorted(self._open().all_steps(), reverse=True):
            self._refuse_others(step, wanted)
            try:
                found = self._open().restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeRestore(target, restore_args=as_target),
                        meta=ocp.args.JsonRestore(),
                    ),
                )
                if leaf_digests(found["state"]) == found["meta"]["digests"]:
                    return found["state"]
                reason = "its bytes are not those that were saved"
            except Exception as error:  # orbax raises bare Exceptions for damaged files
                if of_the_machine(error):
                    raise
                reason = str(error).splitlines()[0][:200]
            log.warning(
                "checkpoint %s is damaged and passed over: %s", self.directory / str(step), reason
            )
            self._open().delete(step)
        return None

    def _refuse_others(self, step: int, wanted: dict[str, str]) -> None:
        """Raise ValueError if a checkpoint says that its leaves are not the wanted ones, by path
        ("dtype shape"). What cannot be read says nothing."""
        import orbax.checkpoint as ocp

        try:
            meta = self._open().restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
                "meta"
            ]
            there = {name: text.rpartition(" ")[0] for name, text in meta["digests"].items()}
        except Exception:
            return
        other = sorted(
            name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name)
        )
        if other:
            name = other[0]
            raise ValueError(
                f"checkpoint {self.directory / str(step)} is of another state, in {len(other)}"
                f" leaves: {name} is {there.get(name, 'absent')} there and"
                f" {wanted.get(name, 'absent')} here; take another directory, or the network and"
                " optimiser that it was saved with"
            )

    def newest(self) -> Path | None:
        """The last state that was saved, or is being saved."""
        step = self._open().latest_step() if self.directory.is_dir() else None
        return None if step is None else self.directory / str(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager is not None:
            try:
                with self._explained():
                    self._manager.wait_until_finished()
            finally:
                self._manager.close()
                self._manager = None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise the errors of a save as OSError, without the address of every array."""
        try:
            yield
        except Exception as error:  # of many kinds: orbax's, tensorstore's, the system's
            reason = str(error).rpartition('": ')[2]
            raise OSError(f"{self.directory}: a state could not be saved: {reason}") from error

    def _open(self) -> Any:
        if self._manager is None:
            import orbax.checkpoint as ocp

            _hush()
            # Weights hardly shrink, and zstd would take a quarter of what a save costs the steps
            # beside it.
            state = ocp.PyTreeCheckpointHandler(use_compression=False)
            handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
            handlers.add("state", ocp.args.PyTreeSave, state)
            handlers.add("state", ocp.args.PyTreeRestore, state)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep, cleanup_tmp_directories=True
            )
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, handler_registry=handlers
            )
        return self._manager


@cache
def _hush() -> None:
    """Keep orbax and tensorstore from a page of output per save or per unwritten array; others'
    lines in the same logs stay."""

    def of_others(record: logging.LogRecord) -> bool:
        # What these two say goes by the path of a file of theirs, or shows it.
        said = f"{record.pathname} {record.getMessage()} {record.exc_info}"
        return record.levelno >= logging.CRITICAL or not re.search("orbax|tensorstore|zarr", said)

    for noisy in ("absl", "asyncio"):
        logging.getLogger(noisy).addFilter(of_others)
    told = sys.unraisablehook

    # a failed save closes its event loop, and then other arrays report to it.
    def hook(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            told(what)

    sys.unraisablehook = hook


def save_weights(path: Path, tree: PyTree, facts: dict[str, Any] | None = None) -> str:
    """Write a tree as safetensors, whole or not at all, in the first process; returns its
    `weights_digest`.

    Args:
      facts: JSON about the weights, into the file's metadata; see `qmx.encoders.load_encoder`.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if not first():
        return weights_digest(tree)
    # safetensors 0.8 writes strided arrays scrambled, so copies in C order.
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in by_path(tree).items()}
    part = path.with_suffix(".part")
    try:
        save_file(arrays, part, {"qmx": json.dumps(facts)} if facts else None)
        umask = os.umask(0)  # which Python tells in no other way
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # safetensors lets nobody else read
        with open(part, "rb") as file:  # what it was trained from is removed after this
            os.fsync(file.fileno())
        part.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    return weights_digest(tree)


def load_weights(path: Path, like: PyTree) -> PyTree:
    """The tree that `save_weights` wrote, as numpy arrays in the structure of `like`.

    Raises:
      ValueError: a leaf is missing, left over, or of another shape; all of them are listed.
    """
    from safetensors.numpy import load_file

    arrays = load_file(path)
    check_shapes(arrays, by_path(like), str(path))
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in by_path(like)])


def weights_digest(tree: PyTree) -> str:
    """One SHA-256 over all names, shapes, dtypes and bytes of a tree."""
    return hashlib.sha256(repr(sorted(leaf_digests(tree).items())).encode()).hexdigest()


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes; read once as long as its size and time of change stay."""
    found = os.stat(path)
    return _file_digest(str(path), found.st_size, found.st_mtime_ns)


@cache
def _file_digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
