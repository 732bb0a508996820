"""Batches from the host against batches from the device: one training of digits, fed each way in
turn.

    python benchmarks/feeding.py --turns=7

    host       grain reads each batch, and it is put on the device
    device     the images lie on the device; a batch is numbers of their rows, one step a dispatch
    device N   the same, N steps in one dispatch (--at-once)

The network, the batch and the precision are those of configs/digits.py (or --config=FILE.py). All
start from one state; compilation is not timed. Prints a table of medians, in milliseconds a step by
the clock and of the processors' time, and a line of JSON.
"""

import argparse
import json
import os
import statistics
import time

from qmx.main import load_file, set_xla_flags


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/digits.py", help="whose pool is in memory")
    parser.add_argument("--at-once", type=int, nargs="*", default=[8], help="steps in one dispatch")
    parser.add_argument("--steps", type=int, default=48, help="of each turn")
    parser.add_argument("--turns", type=int, default=7)
    return parser.parse_args()


def trainings(config, data):
    """name -> (its trainer, batch size, source)."""
    import numpy as np

    from qmx import networks, trainers
    from qmx.data.sources import take

    seen, moco, student = networks.look(data), config.pretrain.moco, config.student
    scores = np.random.default_rng(0).normal(size=(data.pool.size, data.classes))
    answered = take(data.pool, np.arange(data.pool.size), scores=scores.astype(np.float32))
    return {
        "moco": (
            trainers.pretrainer("moco", moco, student, config.strong_view, seen, 1000),
            moco.batch_size,
            data.pool,
        ),
        "student": (
            trainers.distiller(
                trainers.recipe(config.distill),
                student.arch,
                student.dtype,
                config.weak_view,
                seen,
                1000,
            ),
            config.distill.batch_size,
            answered,
        ),
    }


def main(args: argparse.Namespace) -> None:
    set_xla_flags()
    import jax
    from ml_collections import FrozenConfigDict

    from qmx import data as qmx_data
    from qmx.data.batches import feed
    from qmx.sharding import put_state
    from qmx.train import fit

    config = FrozenConfigDict(load_file(args.config))
    if config.student.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    data = qmx_data.load(**config.data)
    ways = {"host": None, "device": 1, **{f"device {steps}": steps for steps in args.at_once}}
    rows = []
    print(
        "| training | fed from | ms a step | processors' ms a step | host's time over it |\n|"
        + "---|" * 5
    )
    for name, (trainer, size, source) in trainings(config, data).items():
        rng = put_state(jax.random.key(0))
        begin = jax.device_get(trainer.init(rng))

        def train(
            way: str, steps: int, trainer=trainer, size=size, source=source, begin=begin, rng=rng
        ):
            shown = source if ways[way] else source._replace(held=None)
            state = put_state(begin)
            began, used = time.perf_counter(), time.process_time()
            state = fit(
                trainer.step,
                state,
                lambda start: feed(
                    shown, size, steps=steps, seed=0, start=start, drop_last=True, at_once=ways[way]
                ),
                rng,
                steps=steps,
            )
            jax.block_until_ready(state)
            return time.perf_counter() - began, time.process_time() - used

        times = {way: [] for way in ways}
        for way in ways:
            train(way, ways[way] or 1)  # compiles
        for _ in range(args.turns):
            for way in ways:
                times[way].append(train(way, args.steps))
        for way, found in times.items():
            wall, used = (
                1000 * statistics.median(each) / args.steps for each in zip(*found, strict=True)
            )
            ratio = statistics.median(
                host[0] / here[0] for host, here in zip(times["host"], found, strict=True)
            )
            rows.append(
                {"training": name, "from": way, "ms": wall, "processor_ms": used, "ratio": ratio}
            )
            print(f"| {name} | {way} | {wall:.2f} | {used:.2f} | {ratio:.3f} |", flush=True)
    print(
        json.dumps(
            {
                "arguments": vars(args),
                "rows": rows,
                "jax": jax.__version__,
                "cores": len(os.sched_getaffinity(0)),
                "platform": jax.default_backend(),
            }
        )
    )


if __name__ == "__main__":
    main(arguments())
