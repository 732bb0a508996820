"""The part `steps` of gpu.py: every train step and the target's inference, beside PyTorch.

A row is one step on synthetic images that are on the device. The sides take turns, block by block;
a figure is the median of its blocks, a ratio PyTorch's over qmx's: above 1, qmx is quicker.
PyTorch is eager (channels_last, autocast, cudnn.benchmark), or compiled by torch.compile, which
comes later, beside qmx once more, since it compiles for as long as all else takes. In rotation a
batch is four times as many images for the network; at half the batch it leaves room for PyTorch.

Rows of an earlier call in the same folder are kept, if card and versions are the same.
"""

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax_steps
import numpy as np
from gpu_call import Call, one_block, reason
from gpu_machine import facts, peaks
from gpu_steps_table import PEERS, show
from jax_steps import in_turns
from limits import bounds, layers

from qmx.models import ARCHS


class Work(NamedTuple):
    """A row of the table."""

    method: str  # one of limits.TIMES_FORWARD
    arch: str = "resnet50"
    size: int = 224
    batch: int = 256
    queue: int = 65536  # MoCo's
    precision: str = "bfloat16"

    @property
    def name(self) -> str:
        queue = f", queue {self.queue:,}" if self.method == "moco" else ""
        return (
            f"{self.method}, {self.arch}, {self.size} px, batch {self.batch}{queue}, "
            f"{self.precision}"
        )


def plan(call: Call) -> list[tuple[Work, str]]:
    """The rows, each with the peer that is timed beside it, the most telling first."""
    eager, compiled = "eager", "compiled"
    if call.tiny:
        small = {"arch": one_block(), "size": 8, "batch": 8, "queue": 64}
        distil, moco, infer = (Work(name, **small) for name in ("distill", "moco", "infer"))
        rows = [
            (distil, eager),
            (moco, eager),
            (infer, eager),
            (infer._replace(precision="float32"), eager),
            (infer, compiled),
        ]
    else:
        distil, moco, simsiam, rotation = map(Work, jax_steps.METHODS)
        infer = Work("infer", arch="resnext101_32x16d")
        tf32, float32 = infer._replace(precision="tf32"), infer._replace(precision="float32")
        short, few = moco._replace(queue=4096), rotation._replace(batch=128)
        half, double = distil._replace(batch=128), distil._replace(batch=512)
        rows = [
            (distil, eager),
            (moco, eager),
            (infer, eager),
            (simsiam, eager),
            (distil, compiled),
            (few, eager),
            (tf32, eager),
            (float32, eager),
            (short, eager),
            (half, eager),
            (double, eager),
            (infer, compiled),
            (moco, compiled),
            (simsiam, compiled),
            (rotation, eager),
            (few, compiled),
            (tf32, compiled),
            (float32, compiled),
        ]
    return [(work, peer) for work, peer in rows if peer == eager or peer in call.peers]


def steps(call: Call) -> str:
    """Measure the rows in their order; those that do not fit are named."""
    there, rates = facts(call), {}
    if "torch" not in there:
        call = call._replace(peers=())
    todo = plan(call)
    rows = {work.name: {"work": work._asdict()} for work, _ in todo}
    rows |= kept(call, there, rates, rows)
    left_out: list[str] = []
    # Guesses, until there was one. On an H100 torch.compile took 46 s for distillation's row and
    # more than 80 for MoCo's.
    longest = dict.fromkeys(PEERS, 8.0) if call.tiny else {"eager": 60.0, "compiled": 150.0}
    show(call, there, rates, rows)
    for work, peer in todo:
        row = rows[work.name]
        if "ms" in row and (peer in row or peer not in call.peers):
            continue
        left = call.until - time.monotonic()
        if left < longest[peer]:
            left_out.append(f"{work.name} ({PEERS[peer]})")
            continue
        began = time.monotonic()
        found = measure(call, work, peer, rates)
        free()
        row.pop("error", None)
        # Beside another peer qmx is timed again; its figure is the first one.
        row.update({peer: found[peer]} if "ms" in row and peer in found else found)
        longest[peer] = time.monotonic() - began
        show(call, there, rates, rows)
    return f"left out for want of time: {'; '.join(left_out)}" if left_out else ""


def kept(call: Call, there: dict, rates: dict[str, float], rows: dict) -> dict[str, dict]:
    """Rows that an earlier call measured on this card with these versions; rates go to `rates`."""
    path = call.out / "steps.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    if old.get("machine") != there:
        return {}
    rates |= old["rates"]
    return {name: row for name, row in old["rows"].items() if name in rows}


def measure(call: Call, work: Work, peer: str, rates: dict[str, float]) -> dict[str, Any]:
    """The figures of a row; what fails on either side stands there in words."""
    try:
        limits = peaks(call, rates, work.precision)
        setting = make_setting(work)
        before = compilations()
        made = (
            jax_steps.infer(setting)
            if work.method == "infer"
            else jax_steps.train(setting, work.method)
        )
        new = compilations() > before
        figures: dict[str, Any] = {
            "compile_seconds": made.seconds,
            "compiled_before": not new,
            "memory_bytes": made.memory,
        }
        runs = {"qmx": made.run}
        block = warm(call, made.run, jax.block_until_ready)
    except Exception as error:
        return {"error": reason(error)}
    torch = None
    if peer in call.peers:
        try:
            torch, other = opponent(setting, work, peer)
            began = time.perf_counter()
            block = max(1, min(block, warm(call, other, lambda _: settle(torch))))
            figures[peer] = {"start_seconds": time.perf_counter() - began}
            runs[peer] = other
        except Exception as error:  # PyTorch is missing, has no compiler, has no room
            figures[peer] = {"error": reason(error)}

    def wait(name: str, last: Any) -> None:
        jax.block_until_ready(last) if name == "qmx" else settle(torch)

    try:
        if torch and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        times = in_turns(runs, 3 if call.tiny else 10, block, wait)
        figures |= of_qmx(work, times["qmx"], limits)
        if peer in runs:
            figures[peer] |= of_peer(times, peer, torch)
    except Exception as error:
        figures["error"] = reason(error)
    return figures


def make_setting(work: Work) -> jax_steps.Setting:
    """Random images and scores of a row's sizes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (work.batch, work.size, work.size, 3), np.uint8)
    scores = rng.normal(size=(work.batch, 1000)).astype(np.float32)
    return jax_steps.Setting(work.arch, images, scores, work.queue, work.precision)


def opponent(setting: jax_steps.Setting, work: Work, peer: str) -> tuple[Any, Callable]:
    """PyTorch, after jax, since who loads cuDNN first gives it to both; and the same step there."""
    import torch
    import torch_steps

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    torch.backends.cudnn.benchmark = True
    if peer == "compiled":
        torch._dynamo.reset()
    make = torch_steps.steps(
        ARCHS[work.arch],
        setting.images,
        setting.scores,
        queue=work.queue,
        groups=setting.groups,
        channels_last=True,
        compiled=peer == "compiled",
        device="cuda" if torch.cuda.is_available() else "cpu",
        precision=work.precision,
    )
    return torch, make[work.method]()


def settle(torch: Any) -> None:
    """Wait for PyTorch's device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def warm(call: Call, run: Callable, wait: Callable[[Any], Any]) -> int:
    """Do some steps; returns how many make a block of about a third of a second."""
    wait(run())
    if call.tiny:
        return 1
    for _ in range(4):
        last = run()
    wait(last)
    began = time.perf_counter()
    wait(run())
    return max(1, min(20, round(0.33 / (time.perf_counter() - began))))


def compilations() -> int:
    """Programs in the compilation cache."""
    path = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    return len([name for name in os.listdir(path) if name.endswith("-cache")]) if path else 0


def free() -> None:
    """Give back what a row took, on both sides, since they share the card."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()


def of_qmx(work: Work, times: list[float], limits: dict[str, float]) -> dict[str, Any]:
    """The figures of qmx's side."""
    operations, roofline = bounds(
        work.method,
        layers(ARCHS[work.arch], work.size, 3),
        2 if work.precision == "bfloat16" else 4,
        limits,
    )
    middle = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    return {
        "ms": 1000 * middle,
        "ms_quartiles": [1000 * low, 1000 * high],
        "images_per_second": work.batch / middle,
        "tflops": operations * work.batch / middle / 1e12,
        "share_of_matmul": operations * work.batch / middle / limits["matmul"],
        "share_of_roofline": roofline * work.batch / middle,
    }


def of_peer(times: dict[str, list[float]], peer: str, torch: Any) -> dict[str, Any]:
    """The figures of PyTorch's side, and qmx's beside it."""
    middle, ours = statistics.median(times[peer]), statistics.median(times["qmx"])
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "ms": 1000 * middle,
        "qmx_ms": 1000 * ours,
        "ratio": middle / ours,
        "memory_bytes": memory,
    }
