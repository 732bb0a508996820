"""Train a small one of each method with qmx's own loop, in a process of its own; see
test_invariance.py.

    python tests/small_trainings.py DTYPE STEPS RUNS

RUNS is a JSON list of [directory, methods, stops, at once]. Each training of a run is called once
for each of its stops, is stopped after that many more dispatches, as a signal would, and goes on in
the next call; 0 does not stop. A dispatch has as many steps on images that lie on the devices, or
one on images that the host brings if "at once" is 0. The runs share the compiled step of a method.
What is finished is left in DIRECTORY/METHOD: metrics.jsonl and state.npz, every leaf of the last
state; and, if it is distillation, DIRECTORY/evaluation.npz.
"""

import json
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

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", sys.argv[1] == "float64")
DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
WEAK = augment.weak_view(8, mean=(0.5,), std=(0.25,))
VIEW = augment.make_view(8, jitter=(0.4, 0.4, 0, 0), grey_p=0, mean=(0.5,), std=(0.25,))
BATCH = 32


def network(groups, blocks=(1,)):
    arch = Arch(blocks, bottleneck=False, width=8, stem="small")
    return models.from_linen(ResNet(arch, groups, dtype=DTYPE))


NET, HEAD = network(1), models.classifier(10)
TWO_BLOCKS = network(1, (1, 1))  # the second has a stride
METHODS = {  # eight groups of four images; one group over all of them
    "moco": moco.make(network(8), models.moco_head(16), WEAK, queue_size=2 * BATCH, decay=0.9),
    "simsiam": simsiam.make(
        NET, models.simsiam_projector(16, 2), models.simsiam_predictor(8), WEAK
    ),
    "rotation": rotation.make(NET, models.classifier(4), WEAK),
    # The scores say nothing, so that it is never very sure. Both views without colours, whose
    # float32 rounds another way for other numbers of images on a device.
    "fixmatch": fixmatch.make(NET, HEAD, WEAK, WEAK, threshold=0.15, weight=1.0, decay=0.9),
    "distill": distill.make(TWO_BLOCKS, HEAD, VIEW),
}


IMAGES = np.random.default_rng(0).integers(0, 256, (192, 8, 8, 1), np.uint8)
SOURCE = in_memory(
    image=IMAGES[:80], scores=np.random.default_rng(1).normal(size=(80, 10)).astype(np.float32)
)
POOL = in_memory(image=IMAGES[80:])


def method_runs(name, steps, runs):
    """Run all of `runs` that have this method."""
    method, like = METHODS[name], SOURCE.read(np.arange(BATCH))
    tx = optim.sgd(optim.schedule("cosine", 0.01, epochs=10, steps=steps), weight_decay=1e-4)
    init = jax.jit(lambda rng: init_state(method, tx, rng, like))
    step, forms = make_step(method, tx), set()
    for directory, methods, stops, at_once in runs:
        if name not in methods:
            continue
        folder = Path(directory, name)
        folder.mkdir(parents=True, exist_ok=True)
        shown = SOURCE._replace(beside=Beside(POOL, 2)) if name == "fixmatch" else SOURCE
        for stop in stops:
            asked = count(1)
            try:
                ts, _ = train(
                    folder,
                    name,
                    step,
                    init(jax.random.key(0)),
                    jax.random.key(1),
                    shown if at_once else shown._replace(held=None),
                    batch_size=BATCH,
                    steps=steps,
                    seed=3,
                    drop_last=name not in ("distill", "fixmatch"),
                    save_seconds=1e9,
                    stopped=lambda asked=asked, stop=stop: next(asked) == stop,
                    at_once=at_once,
                )
            except Stopped:
                continue
            np.savez(
                folder / "state.npz",
                **{path: np.asarray(leaf) for path, leaf in by_path(ts).items()},
            )
            if name == "distill":
                evaluate(ts, Path(directory))
        forms.add(at_once)
        assert step._cache_size() == len(forms), "one compilation of each form"


def evaluate(ts, directory):
    """Answers of the student, and neighbours among them."""
    answers = predict(
        chain(backbone=TWO_BLOCKS, head=HEAD),
        *put_state((ts.params, ts.state)),
        augment.plain_view((0.5,), (0.25,)),
        IMAGES[:51],
        batch_size=16,
    )
    np.savez(
        directory / "evaluation.npz",
        answers=answers,
        neighbours=knn(answers[:40], np.arange(40) % 10, answers[40:], k=5),
    )


def main(steps, runs):
    for name in METHODS:
        method_runs(name, steps, runs)
    print(jax.device_count())


if __name__ == "__main__":
    main(int(sys.argv[2]), json.loads(sys.argv[3]))
