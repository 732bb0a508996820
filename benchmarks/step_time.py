"""Time of the jitted train step of each method, and of the target's inference, beside PyTorch.

    python benchmarks/step_time.py --arch=resnet18_small --size=32 --batch=64 --channels=3 --peer torch
    python benchmarks/step_time.py --all --peer torch    # the main table, at most ten minutes

Prints tables and, as the last line, JSON. The images are random and already on the device. Cutting views is not
part of a step here, since PyTorch alone has nothing like it: a view is the batch turned by a random number of images
(so that no two are the same) and normalised, on both sides. Queue, momentum encoder, statistics groups and optimiser
are part of the step on both sides. The target's batch norm is folded into its convolutions, on both sides.
Compilation is timed apart. The sides take turns, block by block, so that a machine whose speed drifts drifts for all;
the ratio is of medians (PyTorch's time over qmx's: above 1, qmx is faster), and of the quickest blocks, which other
work on the machine disturbed least. PyTorch runs eagerly in the layout that is quicker here, `--compile` adds
torch.compile; bfloat16 on a GPU, float32 on a CPU. `--input` adds qmx's step with real views, cut from images that
come through the input pipeline.

Operations are those of the convolutions, with padded taps: three forwards less the first layer's input gradient. The
roofline is section C of what XLA can do: per convolution the larger of its operations and of its bytes, 11 outputs +
3 inputs in training, one of each in inference, at the matmul and copy rates that this call measured.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial

from limits import TIMES_FORWARD, bounds, layers, measured_peaks

from qmx.main import set_xla_flags

METHODS = ("distill", "moco", "simsiam", "rotation")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the main table: two networks and the target")
    parser.add_argument("--arch", default="resnet8")
    parser.add_argument("--size", type=int, default=8, help="side of the images and views, in pixels")
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3))
    parser.add_argument("--batch", type=int, default=128, help="global")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=TIMES_FORWARD, help="infer is the target's")
    parser.add_argument("--queue", type=int, default=4096, help="MoCo's K, a multiple of the batch")
    parser.add_argument("--peer", choices=("none", "torch"), default="none")
    parser.add_argument("--compile", action="store_true", help="torch.compile too; on a CPU it needs a C++ compiler")
    parser.add_argument("--input", action="store_true", help="also with real views from the input pipeline")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: this process's CPU time, for one core (taskset -c 0) of a machine that others use")
    parser.add_argument("--blocks", type=int, help="10 by default, and 4 with --all")
    parser.add_argument("--steps", type=int, default=1, help="steps in a block; the device is waited for at its end")
    return parser.parse_args()


def settings(args: argparse.Namespace, gpu: bool) -> list[argparse.Namespace]:
    """What `--all` stands for: the sizes that the machine can do in minutes."""
    args.blocks = args.blocks or (4 if args.all else 10)
    if not args.all:
        return [args]
    small = {"arch": "resnet18_small", "size": 32, "batch": 512 if gpu else 64, "methods": METHODS}
    large = {"arch": "resnet50", "size": 224, "batch": 256 if gpu else 8, "methods": METHODS}
    target = {**large, "arch": "resnext101_32x16d", "methods": ("infer",)}
    steps = 10 if gpu else 1
    return [argparse.Namespace(**{**vars(args), "channels": 3, "steps": steps, **chosen})
            for chosen in (small, large, target)]


def ours(args: argparse.Namespace, images, scores, gpu: bool):
    """name -> () -> (a function that does one step, seconds of compilation, bytes of memory at the peak)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qmx import augment, distill, init_state, make_step, moco, models, optim, rotation, simsiam
    from qmx.contract import chain
    from qmx.sharding import put_batch, put_state

    look = {"mean": (0.5,) * args.channels, "std": (0.25,) * args.channels}
    dtype = jnp.bfloat16 if gpu else jnp.float32
    net = partial(models.backbone, args.arch, dtype=dtype)
    plain = augment.plain_view(**look)

    def turned(rng, batch):
        return plain(rng, {"image": jnp.roll(batch["image"], jax.random.randint(rng, (), 0, len(batch["image"])), 0)})

    def method(name, strong, weak):
        if name == "distill":
            return distill.make(net(), models.classifier(scores.shape[1]), weak)
        if name == "moco":
            return moco.make(net(stats_groups=groups(args)), models.moco_head(), strong, queue_size=args.queue)
        if name == "simsiam":
            return simsiam.make(net(zero_init=True), models.simsiam_projector(), models.simsiam_predictor(), strong)
        return rotation.make(net(), models.classifier(4), weak)

    batch, root = put_batch({"image": images, "scores": scores}), jax.random.key(0)

    def compile(function, *arguments):
        began = time.perf_counter()
        compiled = function.lower(*arguments).compile()
        seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
        return compiled, seconds, memory and memory.temp_size_in_bytes + memory.argument_size_in_bytes

    def train(name, views=(turned, turned), batches=None):
        tx = optim.sgd(lambda step: 0.01, weight_decay=1e-4)
        chosen = method(name, *views)
        state = put_state(jax.jit(lambda rng: init_state(chosen, tx, rng, batch))(root))
        step, *cost = compile(make_step(chosen, tx), state, batch, root)

        def one():
            nonlocal state
            state, metrics = step(state, next(batches) if batches else batch, root)
            return metrics
        return one, *cost

    def infer():
        network = chain(backbone=net(folded=True), head=models.classifier(scores.shape[1]))
        params, stats = jax.jit(network.init)(root, jnp.zeros((2, *images.shape[1:])))
        step, *cost = compile(jax.jit(lambda p, b: network.apply(p, stats, plain(root, b), False)[0]), params, batch)
        return partial(step, params, batch), *cost

    def with_input(name):
        """The step with views cut in it, and images that come through the input pipeline."""
        from qmx.data import batches
        from qmx.data.sources import in_memory

        source = in_memory(image=np.tile(images, (4, 1, 1, 1)), scores=np.tile(scores, (4, 1)))
        views = augment.make_view(args.size, **look), augment.weak_view(args.size, **look)
        return train(name, views, batches(source, args.batch, steps=1 << 30, seed=0))

    makers = {name: partial(train, name) for name in METHODS}
    return {**makers, "infer": infer}, with_input


def groups(args: argparse.Namespace) -> int:
    """Of MoCo's batch statistics, 32 images each."""
    return max(args.batch // 32, 1)


def timed(runs: dict, args: argparse.Namespace, wait) -> dict[str, list[float]]:
    """Seconds of a step in each block, for each of the functions, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    for _ in range(args.blocks):
        for name, run in runs.items():
            began = clock()
            for _ in range(args.steps):
                last = run()
            wait(name, last)
            times[name].append((clock() - began) / args.steps)
    return times


def measure(args: argparse.Namespace, gpu: bool, peaks: dict[str, float]) -> list[dict]:
    """A row for each method on one network."""
    import jax
    import numpy as np

    from qmx.models import ARCHS

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.batch, args.size, args.size, args.channels), np.uint8)
    scores = rng.normal(size=(args.batch, 1000)).astype(np.float32)
    makers, with_input = ours(args, images, scores, gpu)
    convolutions = layers(ARCHS[args.arch], args.size, args.channels)
    peers = {}
    if args.peer == "torch":
        import torch
        import torch_steps

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.backends.cudnn.benchmark = True
        make = partial(torch_steps.steps, ARCHS[args.arch], images, scores, queue=args.queue, groups=groups(args),
                       device="cuda" if gpu else "cpu")
        peers = {"NHWC": make(channels_last=True), "NCHW": make(channels_last=False)}
        if args.compile:
            peers["compiled"] = make(channels_last=True, compiled=True)

    def wait(name, last):
        jax.block_until_ready(last) if name in ("qmx", "input") else gpu and torch.cuda.synchronize()

    rows, layout = [], ""
    for name in args.methods:
        run, seconds, memory = makers[name]()
        runs = {"qmx": run, **{peer: made[name]() for peer, made in peers.items()}}
        if args.input and name != "infer":
            runs["input"] = with_input(name)[0]
        if peers:  # the eager opponent is the layout that is quicker here, in the first step that is timed
            eager = {peer: runs.pop(peer) for peer in ("NHWC", "NCHW")}
            if not layout:
                trial = timed(eager, argparse.Namespace(blocks=3, steps=args.steps, clock=args.clock), wait)
                layout = min(trial, key=lambda peer: min(trial[peer]))
            runs = {"qmx": run, "eager": eager[layout], **runs}
            del eager
        for peer, function in runs.items():
            for _ in range(2 if gpu else 1):  # a CPU's first step is as good as any after it
                wait(peer, function())
        times = timed(runs, args, wait)
        operations, roofline = bounds(name, convolutions, 2 if gpu else 4, peaks)
        middle = {peer: statistics.median(found) for peer, found in times.items()}
        low, _, high = statistics.quantiles(times["qmx"], n=4)
        row = {"arch": args.arch, "size": args.size, "batch": args.batch, "method": name, "ms": 1000 * middle["qmx"],
               "ms_quartiles": [1000 * low, 1000 * high], "images_per_second": args.batch / middle["qmx"],
               "tflops": operations * args.batch / middle["qmx"] / 1e12, "compile_seconds": seconds,
               "share_of_matmul": operations * args.batch / middle["qmx"] / peaks["matmul"],
               "share_of_roofline": roofline * args.batch / middle["qmx"], "memory_bytes": memory}
        for peer in runs:
            if peer != "qmx":
                row[peer] = {"ms": 1000 * middle[peer], "ratio": middle[peer] / middle["qmx"],
                             "ratio_of_quickest": min(times[peer]) / min(times["qmx"])}
        if peers:
            row["layout"] = layout
        rows.append(row)
        show(row)
    return rows


def show(row: dict) -> None:
    """One line of the table."""
    low, high = row["ms_quartiles"]
    memory = f"{row['memory_bytes'] / 1e6:.0f}" if row["memory_bytes"] else "?"
    cells = [f"{row['arch']} {row['size']} px, {row['batch']}", row["method"], f"{row['ms']:.1f}",
             f"{low:.1f} .. {high:.1f}", f"{row['images_per_second']:.1f}", f"{row['tflops']:.3f}",
             f"{100 * row['share_of_matmul']:.0f} %",
             f"{100 * row['share_of_roofline']:.0f} %", memory, f"{row['compile_seconds']:.1f}"]
    for peer in ("eager", "compiled", "input"):
        if peer in row:
            name = f"{peer} {row['layout']}" if peer == "eager" else peer
            cells.append(f"{name}: {row[peer]['ms']:.1f} ms, {row[peer]['ratio']:.2f} "
                         f"({row[peer]['ratio_of_quickest']:.2f})")
    print(f"| {' | '.join(cells)} |", flush=True)


def main(args: argparse.Namespace) -> None:
    set_xla_flags()
    import jax

    gpu = jax.devices()[0].platform == "gpu"
    peaks = measured_peaks(gpu)
    print(f"matmul {peaks['matmul'] / 1e12:.3f} TFLOP/s, copy {peaks['copy'] / 1e9:.1f} GB/s")
    print("| network, batch | step | ms | quartiles | images/s | TFLOP/s | of matmul | of roofline | MB "
          f"| compilation, s | others: ms, ratio (of the quickest) |\n|{'---|' * 11}")
    rows = [row for chosen in settings(args, gpu) for row in measure(chosen, gpu, peaks)]
    machine = {"devices": jax.device_count(), "platform": jax.devices()[0].platform,
               "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
    if args.peer == "torch":
        import torch

        machine["torch"] = torch.__version__
    print(json.dumps({"arguments": vars(args), "machine": machine, "peaks": peaks, "rows": rows}))


if __name__ == "__main__":
    main(arguments())
