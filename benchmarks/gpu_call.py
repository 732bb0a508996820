"""A part of gpu.py: its arguments, its files and its tables."""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Call(NamedTuple):
    """The arguments of a part."""

    out: Path  # the folder of all tables
    tiny: bool  # the form for a CPU, whose figures mean nothing
    until: float  # when the part must have ended, on the clock of time.monotonic
    pool: str  # npz of CIFAR-10's training images; "" if there is none
    evaluation: str  # npz of its test images
    peers: tuple[str, ...]  # of the steps: "eager", "compiled"

    @property
    def work(self) -> Path:
        """A folder for what is no table: images, traces, a workdir."""
        path = self.out / "work"
        path.mkdir(parents=True, exist_ok=True)
        return path


class Skipped(Exception):
    """A part that cannot be done here, and why."""


def write(path: Path, text: str) -> None:
    """A file that is whole or not there, whenever the process is killed."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def save(call: Call, name: str, document: dict[str, Any], text: str) -> None:
    """A part's two files: NAME.json and its tables, NAME.md."""
    write(call.out / f"{name}.json", json.dumps(document, indent=1) + "\n")
    form = "\n\nThe tiny form: its figures mean nothing." if call.tiny else ""
    write(call.out / f"{name}.md", f"# {name}{form}\n\n{text}\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned."""
    cells = [[str(cell).replace("|", "/") for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )


def reason(error: BaseException) -> str:
    """An error in one line; out of memory is said in these words, whoever says it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return f"{type(error).__name__}: {text[:200]}"


def die_with_parent() -> None:
    """For a new process: on Linux it is killed when the one that started it is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def one_block() -> str:
    """The name of a network that compiles in seconds, for the tiny form; known in this process."""
    from qmx.models.resnet import ARCHS, Arch

    ARCHS["one_block"] = Arch((1,), bottleneck=False, width=8, stem="small")
    return "one_block"
