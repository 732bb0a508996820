"""Kill the program at random moments, go on, and compare: the long form of tests/test_kill.py.

    python benchmarks/faults.py --kills=100

A short run on digits is done once undisturbed. Then the same command is started in another workdir
and its process killed (SIGKILL) after a random time, again and again until it ends; then in the
next workdir, until there were enough kills. Each finished table must equal the undisturbed one, and
no image may have been asked twice. Prints a line for each finished run, then JSON; status 1 if
anything differed. Other words go to the command, as in --config.student.dtype=float32.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [
    sys.executable,
    "-m",
    "qmx.main",
    "--config=configs/digits.py",
    "--config.seeds=(0,)",
    "--config.fractions=(0.05,1.0)",
    "--config.queries=()",
    "--config.target.epochs=2",
    "--config.pretrain.moco.epochs=1",
    "--config.pretrain.simsiam.epochs=1",
    "--config.pretrain.rotation.epochs=1",
    "--config.distill.epochs=0.5",
    "--config.distill.min_steps=12",
    "--config.save_minutes=0.005",
]  # saves so often that kills come amid them


def table(workdir: Path) -> dict:
    """results.json without times, and without what was sent when a kill came and has no answer."""
    results = json.loads((workdir / "results.json").read_text())
    for row in results["rows"] + results["monitors"]:
        del row["seconds"]
    del results["account"]["unanswered"]
    return results


def stage_of(workdir: Path) -> str:
    """Where a killed run was: the newest stage that it had begun and not ended."""
    begun = [
        path.parent
        for path in workdir.glob("**/inputs.json")
        if not (path.parent / "result.json").exists()
    ]
    return begun[0].relative_to(workdir).parts[0] if begun else "between stages"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given, words = parser.parse_known_args()
    draw, kills, wrong, runs = random.Random(given.seed), collections.Counter[str](), 0, 0
    asked_twice = unanswered = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            **os.environ,
        }

        def start(workdir: Path) -> subprocess.Popen:
            return subprocess.Popen(
                [*COMMAND, *words, f"--workdir={workdir}"],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )

        for workdir in ("undisturbed", "again"):  # the second one finds everything compiled
            began = time.monotonic()
            process = start(root / workdir)
            _, err = process.communicate()
            assert process.returncode == 0, err
        longest = time.monotonic() - began  # of a whole run, compiled
        while kills.total() < given.kills:
            workdir = root / f"run{runs}"
            while True:
                process = start(workdir)
                try:  # up to half a run, so that each needs several
                    _, err = process.communicate(
                        timeout=(
                            draw.uniform(1, longest / 2) if kills.total() < given.kills else None
                        )
                    )
                except subprocess.TimeoutExpired:
                    kills[stage_of(workdir)] += 1
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    continue
                break
            runs += 1
            account = (
                json.loads((workdir / "results.json").read_text())["account"]
                if process.returncode == 0
                else None
            )
            if account is None or table(workdir) != table(root / "undisturbed"):
                wrong += 1
                print(
                    f"run {runs} ended with {process.returncode} and is not the undisturbed one:"
                    f" {err[-2000:]}"
                )
            else:
                asked_twice += account["calls"] - account["images"]
                unanswered += account["unanswered"]
            print(
                f"run {runs}: {kills.total()} kills so far, status {process.returncode}", flush=True
            )
    print(
        json.dumps(
            {
                "kills": kills.total(),
                "by_stage": kills,
                "runs": runs,
                "runs_that_differ": wrong,
                "images_asked_twice": asked_twice,
                "images_sent_when_a_kill_came": unanswered,
            }
        )
    )
    return 1 if wrong or asked_twice else 0


if __name__ == "__main__":
    sys.exit(main())
