"""Least cost of a step: operations and bytes of a network's convolutions, and the machine's limits.

Operations count padded taps too. A step's are three forwards less the first layer's input gradient,
and its bytes, per convolution, 11 outputs + 3 inputs: what XLA moves at best with batch norm and
ReLU as passes of their own.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

TIMES_FORWARD = {"distill": 3, "moco": 4, "simsiam": 6, "rotation": 12, "infer": 1}


class Conv(NamedTuple):
    """One convolution of a network."""

    side: int  # of its input, in pixels
    entering: int  # channels
    leaving: int
    kernel: int
    stride: int
    groups: int

    @property
    def out(self) -> int:
        """Side of its output."""
        return -(-self.side // self.stride)

    @property
    def operations(self) -> int:
        """Of one image, forward."""
        return 2 * self.out**2 * self.leaving * self.kernel**2 * self.entering // self.groups


def layers(arch, size: int, channels: int) -> list[Conv]:
    """The convolutions of a network, in their order."""
    found = []

    def conv(side, entering, leaving, kernel, stride, groups=1):
        found.append(Conv(side, entering, leaving, kernel, stride, groups))
        return found[-1].out

    side, width = size, arch.width
    side = conv(side, channels, width, *((7, 2) if arch.stem == "large" else (3, 1)))
    side = -(-side // 2) if arch.stem != "small" else side
    for stage, count in enumerate(arch.blocks):
        for index in range(count):
            planes, stride = arch.width * 2**stage, 2 if stage and not index else 1
            out = planes * 4 if arch.bottleneck else planes
            if stride != 1 or width != out:
                conv(side, width, out, 1, stride)
            if arch.bottleneck:
                inner = int(planes * arch.width_per_group / 64) * arch.groups
                conv(side, width, inner, 1, 1)
                side = conv(side, inner, inner, 3, stride, arch.groups)
                conv(side, inner, out, 1, 1)
            else:
                side = conv(side, width, out, 3, stride)
                conv(side, out, out, 3, 1)
            width = out
    return found


def bounds(
    method: str, convolutions, itemsize: int, peaks: dict[str, float]
) -> tuple[float, float]:
    """(Operations, seconds at the roofline) of one image's share of a step."""
    forward = sum(conv.operations for conv in convolutions)
    passes = TIMES_FORWARD[method]
    backwards = {"distill": 1, "moco": 1, "simsiam": 2, "rotation": 4, "infer": 0}[method]
    seconds = 0.0
    for conv in convolutions:
        entering, leaving = conv.side**2 * conv.entering, conv.out**2 * conv.leaving
        trained = max(
            3 * conv.operations / peaks["matmul"],
            (11 * leaving + 3 * entering) * itemsize / peaks["copy"],
        )
        plain = max(
            conv.operations / peaks["matmul"], (leaving + entering) * itemsize / peaks["copy"]
        )
        seconds += backwards * trained + (passes - 3 * backwards) * plain
    return passes * forward - backwards * convolutions[0].operations, seconds


def measured_peaks(gpu: bool) -> dict[str, float]:
    """The best of a few: operations a second of one large matrix product, bytes a second read and
    written by a copy."""
    n, dtype, calls = (8192, "bfloat16", 20) if gpu else (2048, "float32", 1)
    return {
        "matmul": matmul_rate(n, dtype, None, calls),
        "copy": copy_rate(1 << 29 if gpu else 1 << 24, calls),
    }


def matmul_rate(n: int, dtype: str, products: str | None, calls: int = 1) -> float:
    """Operations a second of the product of two n x n matrices; `products` as
    jax.default_matmul_precision has it."""
    import jax

    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    with jax.default_matmul_precision(products):
        product = jax.jit(lambda a: a @ a).lower(a).compile()
    return 2 * n**3 / best_seconds(lambda: product(a), calls)


def copy_rate(count: int, calls: int = 1) -> float:
    """Bytes a second that are read and written by adding one to `count` numbers in float32."""
    import jax

    x = jax.numpy.ones(count, "float32")
    more = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / best_seconds(lambda: more(x), calls)


def best_seconds(run: Callable, calls: int, blocks: int = 6) -> float:
    """Seconds of a call in the quickest block of `calls`, at whose end the device is waited for."""
    import jax

    seconds = []
    for _ in range(blocks):
        began = time.perf_counter()
        for _ in range(calls):
            last = run()
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - began) / calls)
    return min(seconds)
