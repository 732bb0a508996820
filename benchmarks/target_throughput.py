"""Speed of a target's answers into a ledger: inference alone, ledger alone, and the command's both.

    python benchmarks/target_throughput.py --arch=resnet18 --size=32 --images=256
    python benchmarks/target_throughput.py --arch=resnext101_32x16d --size=224 --images=10240 \\
        --precision=bfloat16

The network has random weights, its batch norms folded in as the stage `query` has them; the images
are random. "inference" calls the query function batch by batch; "keys" hashes the pixels, twice as
`ask` does; "ledger" asks a query that answers at once, so that it holds the keys, the commits and
reading back; "together" asks the network. They take turns, each with a new SQLite file on the disk
of --folder. Prints a table and, as the last line, JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from qmx.main import set_xla_flags


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument(
        "--batch", type=int, default=128, help="images in a request and in a commit"
    )
    parser.add_argument("--precision", default="float32", choices=("float32", "tf32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", help="where the ledgers are written; the system's for temporary files"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    set_xla_flags()
    import jax
    import numpy as np

    from qmx import networks
    from qmx.contract import Encoder
    from qmx.ledger import Ledger, pixel_digests
    from qmx.sharding import put_state
    from qmx.targets.query import network_query

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.images, args.size, args.size, 3), np.uint8)
    seen = networks.Look((args.size, args.size, 3), (0.5,) * 3, (0.25,) * 3, args.classes)
    network = networks.classifier(args.arch, "float32", seen)
    weights = jax.tree.map(
        lambda x: np.abs(0.05 * rng.standard_normal(x.shape, np.float32)),
        networks.variables(network, seen),
    )
    folded, weights = networks.for_inference(args.arch, args.precision, seen, weights)
    query = network_query(
        folded,
        *put_state(Encoder(*weights)),
        networks.evaluation_view(seen),
        args.batch,
        args.precision,
    )
    answer = rng.standard_normal((args.batch, args.classes), np.float32)

    def batches() -> None:
        for start in range(0, args.images, args.batch):
            query(images[start : start + args.batch])

    def asked(ask: Callable) -> None:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            with Ledger(Path(folder) / "ledger.sqlite", target="random") as ledger:
                ledger.ask(ask, images, batch_size=args.batch)
                assert ledger.account().images == args.images

    ways: dict[str, Callable[[], object]] = {
        "inference": batches,
        "keys": lambda: pixel_digests(images),
        "ledger": lambda: asked(lambda batch: answer[: len(batch)]),
        "together": lambda: asked(query),
    }
    began = time.perf_counter()
    query(images[: args.batch])
    compiled = time.perf_counter() - began
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)

    rates = {
        name: statistics.median(args.images / s for s in took) for name, took in seconds.items()
    }
    share = statistics.median(
        ledger / whole for ledger, whole in zip(seconds["ledger"], seconds["together"], strict=True)
    )
    print("| | images/s, median |\n|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} |")
    print(f"the ledger's share of the time together: {100 * share:.1f} %")
    print(
        json.dumps(
            {
                "arguments": vars(args),
                "images_per_second": rates,
                "ledger_share": share,
                "compile_seconds": compiled,
                "platform": jax.devices()[0].platform,
                "devices": jax.device_count(),
                "cores": os.cpu_count(),
                "jax": jax.__version__,
            }
        )
    )


if __name__ == "__main__":
    main(arguments())
