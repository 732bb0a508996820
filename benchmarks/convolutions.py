"""Where a step's time goes on a CPU: every convolution of a network and its two gradients, each
alone, beside PyTorch.

    python benchmarks/convolutions.py --arch=resnet18_small --size=32 --batch=64

Convolutions of one shape are timed once and counted as often as they occur; the sides take turns.
PyTorch runs in channels_last. Prints GFLOP/s, padded taps counted, the sums over the network, and,
as the last line, JSON.
"""

import argparse
import collections
import json
import os
import statistics
import time

from limits import Conv, layers, measured_peaks

from qmx.main import set_xla_flags

PARTS = ("forward", "input gradient", "kernel gradient")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet18_small")
    parser.add_argument("--size", type=int, default=32, help="side of the images, in pixels")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=9)
    return parser.parse_args()


def timed(conv: Conv, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Seconds of qmx and of PyTorch for each part, medians."""
    import jax
    import torch

    from qmx.models.conv import convolve

    def apply(x, kernel):
        return convolve(x, kernel, conv.stride, conv.groups)

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (args.batch, conv.side, conv.side, conv.entering))
    kernel = jax.random.normal(
        keys[1], (conv.kernel, conv.kernel, conv.entering // conv.groups, conv.leaving)
    )
    dy = jax.random.normal(keys[2], (args.batch, conv.out, conv.out, conv.leaving))
    ours = {
        "forward": jax.jit(lambda x, k, dy: apply(x, k)),
        "input gradient": jax.jit(lambda x, k, dy: jax.vjp(lambda x: apply(x, k), x)[1](dy)),
        "kernel gradient": jax.jit(lambda x, k, dy: jax.vjp(lambda k: apply(x, k), k)[1](dy)),
    }

    # Of random numbers of its own, in channels_last.
    its_x, its_dy = (torch.randn(*a.shape).permute(0, 3, 1, 2) for a in (x, dy))
    its_kernel = (
        torch.randn(*kernel.shape).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    )
    shape = [conv.stride] * 2, [conv.kernel // 2] * 2, [1, 1]

    def backward(*wanted: bool):
        return torch.ops.aten.convolution_backward(
            its_dy, its_x, its_kernel, None, *shape, False, [0, 0], conv.groups, wanted
        )

    theirs = {
        "forward": lambda: torch.nn.functional.conv2d(its_x, its_kernel, None, *shape, conv.groups),
        "input gradient": lambda: backward(True, False, False),
        "kernel gradient": lambda: backward(False, True, False),
    }
    found = {}
    for part in PARTS:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(args.blocks + 1):
            for run, seconds in zip(
                (lambda p=part: jax.block_until_ready(ours[p](x, kernel, dy)), theirs[part]),
                times,
                strict=True,
            ):
                began = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - began)
        # The first compiled.
        found[part] = (statistics.median(times[0][1:]), statistics.median(times[1][1:]))
    return found


def main(args: argparse.Namespace) -> None:
    set_xla_flags()
    import torch

    from qmx.models import ARCHS

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peaks = measured_peaks(False)
    print(f"matmul {peaks['matmul'] / 1e9:.0f} GFLOP/s")
    print(
        f"| convolution | times | {' | '.join(f'{part}: qmx, PyTorch' for part in PARTS)}"
        f" |\n|{'---|' * 5}"
    )
    counts = collections.Counter(layers(ARCHS[args.arch], args.size, args.channels))
    rows, sums = [], {part: [0.0, 0.0] for part in PARTS}
    for conv, times in counts.items():
        found = timed(conv, args)
        for part, sides in found.items():
            sums[part] = [
                whole + times * seconds for whole, seconds in zip(sums[part], sides, strict=True)
            ]
        work = args.batch * conv.operations / 1e9
        cells = [f"{work / one:.0f}, {work / other:.0f}" for one, other in found.values()]
        name = (
            f"{conv.kernel}x{conv.kernel} {conv.entering} -> {conv.leaving} at {conv.side} /"
            f" {conv.stride}"
        )
        print(
            f"| {name}{f', {conv.groups} groups' if conv.groups > 1 else ''} | {times} |"
            f" {' | '.join(cells)} |",
            flush=True,
        )
        rows.append({**conv._asdict(), "times": times, "seconds": found})
    totals = [f"{part} {1000 * one:.0f}, {1000 * other:.0f}" for part, (one, other) in sums.items()]
    print(f"sums, ms: {'; '.join(totals)}")
    print(json.dumps({"arguments": vars(args), "peaks": peaks, "rows": rows, "sums": sums}))


if __name__ == "__main__":
    main(arguments())
