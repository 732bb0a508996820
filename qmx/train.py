"""The one step and the one loop that every method runs in."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qmx.contract import Batch, Method, PyTree, Rows


class TrainState(NamedTuple):
    """All that a run carries from step to step, and all that a checkpoint holds."""

    step: jax.Array  # i32[], steps done
    params: PyTree
    state: PyTree  # the method's own: running statistics, queue, momentum encoder
    opt_state: PyTree


def init_state(
    method: Method, tx: optax.GradientTransformation, rng: jax.Array, batch: Batch
) -> TrainState:
    """The state before the first step; of `batch` only the shapes are read."""
    params, state = method.init(rng, batch)
    return TrainState(jnp.int32(0), params, state, tx.init(params))


def make_step(
    method: Method, tx: optax.GradientTransformation, compiler_options: dict | None = None
) -> Callable:
    """The jitted step of any method: (train_state, batch, rng) -> (train_state, metrics).

    The batch may be `Rows`. One dispatch then does `steps` steps, each on a batch gathered on the
    devices. Each metric is [T], and its first `steps` values are filled. The results are those of
    as many single steps, to the bit where T is 1; in a loop XLA's float32 convolutions on CPUs
    round another way.

    `rng` is the run's one root key; each step folds its number in, so no randomness is stored. The
    state is donated. `compiler_options` are `jax.jit`'s. The metrics are f32[] on the device,
    "loss" and "grad_norm", the length of the gradient as one vector, among them.
    """

    def one(
        ts: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(rng, ts.step)
        grad = jax.value_and_grad(method.loss, has_aux=True)
        (loss, (state, metrics)), grads = grad(ts.params, ts.state, batch, rng)
        updates, opt_state = tx.update(grads, ts.opt_state, ts.params)
        params = optax.apply_updates(ts.params, updates)
        return TrainState(ts.step + 1, params, state, opt_state), {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            **metrics,
        }

    def step(
        ts: TrainState, batch: Batch | Rows, rng: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        if not isinstance(batch, Rows):
            return one(ts, batch, rng)
        rows, most = batch, len(batch.ids[""])
        if most == 1:  # no loop around it
            ts, metrics = one(ts, rows.batch(jnp.int32(0)), rng)
            return ts, jax.tree.map(lambda value: value[None], metrics)
        like = jax.eval_shape(one, ts, jax.eval_shape(rows.batch, jnp.int32(0)), rng)[1]
        unfilled = jax.tree.map(lambda value: jnp.zeros((most, *value.shape), value.dtype), like)

        def next_one(place: jax.Array, so_far: tuple[TrainState, dict]) -> tuple[TrainState, dict]:
            ts, metrics = one(so_far[0], rows.batch(place), rng)
            return ts, jax.tree.map(
                lambda column, value: column.at[place].set(value), so_far[1], metrics
            )

        # The number of steps is data, so that one compilation serves a remainder too, and a run
        # that goes on amid one.
        return jax.lax.fori_loop(0, rows.steps, next_one, (ts, unfilled))

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options)


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


def fit(
    step: Callable,
    ts: TrainState,
    batches: Callable[[int], Any],
    rng: jax.Array,
    *,
    steps: int,
    on_metrics: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    save: Callable[[TrainState], None] | None = None,
    save_seconds: float = 600,
    stopped: Callable[[], bool] = lambda: False,
    agree: Callable[[bool, int, int], bool] = lambda wanted, before, done: wanted,
) -> TrainState:
    """Train until `steps` steps are done, from wherever `ts` stands.

    Args:
      step: from `make_step`.
      batches: start -> an iterator over batches `start`, `start` + 1, ..., or over `Rows` of them,
        no more of which are trained on than `steps` allows.
      rng: the run's root key.
      on_metrics: called with (steps done, metrics) for every step, one dispatch late, so that the
        device never waits for the host.
      save: writes a checkpoint; called every `save_seconds` and when the run is stopped.
      stopped: asked after each dispatch.
      agree: turns the wish of this process into the decision of all, since several processes must
        stop and save at one step. Called after each dispatch, once about stopping and once about
        saving, as (True if this one wants to, steps done before the dispatch, steps done after it).

    Raises:
      FloatingPointError: the loss or the gradient is not finite; says at which step. No state after
        it is saved.
      Stopped: `stopped` said so; the state was saved first, if there is a `save`.
      ValueError: the batches end before.

    The step may donate `ts`, so that it cannot be used again. Nothing is saved at the end.
    """

    def report(before: int, count: int, metrics: dict[str, jax.Array]) -> None:
        columns = {name: np.atleast_1d(np.asarray(value)) for name, value in metrics.items()}
        for place in range(count):
            done, values = (
                before + place + 1,
                {name: float(column[place]) for name, column in columns.items()},
            )
            for name, what in (("loss", "loss"), ("grad_norm", "gradient's length")):
                if not math.isfinite(values[name]):
                    raise FloatingPointError(
                        f"the {what} is {values[name]} at step {done} of {steps}; "
                        "a lower learning rate or a warm-up may cure it"
                    )
            on_metrics(done, values)

    pending = None
    saved = time.monotonic()
    done = int(ts.step)
    feed = iter(batches(done))
    while done < steps and (batch := next(feed, None)) is not None:
        count = 1
        if isinstance(batch, Rows):
            count = min(int(batch.steps), steps - done)
            batch = batch._replace(steps=np.int32(count))
        ts, metrics = step(ts, batch, rng)
        if pending is not None:
            report(*pending)
        pending = (done, count, metrics)
        done += count
        stop = agree(stopped(), done - count, done) and done < steps
        late = agree(time.monotonic() - saved > save_seconds, done - count, done)
        if save is not None and (stop or late):
            report(*pending)  # never save a state that already went wrong
            pending = None
            save(ts)
            saved = time.monotonic()
        if stop:
            raise Stopped(f"stopped after step {done} of {steps}")
    if pending is not None:
        report(*pending)
    if done < steps:
        raise ValueError(
            f"the batches ended after step {done} of {steps}; they must go round the images again"
        )
    return ts
