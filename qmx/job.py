"""One training run in a directory: its progress, its metrics, its checkpoints, and going on from them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from qmx.checkpoint import Checkpoints
from qmx.data import Source, batches
from qmx.progress import progress, say
from qmx.sharding import any_process, first, from_first, put_state
from qmx.train import TrainState, fit


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
    watch: Callable[[int, dict[str, float]], str | None] = lambda done, metrics: None,
    stopped: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Train to the end, from the newest good checkpoint if an earlier call left one.

    Args:
      directory: gets metrics.jsonl, a line for each step, and while it trains checkpoints/.
      name: for the progress.
      step, rng: see `qmx.train.make_step`.
      ts: the state before the first step.
      watch: returns a warning about the metrics, see `qmx.health.watch`.
      source: what is trained on; its order follows `seed`, see `qmx.data.batches`.

    Raises:
      Stopped: `stopped` said so; the state is in checkpoints/.
    """
    ts = put_state(ts)
    checkpoints = Checkpoints(directory / "checkpoints")
    restored = checkpoints.restore(ts)
    if restored is not None:
        ts = restored
        say(f"{name}: goes on from step {int(ts.step)}")
    path, start = directory / "metrics.jsonl" if first() else Path(os.devnull), int(ts.step)
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= start] if start else []

    def feed(start: int) -> Iterator[dict[str, jax.Array]]:
        return batches(source, batch_size, steps=steps, seed=seed, start=start, drop_last=drop_last)

    with open(path, "w", buffering=1) as file, progress(name, steps, batch_size) as shown:
        file.writelines(line + "\n" for line in kept)

        def on_metrics(done: int, metrics: dict[str, float]) -> None:
            file.write(json.dumps({"step": done, **metrics}) + "\n")
            shown.update(done, f"loss {metrics['loss']:.3f}")
            if warning := watch(done, metrics):
                say(f"warning: {name}: {warning}")

        ts = fit(step, ts, feed, rng, steps=steps, on_metrics=on_metrics, save=checkpoints.save,
                 stopped=stopped, agree=agreement())
    checkpoints.close()
    from_first(lambda: shutil.rmtree(directory / "checkpoints", ignore_errors=True))
    return ts


def agreement(every: int = 10) -> Callable[[bool], bool]:
    """For `fit`: what some process wants, all do; asked once in `every` steps, as it costs them a round."""
    if jax.process_count() == 1:
        return bool
    calls = 0

    def agree(wanted: bool) -> bool:
        nonlocal calls
        calls += 1
        return calls // 2 % every == 0 and any_process(wanted)  # two questions a step

    return agree
