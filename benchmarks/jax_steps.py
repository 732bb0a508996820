"""The qmx side of step_time.py and gpu.py: each method's jitted train step, the target's inference.

A view is what it is on PyTorch's side: the batch turned by a random number of images, normalised.
Nothing is imported here but jax, numpy and what `import qmx` takes.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qmx import augment, distill, init_state, make_step, moco, models, optim, rotation, simsiam
from qmx.contract import Method, View, chain
from qmx.sharding import put_batch, put_state
from qmx.targets.query import PRECISIONS

METHODS = ("distill", "moco", "simsiam", "rotation")


class Setting(NamedTuple):
    """A network, what it is shown, and how it is computed."""

    arch: str
    images: np.ndarray  # uint8[B, H, W, C]
    scores: np.ndarray  # f32[B, N]
    queue: int = 4096  # MoCo's K
    precision: str = "float32"  # one of qmx.targets.query.PRECISIONS

    @property
    def groups(self) -> int:
        """Groups of MoCo's batch statistics, 32 images each."""
        return max(len(self.images) // 32, 1)


class Made(NamedTuple):
    """A step that is compiled, its state on the device."""

    run: Callable[[], Any]  # does one step
    seconds: float  # of compilation
    memory: int | None  # bytes: arguments, results and what is needed in between
    compiled: Any


def look(setting: Setting) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation that the images are normalised by."""
    channels = setting.images.shape[-1]
    return {"mean": (0.5,) * channels, "std": (0.25,) * channels}


def turned(setting: Setting) -> View:
    """The view of a step: the batch turned by a random number of images, normalised."""
    plain = augment.plain_view(**look(setting))

    def view(rng, batch):
        images = batch["image"]
        by = jax.random.randint(rng, (), 0, len(images))
        return plain(rng, {"image": jnp.roll(images, by, 0)})

    return view


def method(setting: Setting, name: str, strong: View, weak: View) -> Method:
    """A method by its name, as the papers set it, on the setting's network."""
    dtype = jnp.dtype(PRECISIONS[setting.precision][0])
    net = partial(models.backbone, setting.arch, dtype=dtype)
    if name == "distill":
        return distill.make(net(), models.classifier(setting.scores.shape[1]), weak)
    if name == "moco":
        net = net(stats_groups=setting.groups)
        return moco.make(net, models.moco_head(), strong, queue_size=setting.queue)
    if name == "simsiam":
        return simsiam.make(
            net(zero_init=True), models.simsiam_projector(), models.simsiam_predictor(), strong
        )
    return rotation.make(net(), models.classifier(4), weak)


def train(
    setting: Setting,
    name: str,
    views: tuple[View, View] | None = None,
    batches: Iterator | None = None,
) -> Made:
    """The train step of a method, on one batch that is there already or on those of `batches`."""
    strong, weak = views or (turned(setting), turned(setting))
    chosen = method(setting, name, strong, weak)
    tx = optim.sgd(lambda step: 0.01, weight_decay=1e-4)
    batch = put_batch({"image": setting.images, "scores": setting.scores})
    root = put_state(jax.random.key(0))
    # The state is the same for every batch size, and so is the program that draws it.
    size = 2 * setting.groups if name == "moco" else 2
    few = {
        key: jax.ShapeDtypeStruct((size, *rows.shape[1:]), rows.dtype)
        for key, rows in batch.items()
    }
    state = put_state(jax.jit(lambda rng: init_state(chosen, tx, rng, few))(root))
    step = compiled(make_step(chosen, tx), state, batch, root)

    def one():
        nonlocal state
        state, metrics = step.compiled(state, next(batches) if batches else batch, root)
        return metrics

    return step._replace(run=one)


def infer(setting: Setting) -> Made:
    """One pass of the target over the batch, its batch norm folded into the convolutions."""
    dtype, products = PRECISIONS[setting.precision]
    net = models.backbone(setting.arch, dtype=jnp.dtype(dtype), folded=True)
    network = chain(backbone=net, head=models.classifier(setting.scores.shape[1]))
    plain, root = augment.plain_view(**look(setting)), jax.random.key(0)
    few = jnp.zeros((2, *setting.images.shape[1:]))
    params, stats = put_state(jax.jit(lambda rng: network.init(rng, few))(root))
    batch = put_batch({"image": setting.images})

    def scores(params, batch):
        return network.apply(params, stats, plain(root, batch), False)[0]

    with jax.default_matmul_precision(products):
        made = compiled(jax.jit(scores), params, batch)
    return made._replace(run=partial(made.compiled, params, batch))


def compiled(function: Callable, *arguments: Any) -> Made:
    """A jitted function compiled for these arguments, and what that took."""
    began = time.perf_counter()
    done = function.lower(*arguments).compile()
    seconds, memory = time.perf_counter() - began, done.memory_analysis()
    size = memory and (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return Made(partial(done, *arguments), seconds, size, done)


def in_turns(
    runs: dict[str, Callable],
    blocks: int,
    steps: int,
    wait: Callable[[str, Any], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of a step in each block of `steps`, for each of the functions, which take turns.

    Args:
      wait: (name, what the last step gave) -> None; called at the end of a block.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(blocks):
        for name, run in runs.items():
            began = clock()
            for _ in range(steps):
                last = run()
            wait(name, last)
            times[name].append((clock() - began) / steps)
    return times
