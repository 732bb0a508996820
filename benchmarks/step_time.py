"""Time of the jitted train step of each method, on random images that are already on the device.

    python benchmarks/step_time.py --arch=resnet8 --size=8 --batch=128

Prints a table and, as the last line, JSON. Compilation is timed apart. The steps of all methods are
timed in turn, block by block, so that a machine whose speed drifts drifts for all of them.
"""

import argparse
import json
import os
import statistics
import time

from qmx.main import set_xla_flags

METHODS = ("distill", "moco", "simsiam", "rotation")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet8")
    parser.add_argument("--size", type=int, default=8, help="side of the images and views, in pixels")
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3))
    parser.add_argument("--batch", type=int, default=128, help="global")
    parser.add_argument("--queue", type=int, default=4096, help="MoCo's K, a multiple of the batch")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="steps in a block; the device is waited for at its end")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    set_xla_flags()
    import jax
    import numpy as np

    from qmx import augment, distill, init_state, make_step, moco, models, optim, rotation, simsiam
    from qmx.sharding import put_batch, put_state

    look = {"mean": (0.5,) * args.channels, "std": (0.25,) * args.channels}
    strong, weak = augment.make_view(args.size, **look), augment.weak_view(args.size, **look)
    groups = max(args.batch // 32, 1)
    methods = {
        "distill": distill.make(models.backbone(args.arch), models.classifier(1000), weak),
        "moco": moco.make(models.backbone(args.arch, stats_groups=groups), models.moco_head(), strong,
                          queue_size=args.queue),
        "simsiam": simsiam.make(models.backbone(args.arch, zero_init=True), models.simsiam_projector(),
                                models.simsiam_predictor(), strong),
        "rotation": rotation.make(models.backbone(args.arch), models.classifier(4), weak),
    }
    rng = np.random.default_rng(0)
    shape = (args.batch, args.size, args.size, args.channels)
    batches = [put_batch({"image": rng.integers(0, 256, shape, np.uint8),
                          "scores": rng.normal(size=(args.batch, 1000)).astype(np.float32)}) for _ in range(4)]
    root, states, steps, compiled, times = jax.random.key(0), {}, {}, {}, {name: [] for name in METHODS}
    for name, method in methods.items():
        tx = optim.sgd(lambda step: 0.01, weight_decay=1e-4)
        states[name] = put_state(jax.jit(lambda rng, m=method, t=tx: init_state(m, t, rng, batches[0]))(root))
        began = time.perf_counter()
        steps[name] = make_step(method, tx)
        states[name], _ = jax.block_until_ready(steps[name](states[name], batches[0], root))
        compiled[name] = time.perf_counter() - began
    for _ in range(args.blocks):
        for name in METHODS:
            began = time.perf_counter()
            for k in range(args.steps):
                states[name], metrics = steps[name](states[name], batches[k % 4], root)
            jax.block_until_ready((states[name], metrics))
            times[name].append((time.perf_counter() - began) / args.steps)

    rows = []
    print(f"| step | ms, median | quartiles | images/s | compilation, s |\n|{'---|' * 5}")
    for name in METHODS:
        low, middle, high = (1000 * q for q in statistics.quantiles(times[name], n=4))
        rows.append({"method": name, "ms": middle, "ms_quartiles": [low, high],
                     "images_per_second": 1000 * args.batch / middle, "compile_seconds": compiled[name]})
        print(f"| {name} | {middle:.1f} | {low:.1f} .. {high:.1f} | {rows[-1]['images_per_second']:.0f} "
              f"| {compiled[name]:.1f} |")
    machine = {"devices": jax.device_count(), "platform": jax.devices()[0].platform, "cores": os.cpu_count(),
               "jax": jax.__version__}
    print(json.dumps({"arguments": vars(args), "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main(arguments())
