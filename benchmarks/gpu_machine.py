"""The part `machine` of gpu.py: card, driver, versions, and the rates all else is held against."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
from gpu_call import Call, Skipped, save, table
from limits import copy_rate, matmul_rate

from qmx.targets.query import PRECISIONS

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "triton")
RATES = ("bfloat16", "tf32", "float32")
LOAD = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def machine(call: Call) -> str:
    """Measure the rates; the facts are there before them."""
    there = facts(call)
    rates: dict[str, float] = {}
    show(call, there, rates, {})
    for name in RATES:
        rates[name] = products(call, name)
        show(call, there, rates, {})
    rates["copy"] = copies(call)
    show(call, there, rates, {})
    if busy := under_load(call):
        show(call, there, rates, busy)
    return ""


def facts(call: Call) -> dict[str, Any]:
    """The machine in words. Skipped on a CPU, unless the form is tiny."""
    device = jax.devices()[0]
    if device.platform == "cpu" and not call.tiny:
        raise Skipped("no accelerator is there; --tiny is the form for a CPU")
    smi = asked("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
    runtime = " ".join(str(getattr(device.client, "platform_version", "")).split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "card": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "runtime": runtime,
        **{f"nvidia-smi {key}": value for key, value in smi.items()},
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "host memory": f"{memory / 2**30:.0f} GiB",
        **{name: found for name in PACKAGES if (found := installed(name))},
    }


def installed(name: str) -> str:
    """The version of a package; "" if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def asked(*fields: str) -> dict[str, str]:
    """The first card's values of some fields of nvidia-smi; none where there is no such command."""
    if not shutil.which("nvidia-smi"):
        return {}
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return {}
    return dict(zip(fields, map(str.strip, out.splitlines()[0].split(",")), strict=False))


def products(call: Call, precision: str) -> float:
    """Operations a second of one large matrix product."""
    n, calls = (256, 1) if call.tiny else (8192, 20)
    dtype, how = PRECISIONS[precision]
    return matmul_rate(n, dtype, how, calls)


def copies(call: Call) -> float:
    """Bytes a second that a copy reads and writes."""
    return copy_rate(1 << 20 if call.tiny else 1 << 29, 1 if call.tiny else 20)


def under_load(call: Call) -> dict[str, str]:
    """Clocks, power and temperature while products run: a card that is throttled shows here."""
    if not asked(*LOAD):
        return {}
    a = jax.random.normal(jax.random.key(0), (8192, 8192), "bfloat16")
    product = jax.jit(lambda a, b: a @ b * 1e-2)
    b = a
    for _ in range(1500):  # about two seconds of work, waiting on the device
        b = product(a, b)
    found = asked(*LOAD)
    jax.block_until_ready(b)
    return found


def peaks(call: Call, rates: dict[str, float], precision: str) -> dict[str, float]:
    """The two rates that `limits.bounds` takes, out of `rates`, where they are put if measured."""
    if precision not in rates:
        rates[precision] = products(call, precision)
    if "copy" not in rates:
        rates["copy"] = copies(call)
    return {"matmul": rates[precision], "copy": rates["copy"]}


def show(call: Call, there: dict, rates: dict[str, float], busy: dict[str, str]) -> None:
    """The tables so far."""
    lines = [(f"matrix product, {name}, TFLOP/s", 1e-12 * rates.get(name, 0)) for name in RATES]
    lines.append(("copy, read and written, GB/s", 1e-9 * rates.get("copy", 0)))
    cells = [(name, f"{rate:.4g}" if rate else "not measured") for name, rate in lines]
    text = "\n\n".join(
        [table(("rate", "the best of six"), cells), table(("machine", ""), list(there.items()))]
    )
    if busy:
        text += "\n\n" + table(("while products run", ""), list(busy.items()))
    save(call, "machine", {"machine": there, "rates": rates, "under_load": busy}, text)
