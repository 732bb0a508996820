"""Time of the jitted train step of each method, and of the target's inference, beside PyTorch.

    python benchmarks/step_time.py --arch=resnet18_small --size=32 --batch=64 --channels=3 \\
        --peer torch
    python benchmarks/step_time.py --all --peer torch    # the main table, at most ten minutes

Prints tables and, as the last line, JSON. The images are random and already on the device. Cutting
views is not part of a step here, since PyTorch alone has nothing like it: a view is the batch
turned by a random number of images (so that no two are the same) and normalised, on both sides.
Queue, momentum encoder, statistics groups and optimiser are part of the step on both sides. The
target's batch norm is folded into its convolutions, on both sides. Compilation is timed apart. The
sides take turns, block by block, so that a machine whose speed drifts drifts for all; the ratio is
of medians (PyTorch's time over qmx's: above 1, qmx is faster), and of the quickest blocks, which
other work on the machine disturbed least. PyTorch runs eagerly in the layout that is quicker here,
`--compile` adds torch.compile; bfloat16 on a GPU, float32 on a CPU. `--input` adds qmx's step with
real views, cut from images that come through the input pipeline.

Operations are those of the convolutions, with padded taps: three forwards less the first layer's
input gradient. The roofline is section C of what XLA can do: per convolution the larger of its
operations and of its bytes, 11 outputs + 3 inputs in training, one of each in inference, at the
matmul and copy rates that this call measured.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial

import jax_steps
from jax_steps import METHODS, in_turns
from limits import TIMES_FORWARD, bounds, layers, measured_peaks

from qmx.main import set_xla_flags


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--all", action="store_true", help="the main table: two networks and the target"
    )
    parser.add_argument("--arch", default="resnet8")
    parser.add_argument(
        "--size", type=int, default=8, help="side of the images and views, in pixels"
    )
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3))
    parser.add_argument("--batch", type=int, default=128, help="global")
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, choices=TIMES_FORWARD, help="infer is the target's"
    )
    parser.add_argument("--queue", type=int, default=4096, help="MoCo's K, a multiple of the batch")
    parser.add_argument("--peer", choices=("none", "torch"), default="none")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too; on a CPU it needs a C++ compiler"
    )
    parser.add_argument(
        "--input", action="store_true", help="also with real views from the input pipeline"
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help=(
            "cpu: this process's CPU time, for one core (taskset -c 0) of a machine that others use"
        ),
    )
    parser.add_argument("--blocks", type=int, help="10 by default, and 4 with --all")
    parser.add_argument(
        "--steps", type=int, default=1, help="steps in a block; the device is waited for at its end"
    )
    return parser.parse_args()


def settings(args: argparse.Namespace, gpu: bool) -> list[argparse.Namespace]:
    """Settings to time. `--all` stands for the sizes that the machine can do in minutes."""
    args.blocks = args.blocks or (4 if args.all else 10)
    if not args.all:
        return [args]
    small = {"arch": "resnet18_small", "size": 32, "batch": 512 if gpu else 64, "methods": METHODS}
    large = {"arch": "resnet50", "size": 224, "batch": 256 if gpu else 8, "methods": METHODS}
    target = {**large, "arch": "resnext101_32x16d", "methods": ("infer",)}
    steps = 10 if gpu else 1
    return [
        argparse.Namespace(**{**vars(args), "channels": 3, "steps": steps, **chosen})
        for chosen in (small, large, target)
    ]


def with_input(setting: jax_steps.Setting, name: str) -> jax_steps.Made:
    """A step with views cut in it, and images that come through the input pipeline."""
    import numpy as np

    from qmx import augment
    from qmx.data import batches
    from qmx.data.sources import in_memory

    size, look = setting.images.shape[1], jax_steps.look(setting)
    source = in_memory(
        image=np.tile(setting.images, (4, 1, 1, 1)), scores=np.tile(setting.scores, (4, 1))
    )
    views = augment.make_view(size, **look), augment.weak_view(size, **look)
    return jax_steps.train(
        setting, name, views, batches(source, len(setting.images), steps=1 << 30, seed=0)
    )


def measure(args: argparse.Namespace, gpu: bool, peaks: dict[str, float]) -> list[dict]:
    """A row for each method on one network."""
    import jax
    import numpy as np

    from qmx.models import ARCHS

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.batch, args.size, args.size, args.channels), np.uint8)
    scores = rng.normal(size=(args.batch, 1000)).astype(np.float32)
    precision = "bfloat16" if gpu else "float32"
    setting = jax_steps.Setting(args.arch, images, scores, args.queue, precision)
    convolutions = layers(ARCHS[args.arch], args.size, args.channels)
    peers = {}
    if args.peer == "torch":
        import torch
        import torch_steps

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.backends.cudnn.benchmark = True
        make = partial(
            torch_steps.steps,
            ARCHS[args.arch],
            images,
            scores,
            queue=args.queue,
            groups=setting.groups,
            device="cuda" if gpu else "cpu",
            precision=precision,
        )
        peers = {"NHWC": make(channels_last=True), "NCHW": make(channels_last=False)}
        if args.compile:
            peers["compiled"] = make(channels_last=True, compiled=True)

    def wait(name, last):
        (
            jax.block_until_ready(last)
            if name in ("qmx", "input")
            else gpu and torch.cuda.synchronize()
        )

    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    rows, layout = [], ""
    for name in args.methods:
        step = jax_steps.infer(setting) if name == "infer" else jax_steps.train(setting, name)
        runs = {"qmx": step.run, **{peer: made[name]() for peer, made in peers.items()}}
        if args.input and name != "infer":
            runs["input"] = with_input(setting, name).run
        # The eager opponent is the layout that is quicker here, in the first step that is timed.
        if peers:
            eager = {peer: runs.pop(peer) for peer in ("NHWC", "NCHW")}
            if not layout:
                trial = in_turns(eager, 3, args.steps, wait, clock)
                layout = min(trial, key=lambda peer: min(trial[peer]))
            runs = {"qmx": step.run, "eager": eager[layout], **runs}
            del eager
        for peer, function in runs.items():
            for _ in range(2 if gpu else 1):  # a CPU's first step is as good as any after it
                wait(peer, function())
        times = in_turns(runs, args.blocks, args.steps, wait, clock)
        operations, roofline = bounds(name, convolutions, 2 if gpu else 4, peaks)
        middle = {peer: statistics.median(found) for peer, found in times.items()}
        low, _, high = statistics.quantiles(times["qmx"], n=4)
        row = {
            "arch": args.arch,
            "size": args.size,
            "batch": args.batch,
            "method": name,
            "ms": 1000 * middle["qmx"],
            "ms_quartiles": [1000 * low, 1000 * high],
            "images_per_second": args.batch / middle["qmx"],
            "tflops": operations * args.batch / middle["qmx"] / 1e12,
            "compile_seconds": step.seconds,
            "share_of_matmul": operations * args.batch / middle["qmx"] / peaks["matmul"],
            "share_of_roofline": roofline * args.batch / middle["qmx"],
            "memory_bytes": step.memory,
        }
        for peer in runs:
            if peer != "qmx":
                row[peer] = {
                    "ms": 1000 * middle[peer],
                    "ratio": middle[peer] / middle["qmx"],
                    "ratio_of_quickest": min(times[peer]) / min(times["qmx"]),
                }
        if peers:
            row["layout"] = layout
        rows.append(row)
        show(row)
    return rows


def show(row: dict) -> None:
    """One line of the table."""
    low, high = row["ms_quartiles"]
    memory = f"{row['memory_bytes'] / 1e6:.0f}" if row["memory_bytes"] else "?"
    cells = [
        f"{row['arch']} {row['size']} px, {row['batch']}",
        row["method"],
        f"{row['ms']:.1f}",
        f"{low:.1f} .. {high:.1f}",
        f"{row['images_per_second']:.1f}",
        f"{row['tflops']:.3f}",
        f"{100 * row['share_of_matmul']:.0f} %",
        f"{100 * row['share_of_roofline']:.0f} %",
        memory,
        f"{row['compile_seconds']:.1f}",
    ]
    for peer in ("eager", "compiled", "input"):
        if peer in row:
            name = f"{peer} {row['layout']}" if peer == "eager" else peer
            cells.append(
                f"{name}: {row[peer]['ms']:.1f} ms, {row[peer]['ratio']:.2f} "
                f"({row[peer]['ratio_of_quickest']:.2f})"
            )
    print(f"| {' | '.join(cells)} |", flush=True)


def main(args: argparse.Namespace) -> None:
    set_xla_flags()
    import jax

    gpu = jax.devices()[0].platform == "gpu"
    peaks = measured_peaks(gpu)
    print(f"matmul {peaks['matmul'] / 1e12:.3f} TFLOP/s, copy {peaks['copy'] / 1e9:.1f} GB/s")
    print(
        "| network, batch | step | ms | quartiles | images/s | TFLOP/s | of matmul | of roofline |"
        f" MB | compilation, s | others: ms, ratio (of the quickest) |\n|{'---|' * 11}"
    )
    rows = [row for chosen in settings(args, gpu) for row in measure(chosen, gpu, peaks)]
    machine = {
        "devices": jax.device_count(),
        "platform": jax.devices()[0].platform,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }
    if args.peer == "torch":
        import torch

        machine["torch"] = torch.__version__
    print(json.dumps({"arguments": vars(args), "machine": machine, "peaks": peaks, "rows": rows}))


if __name__ == "__main__":
    main(arguments())
