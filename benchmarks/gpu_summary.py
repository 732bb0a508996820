"""The summary of gpu.py: what became of each part, in each call that a folder has seen."""

import json
from pathlib import Path
from typing import Any

from gpu_call import table, write


def note(out: Path, part: str, **said: Any) -> None:
    """Write down what became of a part in the last call; of all processes one at a time does."""
    calls = read(out)
    calls[-1]["parts"][part] = said
    keep(out, calls)


def read(out: Path) -> list[dict]:
    """All calls that this folder has seen."""
    path = out / "summary.json"
    return json.loads(path.read_text()) if path.exists() else []


def keep(out: Path, calls: list[dict]) -> None:
    """The summary's two files."""
    write(out / "summary.json", json.dumps(calls, indent=1) + "\n")
    text = "\n\n".join(
        f"## {call['began']}, {call['minutes']:g} minutes\n\n{lines(call['parts'])}"
        for call in calls
    )
    write(out / "summary.md", f"# Calls\n\n{text}\n")


def lines(parts: dict[str, dict]) -> str:
    """The table of one call's parts."""
    return table(
        ("part", "state", "seconds", ""),
        [
            (
                part,
                said["state"],
                f"{said['seconds']:.1f}" if "seconds" in said else "",
                said.get("why", ""),
            )
            for part, said in parts.items()
        ],
    )


def waiting(out: Path) -> list[str]:
    """The parts of this call that nothing became of yet."""
    return [part for part, said in read(out)[-1]["parts"].items() if said["state"] == "waiting"]
