"""Train a small one of each method with qmx's own loop, in a process of its own; see
test_invariance.py.

    python tests/small_trainings.py DIRECTORY METHODS STEPS STOP AT_ONCE

Stops each training after STOP more dispatches, as a signal would; 0 does not. A dispatch has
AT_ONCE steps on images that lie on the devices, or one on images that the host brings if that is 0.
What is finished is left in DIRECTORY/METHOD: metrics.jsonl and state.npz, every leaf of the last
state; and, of the last one if it is distillation, DIRECTORY/evaluation.npz. METHODS are names with
commas between them.
"""

import sys
from itertools import count
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qmx import (
    augment,
    distill,
    fixmatch,
    init_state,
    make_step,
    moco,
    models,
    optim,
    rotation,
    simsiam,
)
from qmx.contract import by_path, chain
from qmx.data.sources import Beside, in_memory
from qmx.inference import predict
from qmx.metrics import knn
from qmx.models.resnet import Arch, ResNet
from qmx.sharding import put_state
from qmx.train import Stopped
from qmx.training import train

DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
WEAK = augment.weak_view(8, mean=(0.5,), std=(0.25,))
VIEW = augment.make_view(8, jitter=(0.4, 0.4, 0, 0), grey_p=0, mean=(0.5,), std=(0.25,))
BATCH = 32


def network(groups):
    arch = Arch((1, 1), bottleneck=False, width=8, stem="small")
    return models.from_linen(ResNet(arch, groups, dtype=DTYPE))


NET, HEAD = network(1), models.classifier(10)
METHODS = {  # eight groups of four images; one group over all of them
    "moco": moco.make(network(8), models.moco_head(16), VIEW, queue_size=2 * BATCH, decay=0.9),
    "simsiam": simsiam.make(
        NET, models.simsiam_projector(16, 2), models.simsiam_predictor(8), VIEW
    ),
    "rotation": rotation.make(NET, models.classifier(4), VIEW),
    # Before "distill", whose network is evaluated. The scores say nothing, so that it is never very
    # sure. Both views without colours, whose float32 rounds another way for other numbers of images
    # on a device.
    "fixmatch": fixmatch.make(NET, HEAD, WEAK, WEAK, threshold=0.15, weight=1.0, decay=0.9),
    "distill": distill.make(NET, HEAD, VIEW),
}


def main(directory, names, steps, stop, at_once):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 8, 8, 1), np.uint8)
    source = in_memory(image=images, scores=rng.normal(size=(80, 10)).astype(np.float32))
    like = source.read(np.arange(BATCH))
    pool = in_memory(image=rng.integers(0, 256, (112, 8, 8, 1), np.uint8))
    for name in names:
        method = METHODS[name]
        tx = optim.sgd(optim.schedule("cosine", 0.01, epochs=10, steps=steps), weight_decay=1e-4)
        ts = jax.jit(lambda rng, method=method, tx=tx: init_state(method, tx, rng, like))(
            jax.random.key(0)
        )
        step, asked = make_step(method, tx), count(1)
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            shown = source._replace(beside=Beside(pool, 2)) if name == "fixmatch" else source
            shown = shown if at_once else shown._replace(held=None)
            ts, _ = train(
                folder,
                name,
                step,
                ts,
                jax.random.key(1),
                shown,
                batch_size=BATCH,
                steps=steps,
                seed=3,
                drop_last=name not in ("distill", "fixmatch"),
                save_seconds=1e9,
                stopped=lambda asked=asked: next(asked) == stop,
                at_once=at_once,
            )
        except Stopped:
            continue
        assert step._cache_size() == 1, "one compilation"
        np.savez(
            folder / "state.npz", **{path: np.asarray(leaf) for path, leaf in by_path(ts).items()}
        )
    if not stop and name == "distill":
        answers = predict(
            chain(backbone=NET, head=HEAD),
            *put_state((ts.params, ts.state)),
            augment.plain_view((0.5,), (0.25,)),
            images[:51],
            batch_size=16,
        )
        np.savez(
            directory / "evaluation.npz",
            answers=answers,
            neighbours=knn(answers[:40], np.arange(40) % 10, answers[40:], k=5),
        )
    print(jax.device_count())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), *map(int, sys.argv[3:]))
