"""Steps on 1, 2, 4 and 8 devices with one global batch; and what ImageNet's whole table would take.

    python benchmarks/scaling.py --arch=resnet8 --size=32 --batch=64
    python benchmarks/scaling.py --arch=resnet50 --size=224 --batch=256 --dtype=bfloat16 \\
        --queue=65536
    python benchmarks/scaling.py --devices --rates moco=RATE distill=RATE --speedup=RATIO

Each number of devices runs in a process of its own, in turns: GPUs as far as there are any, else
the CPU divided into so many, which shows what dividing costs and no speed-up. Ratios are to the
first number, within a turn.

The table's steps and images are counted by the code that trains them, from configs/imagenet.py. Its
hours are arithmetic: images through the rates that are given, in images a second on one device, by
hand or out of what benchmarks/step_time.py printed; times --speedup for eight. What was not given
is "not measured". Prints tables and, as the last line, JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qmx import trainers
from qmx.grid import cells, encoders, percent, recipe_of
from qmx.main import load_file, set_xla_flags

CONFIG = Path(__file__).parent.parent / "configs/imagenet.py"
POOL, EVALUATION = 1_281_167, 50_000  # ILSVRC 2012, training and validation images
RATES = ("moco", "simsiam", "rotation", "distill", "query", "inference")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--devices", type=int, nargs="*", default=[1, 2, 4, 8], help="none: nothing is measured"
    )
    parser.add_argument("--arch", default="resnet8")
    parser.add_argument(
        "--size", type=int, default=32, help="side of the images and views, in pixels"
    )
    parser.add_argument(
        "--batch", type=int, default=64, help="global, a multiple of every number of devices"
    )
    parser.add_argument("--queue", type=int, default=4096, help="MoCo's K, a multiple of the batch")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=5, help="in a block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--words", default="", help="of configs/imagenet.py, as in none,moco")
    parser.add_argument(
        "--rates",
        nargs="*",
        default=[],
        metavar="NAME=RATE",
        help=f"images/s of one device, for {', '.join(RATES)}; rotation's are those before turning",
    )
    parser.add_argument(
        "--rates-from", type=Path, help="a file whose last line is step_time.py's JSON"
    )
    parser.add_argument("--speedup", type=float, help="measured, of eight devices over one")
    # Measure in this process.
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a MoCo step on all devices of this process, and what they are."""
    set_xla_flags()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qmx import augment, init_state, make_step, moco, models, optim
    from qmx.sharding import put_batch, put_state

    look = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    net = models.backbone(
        args.arch, stats_groups=max(args.batch // 32, 1), dtype=jnp.dtype(args.dtype)
    )
    method = moco.make(
        net, models.moco_head(), augment.make_view(args.size, **look), queue_size=args.queue
    )
    tx = optim.sgd(lambda step: 0.01, weight_decay=1e-4)
    rng = np.random.default_rng(0)
    batches = [
        put_batch({"image": rng.integers(0, 256, (args.batch, args.size, args.size, 3), np.uint8)})
        for _ in range(4)
    ]
    root = put_state(jax.random.key(0))
    state = put_state(jax.jit(lambda: init_state(method, tx, jax.random.key(0), batches[0]))())
    step, times = make_step(method, tx), []
    state, _ = jax.block_until_ready(step(state, batches[0], root))
    for _ in range(args.blocks):
        began = time.perf_counter()
        for k in range(args.steps):
            state, metrics = step(state, batches[k % 4], root)
        jax.block_until_ready((state, metrics))
        times.append(1000 * (time.perf_counter() - began) / args.steps)
    return {
        "ms": statistics.median(times),
        "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
    }


def in_process(devices: int, platform: str, cache: str) -> dict[str, Any]:
    """`measure` on so many devices, in a process of its own."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    if platform == "cpu":
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        environment["XLA_FLAGS"] = flags.strip()
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(devices)))
    out = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--here"],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(out.splitlines()[-1])


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of devices."""
    code = "import jax; print(jax.default_backend(), jax.device_count())"
    platform, there = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()
    wanted = [n for n in args.devices if platform == "cpu" or n <= int(there)]
    if left := sorted(set(args.devices) - set(wanted)):
        print(f"{there} devices are there; not measured on {', '.join(map(str, left))}")
    with tempfile.TemporaryDirectory() as cache:
        turns = [{n: in_process(n, platform, cache) for n in wanted} for _ in range(args.turns)]
    rows = []
    print("| devices | ms of a step | images/s | speed-up |\n|---|---|---|---|")
    for n in wanted:
        ms = statistics.median(turn[n]["ms"] for turn in turns)
        speedup = statistics.median(turn[wanted[0]]["ms"] / turn[n]["ms"] for turn in turns)
        rows.append(
            {
                **turns[0][n],
                "ms": ms,
                "images_per_second": 1000 * args.batch / ms,
                "speedup": speedup,
            }
        )
        print(f"| {n} | {ms:.1f} | {rows[-1]['images_per_second']:.0f} | {speedup:.2f} |")
    return rows


def parts(words: str) -> list[dict[str, Any]]:
    """Rows of the table: name, the rate that applies, steps, batch, images."""
    config = load_file(f"{CONFIG}:{words}")
    rows: list[dict[str, Any]] = []

    def add(name: str, rate: str, steps: int | None, batch: int | None, images: int) -> None:
        rows.append({"part": name, "rate": rate, "steps": steps, "batch": batch, "images": images})

    seeds, todo = len(config.seeds), cells(config, POOL)
    for init in encoders(config):
        keys = config.pretrain[init]
        steps = trainers.pretrain_steps(keys, POOL) * seeds
        add(f"pretrain {init}", init, steps, keys.batch_size, steps * keys.batch_size)
    asked = max(cell.queries for cell in todo)  # the smaller subsets are parts of the largest
    add("query", "query", None, None, asked + EVALUATION)
    for cell in todo:
        keys = recipe_of(config, cell)
        steps = trainers.distill_steps(keys, cell.queries)
        add(
            f"distill {cell.init} {percent(cell.fraction)}",
            "distill",
            steps,
            keys.batch_size,
            steps * keys.batch_size,
        )
    looks = (len(encoders(config)) + 1) * seeds  # each encoder and a random one see the pool
    add("evaluate, monitor", "inference", None, None, EVALUATION * len(todo) + POOL * looks)
    return rows


def rates_of(args: argparse.Namespace) -> dict[str, float]:
    """Images a second by name; ValueError for a name or a file that does not fit the table."""
    rates: dict[str, float] = {}
    if args.rates_from:
        said = json.loads(args.rates_from.read_text().splitlines()[-1])
        arch, size = said["arguments"]["arch"], said["arguments"]["size"]
        if (arch, size) != ("resnet50", 224):
            raise ValueError(
                f"--rates-from={args.rates_from} is of {arch} at {size} pixels, and the table is of"
                " resnet50 at 224; run step_time.py with --arch=resnet50 --size=224 --channels=3"
            )
        rates.update(
            {
                row["method"]: row["images_per_second"]
                for row in said["rows"]
                if row["method"] in RATES
            }
        )
    for word in args.rates:
        name, _, rate = word.partition("=")
        if name not in RATES or not rate.replace(".", "", 1).isdigit() or not float(rate):
            raise ValueError(
                f"--rates {word} is not NAME=RATE, a name out of {', '.join(RATES)} and images a"
                " second"
            )
        rates[name] = float(rate)
    return rates


def projection(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table's parts with their hours on one device and on eight; None is not measured."""
    rates, rows = rates_of(args), parts(args.words)
    for row in rows:
        rate = rates.get(row["rate"])
        row["hours_on_1"] = row["images"] / rate / 3600 if rate else None
        row["hours_on_8"] = row["hours_on_1"] / args.speedup if rate and args.speedup else None
    hours = ("hours_on_1", "hours_on_8")
    total = {
        "part": "all",
        "rate": "",
        "steps": None,
        "batch": None,
        "images": sum(row["images"] for row in rows),
    }
    total.update(
        {
            n: sum(row[n] for row in rows) if all(row[n] is not None for row in rows) else None
            for n in hours
        }
    )
    print("| part | steps | batch | images | hours on 1 | hours on 8 |\n|---|---|---|---|---|---|")
    for row in (*rows, total):
        shown = ["" if row[n] is None else f"{row[n]:,}" for n in ("steps", "batch", "images")]
        shown += ["not measured" if row[n] is None else f"{row[n]:.1f}" for n in hours]
        print(f"| {row['part']} | {' | '.join(shown)} |")
    return [*rows, total]


def main() -> None:
    args = arguments()
    if args.here:
        print(json.dumps(measure(args)))
        return
    try:
        rates_of(args)
    except (ValueError, OSError) as error:
        sys.exit(f"scaling: {error}")
    rows = scaling(args) if args.devices else []
    table = projection(args)
    print(
        json.dumps(
            {
                "arguments": {**vars(args), "rates_from": args.rates_from and str(args.rates_from)},
                "rows": rows,
                "table": table,
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
