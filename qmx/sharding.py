"""The mesh of devices, and batches and state on it. No other file knows devices.

The mesh has one axis, "data". Batches are split along it; everything else is on every device. XLA
places the collectives. Methods and networks never see a device, and the result does not depend on
the number of devices. With several processes, each runs the same program and holds its rows of each
batch. The first process writes the files, keeps the ledger, and sends its results to the others.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qmx.contract import PyTree
from qmx.terminal import tell

# The launchers' variables for a job's number of processes: SLURM's srun, Open MPI's mpirun. Not
# SLURM_NTASKS, which is also set in an allocation's shell, where there is one process.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# All devices that a process sees. With None jax takes one device, if a launcher started it.
EVERY_DEVICE: tuple[int, ...] = ()
# After this time a silent process counts as dead, and a process that failed stops waiting for the
# others. Both end the whole job. Without errors all processes end within moments.
PATIENCE_SECONDS = 20


class FirstFailed(ValueError):
    """Raised in the other processes with the error of the first."""


def connect(coordinator: str = "", processes: int = 0, index: int = -1) -> None:
    """Join the processes of one job, before any other use of jax.

    Each says what it waits for. Without arguments, jax finds them if SLURM or Open MPI started
    several processes, or in a Kubernetes job (processes -1, needs the package `kubernetes`);
    otherwise there is one process, as there is with `processes` 1 whatever launcher is around it. A
    process uses every device that it sees. But if SLURM or Open MPI started several processes on
    one machine, each uses the GPU of its own number there.

    Args:
      coordinator: HOST:PORT of the first process.
      processes: number of processes.
      index: number of this process.

    Raises:
      ValueError: only some of the three are given.
    """
    if coordinator:
        if processes < 1 or not 0 <= index < processes:
            raise ValueError(
                f"--coordinator={coordinator} needs --processes, 1 and more, and --process, from 0"
                f" on and below it, not {processes} and {index}"
            )
        tell(f"process {index} of {processes} waits for the others at {coordinator}")
        jax.distributed.initialize(
            coordinator,
            processes,
            index,
            EVERY_DEVICE,
            heartbeat_timeout_seconds=PATIENCE_SECONDS,
            shutdown_timeout_seconds=PATIENCE_SECONDS,
        )
    elif processes == 1 and index <= 0:
        pass  # alone, whatever launcher is around it
    elif processes > 0 or index >= 0:
        raise ValueError(
            "--processes and --process need --coordinator=HOST:PORT, the same for all of them"
        )
    elif processes == -1 or (launched := _launched()) > 1:
        if processes != -1:
            tell(
                f"this is one of {launched} processes that a launcher started, and waits for the"
                " others; --processes=1 runs alone"
            )
        jax.distributed.initialize(
            local_device_ids=None if _share_machines() else EVERY_DEVICE,
            heartbeat_timeout_seconds=PATIENCE_SECONDS,
            shutdown_timeout_seconds=PATIENCE_SECONDS,
        )


def _launched() -> int:
    """Number of processes that SLURM or Open MPI started."""
    return max(int(os.environ.get(name, "1")) for name in LAUNCHERS)


def _share_machines() -> bool:
    """True if SLURM or Open MPI started several of this job's processes on one machine."""
    counts = {
        name: int(os.environ.get(name, "1"))
        for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "OMPI_COMM_WORLD_LOCAL_SIZE")
    }
    return (
        counts["SLURM_STEP_NUM_TASKS"] > counts["SLURM_STEP_NUM_NODES"]
        or counts["OMPI_COMM_WORLD_LOCAL_SIZE"] > 1
    )


def first() -> bool:
    """True in the process that writes; always true if there is only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def rows_here(batch_size: int) -> slice:
    """This process's rows of a global batch: a block, so that processes do not change the order."""
    local = batch_size // jax.process_count()
    return slice(local * jax.process_index(), local * (jax.process_index() + 1))


def any_process(flag: bool) -> bool:
    """True if `flag` is true in some process; all processes must call it at the same place."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.any(process_allgather(np.array(flag))))


def from_first(make: Callable[[], Any]) -> Any:
    """Give every process what `make`, run in the first one alone, returns: JSON or one array.

    Raises:
      FirstFailed: in the others, where `make` raised in the first.
    """
    if jax.process_count() == 1:
        return make()
    value: Any = None
    failed = None
    if first():
        try:
            value = make()
        except Exception as error:  # the others need to know, or would wait for ever
            failed = error
    is_array = isinstance(value, np.ndarray)
    head = {
        "failed": None if failed is None else str(failed),
        "array": [value.dtype.str, value.shape] if is_array else None,
        "json": None if is_array else value,
    }
    head = json.loads(_bytes_from_first(json.dumps(head).encode()))
    if failed is not None:
        raise failed
    if head["failed"] is not None:
        raise FirstFailed(head["failed"])
    if head["array"]:
        dtype, shape = head["array"]
        payload = np.ascontiguousarray(value).tobytes() if is_array else b""
        return np.frombuffer(_bytes_from_first(payload), dtype).reshape(shape)
    return head["json"]


def _bytes_from_first(payload: bytes) -> bytes:
    from jax.experimental.multihost_utils import broadcast_one_to_all

    # The size in two parts: jax has no 64-bit numbers by default, and scores may exceed 2 GiB.
    high, low = broadcast_one_to_all(np.array(divmod(len(payload), 1 << 30), np.int32))
    size = (int(high) << 30) + int(low)
    whole = np.frombuffer(payload, np.uint8) if first() else np.zeros(size, np.uint8)
    step = 1 << 28  # a quarter of a GiB at a time on the devices
    parts = [np.asarray(broadcast_one_to_all(whole[at : at + step])) for at in range(0, size, step)]
    return b"".join(part.astype(np.uint8).tobytes() for part in parts)


def gathered(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, in the order of the processes, each with equally many."""
    if jax.process_count() == 1:
        return rows
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(rows, tiled=True))


@cache
def mesh() -> Mesh:
    """One axis "data" over all devices of all processes."""
    # Auto, because the default, Explicit, refuses reshapes that split the sharded batch.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def put_batch(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Put this process's rows of a batch into the global batch, split over the devices.

    Raises:
      ValueError: the rows of all processes do not divide over the devices.
    """
    for name, rows in batch.items():
        check_batch(len(rows) * jax.process_count(), f"{name}: a batch of")
    return _put(batch, NamedSharding(mesh(), PartitionSpec("data")))


def put_ids(ids: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Put row numbers, the same i[T, B] in every process, as i32 with axis B split over devices."""
    here = {
        name: np.ascontiguousarray(rows[:, rows_here(rows.shape[1])], np.int32)
        for name, rows in ids.items()
    }
    return _put(here, NamedSharding(mesh(), PartitionSpec(None, "data")))


def put_whole(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Put arrays, the same in every process, on every device."""
    return _put(arrays, everywhere())


def _put(here: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Global arrays from this process's parts of them."""
    return {
        name: jax.make_array_from_process_local_data(sharding, part) for name, part in here.items()
    }


# Share of a device's free memory that a data set may take; a step's activations need the rest.
SHARE_OF_MEMORY = 0.25


def fits_everywhere(nbytes: int) -> bool:
    """True if `nbytes` is at most `SHARE_OF_MEMORY` of the free memory of every device."""

    def free(device: jax.Device) -> int:
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            return stats["bytes_limit"] - stats["bytes_in_use"]
        # A CPU's devices share the machine's memory.
        return (
            os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
        )

    return not any_process(nbytes > SHARE_OF_MEMORY * min(map(free, jax.local_devices())))


def everywhere() -> NamedSharding:
    """Sharding of arrays that are whole on every device."""
    return NamedSharding(mesh(), PartitionSpec())


def put_state(tree: PyTree) -> PyTree:
    """Copy a tree to every device, in buffers of its own, because the step donates them."""

    def put(x: jax.Array) -> jax.Array:
        # With several processes device_put refuses a key, but takes its data.
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                put(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        # A copy first: with several devices, device_put always keeps the caller's buffer.
        return jax.device_put(jnp.array(x, copy=True), everywhere())

    return jax.tree.map(put, tree)


def enlarged(batch_size: int) -> int:
    """The smallest batch from this size on that divides over the devices."""
    return -(-batch_size // jax.device_count()) * jax.device_count()


def check_batch(batch_size: int, name: str) -> None:
    """Raise ValueError unless a global batch of `batch_size` divides over the devices."""
    devices = jax.device_count()
    if batch_size % devices:
        below, above = batch_size // devices * devices, enlarged(batch_size)
        raise ValueError(
            f"{name} {batch_size} does not divide over {devices} devices; "
            f"use {f'{below} or {above}' if below else above}"
        )
