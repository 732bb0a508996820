"""The part `trace` of gpu.py: where the time of a step goes, by the jax profiler.

Kernels are told apart by their own names and by the instruction of the compiled program that
started them. Idle is the span of the steps less the union of the kernels' intervals. On a CPU
the instructions themselves stand for kernels, on whatever threads they ran.

gpu.py sets XLA_FLAGS=--xla_gpu_enable_command_buffer= for it, since of a kernel inside a command
buffer the profile does not say the instruction (openxla/xprof#3070). How long a step takes is said
by the part `steps`, with command buffers and without a profiler.
"""

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax_steps
from gpu_call import Call, save, table
from gpu_machine import facts
from gpu_steps import Work, make_setting, plan

STEPS, LONGEST = 3, 15
# The first pattern that is found in a kernel's name, or in its instruction's, says the class.
CLASSES = (
    ("transposes", r"transpose|nchwtonhwc|nhwctonchw"),
    ("copies", r"\bcopy|_copy|memcpy|memset"),
    ("pooling", r"reduce.?window|select.?and.?scatter"),
    (
        "convolutions",
        r"convolution|conv_general|convforward|convbackward|cudnn" r"|fprop|dgrad|wgrad|implicit",
    ),
    ("matrix products", r"gemm|cublas|nvjet|\bdot|matmul|cutlass"),
    ("sorting and random numbers", r"\bsort|_sort|rng|threefry|random|bits"),
)
BY_SOURCE = {"conv_general_dilated": "convolutions", "dot_general": "matrix products"}
REST = ("optimiser and gradient norm", "reductions", "elementwise", "others")


class Kernel(NamedTuple):
    """One event of the profile, in nanoseconds."""

    name: str
    instruction: str  # of the compiled program; "" if it is not said
    start: float
    duration: float


class Instruction(NamedTuple):
    """One line of the compiled program."""

    opcode: str
    target: str  # of a custom call, or the kind of a fusion
    source: str  # the operation in the Python program


def trace(call: Call) -> str:
    """Profile the steps of distil and of MoCo, some after the other."""
    there, found = facts(call), {}
    works = [work for work, peer in plan(call)[:2] if peer == "eager"]
    for work in works:
        found[work.name] = one(call, work)
        text = "\n\n".join(tables(name, each) for name, each in found.items())
        save(call, "trace", {"machine": there, "steps": STEPS, "traces": found}, text)
    return ""


def one(call: Call, work: Work) -> dict[str, Any]:
    """The time of one step by classes and by kernels."""
    made = jax_steps.train(make_setting(work), work.method)
    for _ in range(3):
        last = made.run()
    jax.block_until_ready(last)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    directory = call.work / "trace" / work.method
    before = set(directory.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(directory), profiler_options=options):
        began = time.perf_counter()
        for _ in range(STEPS):
            last = made.run()
        jax.block_until_ready(last)
        seconds = time.perf_counter() - began
    files = sorted(set(directory.rglob("*.xplane.pb")) - before)
    return summary(list(kernels(files)), program(made.compiled.as_text())) | {
        "ms_traced": 1000 * seconds / STEPS
    }


def kernels(files: Iterable[Path]) -> Iterator[Kernel]:
    """Events on the streams of a device, or on a CPU those of the program's instructions."""
    device = jax.default_backend() != "cpu"
    planes = [
        plane for path in files for plane in jax.profiler.ProfileData.from_file(str(path)).planes
    ]
    for plane in planes:
        if device and not plane.name.startswith("/device:"):  # the host's, who only starts kernels
            continue
        for line in plane.lines:
            if device and not line.name.startswith("Stream"):  # derived lines, counters, overhead
                continue
            for event in line.events:
                instruction = str(dict(event.stats).get("hlo_op", ""))
                if device or instruction:
                    yield Kernel(event.name, instruction, event.start_ns, event.duration_ns)


def program(text: str) -> dict[str, Instruction]:
    """The instructions of a compiled program by their names."""
    found = {}
    for line in text.splitlines():
        head = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)", line)
        if head and (opcode := re.search(r"(?:^| )([a-z][a-z0-9\-]*)\(", head[2])):

            def said(pattern: str, line: str = line) -> str:
                return match[1] if (match := re.search(pattern, line)) else ""

            target = said(r'custom_call_target="([^"]*)"') or said(r"kind=(k\w+)")
            found[head[1]] = Instruction(opcode[1], target, said(r'op_name="([^"]*)"'))
    return found


def classify(kernel: Kernel, instructions: dict[str, Instruction]) -> str:
    """The class of a kernel."""
    instruction = instructions.get(kernel.instruction)
    opcode, target, source = instruction or ("", "", "")
    words = f"{kernel.name} {kernel.instruction} {opcode} {target}".lower()
    for name, pattern in CLASSES:
        if re.search(pattern, words):
            return name
    last = source.rpartition("/")[2]
    if last in BY_SOURCE and (opcode == "custom-call" or target == "kCustom"):
        return BY_SOURCE[last]
    if source and "jvp" not in source:  # the loss and its gradient are all under jvp
        return REST[0]
    if "reduce" in words or last.startswith("reduce"):
        return REST[1]
    return REST[2] if opcode else REST[3]


def summary(found: list[Kernel], instructions: dict[str, Instruction]) -> dict[str, Any]:
    """Milliseconds a step by class and by kernel, and the time that nothing ran.

    Raises:
      ValueError: the profile holds no kernel.
    """
    if not found:
        raise ValueError("the profile holds no kernel; on a GPU it needs CUPTI")
    classes: dict[str, float] = defaultdict(float)
    single: dict[tuple[str, str], list[float]] = defaultdict(list)
    example: dict[tuple[str, str], str] = {}
    for kernel in found:
        kind = classify(kernel, instructions)
        classes[kind] += kernel.duration
        single[kernel.name, kind].append(kernel.duration)
        source = instructions.get(kernel.instruction, Instruction("", "", "")).source
        example.setdefault((kernel.name, kind), source)
    busy, end = 0.0, 0.0
    ordered = sorted(found, key=lambda kernel: kernel.start)
    for kernel in ordered:
        stop = kernel.start + kernel.duration
        busy += max(0.0, stop - max(end, kernel.start))
        end = max(end, stop)
    span, whole = end - ordered[0].start, sum(classes.values())
    longest = sorted(single.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    per_step = 1e-6 / STEPS
    return {
        "span_ms": span * per_step,
        "busy_ms": busy * per_step,
        "kernels_ms": whole * per_step,
        "idle": 1 - busy / span,
        "classes": {
            kind: {"ms": classes[kind] * per_step, "share": classes[kind] / whole}
            for kind in sorted(classes, key=classes.get, reverse=True)
        },
        "longest": [
            {
                "kernel": name,
                "class": kind,
                "calls": len(times) / STEPS,
                "ms": sum(times) * per_step,
                "share": sum(times) / whole,
                "source": example[name, kind],
            }
            for (name, kind), times in longest
        ],
    }


def tables(name: str, found: dict[str, Any]) -> str:
    """A step's two tables."""
    classes = [
        (kind, f"{each['ms']:.3f}", f"{100 * each['share']:.1f} %")
        for kind, each in found["classes"].items()
    ]
    span = f"idle, of the span of {found['span_ms']:.3f} ms"
    classes.append(
        (span, f"{found['span_ms'] - found['busy_ms']:.3f}", f"{100 * found['idle']:.1f} %")
    )
    longest = [
        (
            each["kernel"][:90],
            each["class"],
            f"{each['calls']:.4g}",
            f"{each['ms']:.3f}",
            f"{100 * each['share']:.1f} %",
            each["source"][-60:],
        )
        for each in found["longest"]
    ]
    return "\n\n".join(
        [
            f"## {name}",
            table(("class", "ms a step", "of the kernels' time"), classes),
            table(
                (
                    "kernel",
                    "class",
                    "calls a step",
                    "ms a step",
                    "of the kernels' time",
                    "one that it came from",
                ),
                longest,
            ),
        ]
    )
