"""One training run in a directory: its progress, its metrics, its checkpoints, and going on from
them."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax

from qmx.board import drawn
from qmx.checkpoint import Checkpoints
from qmx.contract import Rows
from qmx.data import Source
from qmx.data.batches import feed
from qmx.files import write_text
from qmx.operations import of_call
from qmx.progress import progress, say
from qmx.sharding import any_process, first, put_state
from qmx.train import TrainState, fit


class Trained(NamedTuple):
    """The end of a training."""

    state: TrainState
    # Floating-point, of all its steps, see `qmx.operations`; None if this call had none to do.
    operations: int | None


def train(
    directory: Path,
    name: str,
    step: Callable,
    ts: TrainState,
    rng: jax.Array,
    source: Source,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    drop_last: bool,
    save_seconds: float,
    watch: Callable[[int, dict[str, float]], str | None] = lambda done, metrics: None,
    stopped: Callable[[], bool] = lambda: False,
    at_once: int | None = None,
    tensorboard: bool = False,
) -> Trained:
    """Train to the end, from the newest good checkpoint if an earlier call left one.

    Args:
      directory: gets metrics.jsonl, a line for each step, and checkpoints/, which the caller
        removes when the result is safe.
      name: for the progress.
      step, rng: see `qmx.train.make_step`.
      ts: the state before the first step.
      save_seconds: between two checkpoints, see `qmx.train.fit`.
      watch: returns a warning about the metrics, see `qmx.diagnostics.watch`.
      source: what is trained on; its order follows `seed`, see `qmx.data.batches`.
      at_once: steps in one dispatch, see `qmx.data.batches.feed`.
      tensorboard: also write the metrics as an event file, see `qmx.board`.

    Raises:
      Stopped: `stopped` said so; the state is in checkpoints/.
      FloatingPointError: the loss or the gradient is not finite; names the run, the step and the
        last checkpoint.
    """
    counted: list[int] = []  # operations of one step
    ts, rng = put_state((ts, rng))  # else each step would bring the key to every device
    with Checkpoints(directory / "checkpoints") as checkpoints:
        restored = checkpoints.restore(ts)
        if restored is not None:
            ts = restored
            say(f"{name}: goes on from {checkpoints.newest()}")

        def batches(start: int) -> Iterator[dict[str, jax.Array] | Rows]:
            return feed(
                source,
                batch_size,
                steps=steps,
                seed=seed,
                start=start,
                drop_last=drop_last,
                at_once=at_once,
            )

        log = directory / "metrics.jsonl"
        with (
            _log(log, int(ts.step)) as file,
            drawn(log) if tensorboard and first() else nullcontext(lambda *_: None) as draw,
            progress(name, steps, batch_size) as shown,
        ):

            def counting(*arguments: Any) -> Any:
                if not counted:
                    counted.append(of_call(step, *arguments))
                return step(*arguments)

            def on_metrics(done: int, metrics: dict[str, float]) -> None:
                file.write(json.dumps({"step": done, **metrics}) + "\n")
                draw(done, metrics)
                shown.update(done, f"loss {metrics['loss']:.3f}")
                if warning := watch(done, metrics):
                    say(f"warning: {name}: {warning}")

            try:
                ts = fit(
                    counting,
                    ts,
                    batches,
                    rng,
                    steps=steps,
                    on_metrics=on_metrics,
                    save=checkpoints.save,
                    save_seconds=save_seconds,
                    stopped=stopped,
                    agree=agreed,
                )
            except FloatingPointError as error:
                last = checkpoints.newest()
                saved = f"the last good state is {last}" if last else "no state was saved before"
                raise FloatingPointError(f"{name}: {error}; {saved}") from None
    return Trained(ts, counted[0] * steps if counted else None)


def _log(path: Path, start: int) -> TextIO:
    """The open file of the metrics, cut to those of the first `start` steps. Only the first process
    writes one."""
    if not first():
        return open(os.devnull, "w")
    text = path.read_text(errors="replace") if start and path.exists() else ""
    kept = [line for line in text.splitlines() if 0 < _step(line) <= start]
    write_text(path, "".join(line + "\n" for line in kept))
    return open(path, "a", buffering=1)


def _step(line: str) -> int:
    """The step of a line of the metrics; 0 if a kill or a full disk cut it."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError):
        return 0


ASK_EVERY = 10  # steps: a question costs all processes a round


def agreed(wanted: bool, before: int, done: int) -> bool:
    """For `fit`: True if some process wants to. All of them are asked after each tenth step,
    however many a dispatch has."""
    if jax.process_count() == 1:
        return wanted
    return before // ASK_EVERY < done // ASK_EVERY and any_process(wanted)
