"""The order in which images reach the device: batch k is a pure function of (seed, k).

No iterator state is ever saved. A run that starts at step k, on any number of processes and
threads, sees the batches that an undisturbed run sees from step k on.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import jax
import numpy as np

from qmx.contract import Rows
from qmx.data.sources import Source
from qmx.sharding import fits_everywhere, put_batch, put_ids, put_whole, rows_here


def epoch_steps(size: int, batch_size: int, drop_last: bool) -> float:
    """Steps in one epoch: size / batch, or whole steps if the last, smaller batch is dropped."""
    return size // batch_size if drop_last else size / batch_size


BESIDE = (1,)  # the stream of the examples that come beside a source's own


@lru_cache(maxsize=8)
def _epoch_order(size: int, seed: int, epoch: int, stream: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(
        np.random.SeedSequence(seed, spawn_key=(epoch, *stream))
    ).permutation(size)


def batch_ids(
    size: int, batch_size: int, seed: int, k: int, drop_last: bool, stream: tuple[int, ...] = ()
) -> np.ndarray:
    """The examples of batch k, i64[batch_size].

    Each epoch is a fresh shuffle. With `drop_last` an epoch's remainder is left out. Without it a
    batch may reach into the next epoch, and a set smaller than a batch is repeated in each. Each
    `stream` is another order.
    """
    length = size - size % batch_size if drop_last else size
    position = k * batch_size
    ids = []
    missing = batch_size
    while missing:
        epoch, offset = divmod(position, length)
        part = _epoch_order(size, seed, epoch, stream)[offset : min(offset + missing, length)]
        ids.append(part)
        position += len(part)
        missing -= len(part)
    return np.concatenate(ids)


class _Batches:
    """This process's rows of batches by number, as a random-access source for grain."""

    def __init__(self, source: Source, batch_size: int, steps: int, seed: int, drop_last: bool):
        self.source, self.batch_size, self.steps, self.seed, self.drop_last = (
            source,
            batch_size,
            steps,
            seed,
            drop_last,
        )

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        batch, beside = self.read(self.source, self.batch_size, k), self.source.beside
        if beside:
            more = self.read(beside.source, self.batch_size * beside.ratio, k, BESIDE)
            batch |= {f"pool_{name}": rows for name, rows in more.items()}
        return batch

    def read(
        self, source: Source, size: int, k: int, stream: tuple[int, ...] = ()
    ) -> dict[str, np.ndarray]:
        # A block of rows, so that the global order does not depend on the number of processes:
        # groups of statistics and the queue go by position.
        ids = batch_ids(source.size, size, self.seed, k, self.drop_last, stream)
        return source.read(ids[rows_here(size)])


def batches(
    source: Source,
    batch_size: int,
    *,
    steps: int,
    seed: int,
    start: int = 0,
    drop_last: bool = False,
    threads: int = 2,
) -> Iterator[dict[str, jax.Array]]:
    """Batches `start` .. `steps` - 1, read ahead in threads and put on the devices.

    Args:
      source: it is read once for each batch. The examples `beside` it come too, `ratio` times the
        batch, under the same names with "pool_" before them.
      batch_size: global, of the source's own examples.
      steps: number of the last batch plus one.
      seed: of the order.
      drop_last: see `batch_ids`; needs a batch no larger than the source.

    Raises:
      ValueError: `drop_last` with a batch larger than the source.
    """
    _refuse_larger(source, batch_size, drop_last)
    import grain  # 1.4 s, and not on every machine that only trains on arrays of its own

    examples = grain.MapDataset.source(_Batches(source, batch_size, steps, seed, drop_last))[start:]
    # An element is a whole batch, so a short buffer hides the reading; the default holds 500.
    ahead = examples.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4))
    return map(put_batch, ahead)


def steps_at_once() -> int:
    """Steps in one dispatch.

    One on CPUs, where XLA's convolutions are slow in a loop (benchmarks/README.md, "Batches from
    the device"); elsewhere enough to make dispatches cheap. A stop signal waits for all of them.
    """
    return 1 if jax.default_backend() == "cpu" else 32


def feed(
    source: Source,
    batch_size: int,
    *,
    steps: int,
    seed: int,
    start: int = 0,
    drop_last: bool = False,
    at_once: int | None = None,
) -> Iterator[dict[str, jax.Array] | Rows]:
    """The batches of `batches`, from the devices if the source fits there, else from the host.

    For `qmx.train.fit`. If the source is in memory and `qmx.sharding.fits_everywhere`, every device
    holds it, and a batch is row numbers: `at_once` batches, by default `steps_at_once()`, come as
    one `Rows`. The other arguments and the errors are those of `batches`.
    """
    parts = {"": (source, 1)} | (
        {"pool_": (source.beside.source, source.beside.ratio)} if source.beside else {}
    )
    held = {prefix: part.held for prefix, (part, _) in parts.items() if part.held}
    if len(held) < len(parts) or not fits_everywhere(
        sum(array.nbytes for arrays, _ in held.values() for array in arrays.values())
    ):
        yield from batches(
            source, batch_size, steps=steps, seed=seed, start=start, drop_last=drop_last
        )
        return
    _refuse_larger(source, batch_size, drop_last)
    tables = {prefix: put_whole(arrays) for prefix, (arrays, _) in held.items()}
    most = at_once or steps_at_once()

    def rows_of(prefix: str, k: int) -> np.ndarray:
        part, ratio = parts[prefix]
        stream = BESIDE if prefix else ()
        return held[prefix].rows[
            batch_ids(part.size, batch_size * ratio, seed, k, drop_last, stream)
        ]

    for first in range(start, steps, most):
        # The last batch is repeated at the end, so that the shape is always the same.
        numbers = [min(first + place, steps - 1) for place in range(most)]
        ids = {prefix: np.stack([rows_of(prefix, k) for k in numbers]) for prefix in parts}
        yield Rows(tables, put_ids(ids), np.int32(min(most, steps - first)))


def _refuse_larger(source: Source, batch_size: int, drop_last: bool) -> None:
    if drop_last and batch_size > source.size:
        raise ValueError(
            f"batch_size {batch_size} is larger than the {source.size} images to train on"
        )


def ahead(
    read: Callable[[np.ndarray], np.ndarray], ids: np.ndarray, size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number done, rows) of read(ids) in chunks of `size`; a thread reads the next one."""
    chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(read, chunks[0]) if chunks else None
        done = 0
        for place, chunk in enumerate(chunks):
            assert waiting is not None
            rows = waiting.result()
            if place + 1 < len(chunks):
                waiting = reader.submit(read, chunks[place + 1])
            done += len(chunk)
            yield done, rows
