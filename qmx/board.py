"""Event files for TensorBoard: the metrics of a training, step by step."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

NAME = "events.out.tfevents.qmx"  # TensorBoard reads files that have "tfevents" in their names
PACKAGE = "tensorboardX"
FLUSH_SECONDS = 10
FIRST = "brain.Event:2"  # the version of the format, which the first record tells


def problem() -> str | None:
    """A line if event files cannot be written here; None if they can."""
    if find_spec(PACKAGE):
        return None
    return f"tensorboard needs {PACKAGE}: pip install 'qmx[tensorboard]'"


@contextmanager
def drawn(log: Path) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Yield a function of (steps done, metrics) that adds their scalars to the event file beside a
    log of metrics.

    The file is made anew of the steps in the log, so that the two hold the same ones, each once,
    after a kill too. TensorBoard may read it meanwhile.

    Args:
      log: metrics.jsonl, cut to the steps that the training goes on from.
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    writer, flushed = RecordWriter(str(log.with_name(NAME))), time.monotonic()

    def write(**record: object) -> None:
        writer.write(Event(wall_time=time.time(), **record).SerializeToString())

    def add(step: int, metrics: dict[str, float]) -> None:
        nonlocal flushed
        values = [Summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
        write(step=step, summary=Summary(value=values))
        if time.monotonic() - flushed > FLUSH_SECONDS:  # it waits for the disk
            writer.flush()
            flushed = time.monotonic()

    try:
        write(file_version=FIRST)
        for line in log.read_text().splitlines():
            metrics = json.loads(line)
            add(metrics.pop("step"), metrics)
        yield add
    finally:
        writer.close()
