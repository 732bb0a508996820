"""Cost of checkpoints and metrics: a MoCo training of the command against the bare steps.

    python benchmarks/overhead.py --epochs=5 --pairs=5

Both train the same network from the same state on the same batches. The bare one calls the step and
waits at the end; the other writes a line of metrics for each step, shows its progress and saves a
checkpoint as often as an epoch takes. They take turns, and each pair gives one ratio. Prints a
table and, as the last line, JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from qmx.main import set_xla_flags


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument(
        "--size", type=int, default=32, help="side of the images and views, in pixels"
    )
    parser.add_argument("--batch", type=int, default=64, help="global")
    parser.add_argument("--queue", type=int, default=4096, help="MoCo's K, a multiple of the batch")
    parser.add_argument("--epoch-steps", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    set_xla_flags()
    import jax
    import numpy as np

    from qmx import augment, init_state, make_step, moco, models, optim, training
    from qmx.data.batches import feed
    from qmx.data.sources import in_memory
    from qmx.sharding import put_state

    count = args.epoch_steps * args.batch
    images = np.random.default_rng(0).integers(0, 256, (count, args.size, args.size, 3), np.uint8)
    source = in_memory(image=images)
    network = models.backbone(args.arch, stats_groups=max(args.batch // 32, 1))
    view = augment.make_view(args.size, mean=(0.5,) * 3, std=(0.25,) * 3)
    method = moco.make(network, models.moco_head(), view, queue_size=args.queue)
    tx = optim.sgd(lambda step: 0.03, weight_decay=1e-4)
    step, steps = make_step(method, tx), args.epochs * args.epoch_steps
    # Where the command has it, so that both take one compilation.
    rng = put_state(jax.random.key(0))
    begin = jax.device_get(init_state(method, tx, rng, {"image": images[: args.batch]}))
    read = {"steps": steps, "seed": 0, "drop_last": True}

    def bare(steps: int = steps) -> float:
        ts = put_state(begin)
        began = time.perf_counter()
        for batch in feed(source, args.batch, **{**read, "steps": steps}):
            ts, metrics = step(ts, batch, rng)
        jax.block_until_ready((ts, metrics))
        return time.perf_counter() - began

    def whole(directory: Path, seconds: float) -> tuple[float, int]:
        """Its time, and how many checkpoints there were."""
        saved: set[str] = set()

        def stopped() -> bool:  # asked after each step
            saved.update(path.name.split(".")[0] for path in directory.glob("checkpoints/[0-9]*"))
            return False

        directory.mkdir()
        began = time.perf_counter()
        ts = training.train(
            directory,
            "training",
            step,
            begin,
            rng,
            source,
            batch_size=args.batch,
            save_seconds=seconds,
            stopped=stopped,
            **read,
        )
        jax.block_until_ready(ts)
        return time.perf_counter() - began, len(saved)

    bare(1)  # compiles
    times, checkpoints = [], 0
    print("| bare steps, s | as the command, s | checkpoints | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(args.pairs):
            plain = bare()
            full, checkpoints = whole(Path(folder) / str(pair), plain / args.epochs)
            times.append((plain, full))
            print(f"| {plain:.1f} | {full:.1f} | {checkpoints} | {full / plain:.3f} |", flush=True)
    ratio = statistics.median(full / plain for plain, full in times)
    print(f"median ratio {ratio:.3f}")
    print(
        json.dumps(
            {
                "arguments": vars(args),
                "seconds": times,
                "ratio": ratio,
                "checkpoints": checkpoints,
                "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(begin)),
                "cores": os.cpu_count(),
                "jax": jax.__version__,
            }
        )
    )


if __name__ == "__main__":
    main(arguments())
