"""Time to start: `import qmx` and `qmx.main --help` against jax, flax.linen and optax alone.

    python benchmarks/start.py --runs=9

The three take turns, each in a process of its own. Prints the medians, the median of the ratios
within a turn, by the clock and by the processor's time, which a busy machine disturbs less, and as
the last line JSON. The goal is 1.2.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "jax, flax.linen, optax": ["-c", "import jax, flax.linen, optax"],
    "qmx": ["-c", "import qmx"],
    "qmx.main --help": ["-m", "qmx.main", "--help"],
}
BASE = next(iter(COMMANDS))


def measure(command: list[str]) -> dict[str, float]:
    """Seconds of a Python process, by the clock and of the processor."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "clock": seconds,
        "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    for command in COMMANDS.values():
        measure(command)  # reads the files into memory, and compiles them
    turns = [{name: measure(command) for name, command in COMMANDS.items()} for _ in range(runs)]
    rows = []
    print(
        "| start | s, clock | s, processor | ratio, clock | ratio, processor"
        " |\n|---|---|---|---|---|"
    )
    for name in COMMANDS:
        row: dict[str, object] = {"start": name}
        for by in ("clock", "processor"):
            row[f"{by}_seconds"] = statistics.median(turn[name][by] for turn in turns)
            row[f"{by}_ratio"] = statistics.median(
                turn[name][by] / turn[BASE][by] for turn in turns
            )
        rows.append(row)
        print(
            f"| {name} | {row['clock_seconds']:.2f} | {row['processor_seconds']:.2f} |"
            f" {row['clock_ratio']:.3f} | {row['processor_ratio']:.3f} |"
        )
    print(
        json.dumps(
            {"runs": runs, "rows": rows, "cores": os.cpu_count(), "python": sys.version.split()[0]}
        )
    )


if __name__ == "__main__":
    main()
