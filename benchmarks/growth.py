"""Growth: MoCo's step with the queue, memory with the batch, ledger and selection with images.

    python benchmarks/growth.py
    python benchmarks/growth.py --arch=resnet50 --size=224 --batch=256 --dtype=bfloat16

queue: the step at each --queues, in turns, block by block; ratios within a turn to the first one.
The goal is 1.05 on a GPU and 1.10 on a CPU. "copied" counts the places where the compiled step
copies the whole queue; it is written in place where there are none. "logits" is the share of the
step's products that the queue takes. memory: bytes of the compiled step's temporaries, for each
image of the batch, nothing is run. ledger: processor time of an answer when so many are there
already, without and with a budget. selection: seconds of choosing --budget of so many images by
features. Prints tables and, as the last line, JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from qmx.main import set_xla_flags

PARTS = ("queue", "memory", "ledger", "selection")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--arch", default="resnet18_small")
    parser.add_argument(
        "--size", type=int, default=32, help="side of the images and views, in pixels"
    )
    parser.add_argument("--batch", type=int, default=64, help="global; of the queue's steps")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--queues", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--steps", type=int, default=2, help="in a block")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[32, 128, 512], help="of the memory"
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        default=[5000, 10000, 20000],
        help="of ledger and selection",
    )
    parser.add_argument("--budget", type=int, default=100, help="of the selection")
    return parser.parse_args()


def trainer(args: argparse.Namespace, batch: int, queue: int) -> tuple[Any, Any, list]:
    """(the step of MoCo, its state, four batches)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qmx import augment, init_state, make_step, moco, models, optim
    from qmx.sharding import put_batch, put_state

    net = models.backbone(args.arch, stats_groups=max(batch // 32, 1), dtype=jnp.dtype(args.dtype))
    view = augment.make_view(args.size, mean=(0.5,) * 3, std=(0.25,) * 3)
    method, tx = (
        moco.make(net, models.moco_head(), view, queue_size=queue),
        optim.sgd(lambda step: 0.01),
    )
    rng = np.random.default_rng(0)
    batches = [
        put_batch({"image": rng.integers(0, 256, (batch, args.size, args.size, 3), np.uint8)})
        for _ in range(4)
    ]
    init = jax.jit(
        lambda: init_state(method, tx, jax.random.key(0), batches[0]),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return make_step(method, tx), put_state(init()), batches


def queue(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each length of the queue."""
    import jax

    from qmx.sharding import put_state

    root, compiled, states, times, rows = put_state(jax.random.key(0)), {}, {}, {}, []
    for length in args.queues:
        step, states[length], batches = trainer(args, args.batch, length)
        compiled[length] = step.lower(states[length], batches[0], root).compile()
        states[length], _ = jax.block_until_ready(
            compiled[length](states[length], batches[0], root)
        )
        times[length] = []
    for _ in range(args.turns):
        for length in args.queues:
            began = time.perf_counter()
            for k in range(args.steps):
                states[length], metrics = compiled[length](states[length], batches[k % 4], root)
            jax.block_until_ready((states[length], metrics))
            times[length].append(1000 * (time.perf_counter() - began) / args.steps)
    first = args.queues[0]
    print(
        "| queue | ms of a step | ratio | logits, % of the products | copied"
        " |\n|---|---|---|---|---|"
    )
    for length in args.queues:
        ratio = statistics.median(
            ms / base for ms, base in zip(times[length], times[first], strict=True)
        )
        flops = compiled[length].cost_analysis()["flops"]
        width = states[length].state.queue.shape[1]
        whole = f"f32[{length},{width}]"
        copied = sum(
            line.split(" = ", 1)[-1].startswith(whole) and " copy(" in line
            for line in compiled[length].as_text().splitlines()
        )
        row = {
            "queue": length,
            "ms": statistics.median(times[length]),
            "ratio": ratio,
            "copied": copied,
            "logits_share": 4 * args.batch * length * width / flops,
        }
        rows.append(row)
        print(
            f"| {length:,} | {row['ms']:.1f} | {ratio:.3f} | {100 * row['logits_share']:.1f} |"
            f" {copied} |"
        )
    return rows


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch."""
    import jax

    rows: list[dict[str, Any]] = []
    print("| batch | temporaries, MB | MB an image |\n|---|---|---|")
    for batch in args.batches:
        step, state, batches = trainer(args, batch, max(args.batches))
        size = (
            step.lower(state, batches[0], jax.random.key(0))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )
        rows.append({"batch": batch, "temp_bytes": size, "bytes_an_image": size / batch})
        print(f"| {batch} | {size / 1e6:.1f} | {size / batch / 1e6:.3f} |", flush=True)
    return rows


def ledger(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of answers that are there already."""
    import numpy as np

    from qmx.ledger import Ledger

    rng, chunk, rows = np.random.default_rng(0), min(4096, args.images[0]), []
    print("| answers there | us an answer | with a budget | account, ms |\n|---|---|---|---|")

    def ask(book: Ledger, count: int) -> None:
        book.ask(
            lambda batch: np.zeros((len(batch), 10), np.float32),
            rng.integers(0, 256, (count, 8, 8, 1), np.uint8),
        )

    def took(work: Any) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    with tempfile.TemporaryDirectory() as folder:
        free = Ledger(Path(folder) / "free.sqlite", target="random")
        bound = Ledger(Path(folder) / "bound.sqlite", target="random", budget=10**9)
        there = 0
        for images in args.images:
            for book in (free, bound):
                ask(book, images - there)
            there = images + chunk
            row: dict[str, Any] = {"answers": images}
            row["us"], row["us_with_budget"] = (
                1e6 * took(lambda b=book: ask(b, chunk)) / chunk for book in (free, bound)
            )
            row["account_ms"] = 1000 * took(bound.account)
            rows.append(row)
            print(
                f"| {images:,} | {row['us']:.0f} | {row['us_with_budget']:.0f} |"
                f" {row['account_ms']:.0f} |",
                flush=True,
            )
    return rows


def selection(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of images."""
    import numpy as np

    from qmx.selection.by_features import BY_FEATURES, unit

    ways = ("balanced", "kcenter", "typiclust")
    rng, rows = np.random.default_rng(0), []
    print("| images |" + "".join(f" {way}, s |" for way in ways) + "\n|---|---|---|---|")
    for images in args.images:
        centres, of = rng.normal(size=(100, 64)), rng.integers(100, size=images)
        features = unit((centres[of] + rng.normal(size=(images, 64))).astype(np.float32))
        row: dict[str, Any] = {"images": images}
        for way in ways:
            began = time.perf_counter()
            BY_FEATURES[way](features, args.budget, np.random.default_rng(0), 100)
            row[way] = time.perf_counter() - began
        rows.append(row)
        print(f"| {images:,} |" + "".join(f" {row[way]:.2f} |" for way in ways), flush=True)
    return rows


def main(args: argparse.Namespace) -> None:
    set_xla_flags()
    import jax

    found = {}
    for name, measure in zip(PARTS, (queue, memory, ledger, selection), strict=True):
        if name in args.parts:
            print(f"\n{name}\n")
            found[name] = measure(args)
    print(
        json.dumps(
            {
                "arguments": vars(args),
                **found,
                "platform": jax.default_backend(),
                "devices": jax.device_count(),
                "cores": os.cpu_count(),
                "jax": jax.__version__,
            }
        )
    )


if __name__ == "__main__":
    main(arguments())
