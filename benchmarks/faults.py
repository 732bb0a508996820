"""Disturb the program in all ways that a run meets, and compare; the long form of
tests/test_kill.py and tests/test_workdir.py.

    python benchmarks/faults.py --parts=kills --kills=100
    python benchmarks/faults.py --parts=together,damage

kills: a short run on digits is done once undisturbed. Then the same command is started in another
workdir and its process killed (SIGKILL) after a random time, again and again until it ends; then in
the next workdir, until there were enough kills.
together: two of the same command are started in one workdir, the second one up to three seconds
later.
damage: each file of a finished workdir is deleted, cut, zeroed, and has one bit flipped, one at a
time, and the same command is given again.

At the end of each the table must be the undisturbed one, or one line names the file (damage) or who
works there (together); no image may have been asked twice. Prints a line for each finished run,
then JSON; status 1 if anything was otherwise. Other words go to the command, as in
--config.student.dtype=float32.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import shutil
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
    del results["provenance"], results["audit"]  # dates and seconds
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


def once(workdir: Path, words: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """The command, started."""
    return subprocess.Popen(
        [*COMMAND, *words, f"--workdir={workdir}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed(root: Path, given: argparse.Namespace, words: list[str], environment: dict) -> dict:
    """The part `kills`."""
    draw, kills, wrong, runs = random.Random(given.seed), collections.Counter[str](), 0, 0
    asked_twice = unanswered = 0
    began = time.monotonic()  # of a whole run, compiled
    _, err = (process := once(root / "again", words, environment)).communicate()
    assert process.returncode == 0, err
    longest = time.monotonic() - began
    while kills.total() < given.kills:
        workdir = root / f"run{runs}"
        while True:
            process = once(workdir, words, environment)
            try:  # up to half a run, so that each needs several
                wait = draw.uniform(1, longest / 2) if kills.total() < given.kills else None
                _, err = process.communicate(timeout=wait)
            except subprocess.TimeoutExpired:
                kills[stage_of(workdir)] += 1
                process.send_signal(signal.SIGKILL)
                process.communicate()
                continue
            break
        runs += 1
        if process.returncode or table(workdir) != table(root / "undisturbed"):
            wrong += 1
            print(f"run {runs} ended with {process.returncode} and differs: {err[-2000:]}")
        else:
            account = json.loads((workdir / "results.json").read_text())["account"]
            asked_twice += account["calls"] - account["images"]
            unanswered += account["unanswered"]
        shutil.rmtree(workdir)
        print(f"run {runs}: {kills.total()} kills so far, status {process.returncode}", flush=True)
    return {
        "kills": kills.total(),
        "by_stage": kills,
        "runs": runs,
        "wrong": wrong + asked_twice,
        "images_asked_twice": asked_twice,
        "images_sent_when_a_kill_came": unanswered,
    }


def together(root: Path, given: argparse.Namespace, words: list[str], environment: dict) -> dict:
    """The part `together`."""
    draw, wrong, refused = random.Random(given.seed), 0, 0
    for place in range(given.tries):
        workdir = root / f"both{place}"
        processes = [once(workdir, words, environment)]
        time.sleep(draw.uniform(0, 3))
        processes.append(once(workdir, words, environment))
        lines = [process.communicate()[1].splitlines()[-1] for process in processes]
        told = [line for line in lines if " works in " in line and line.startswith("qmx: ")]
        refused += len(told)
        account = json.loads((workdir / "results.json").read_text())["account"]
        ended = sorted(process.returncode for process in processes) == [0, 2]
        if (
            not (len(told) == 1 and ended)
            or account["calls"] != account["images"]
            or table(workdir) != table(root / "undisturbed")
        ):
            wrong += 1
            print(f"try {place}: {lines}, {account}", flush=True)
        shutil.rmtree(workdir)
    return {"tries": given.tries, "second_one_refused": refused, "wrong": wrong}


# What each call writes anew, or is for people alone.
WRITTEN = (
    "results.json",
    "report.md",
    "report.html",
    "curve.png",
    "report.sha256",
    "lock",
    "metrics.jsonl",
)


def damaged(root: Path, given: argparse.Namespace, words: list[str], environment: dict) -> dict:
    """The part `damage`, in this process, so that nothing is compiled twice."""
    from qmx.main import main

    del given
    os.environ |= environment
    whole, same, told, wrong = root / "undisturbed", 0, 0, 0
    files = [
        path.relative_to(whole)
        for path in sorted(whole.rglob("*"))
        if path.is_file() and path.name not in WRITTEN and "compiled" not in path.parts
    ]
    for path in files:
        for how in ("deleted", "cut", "zeroed", "flipped"):
            workdir, out, err = root / "damaged", io.StringIO(), io.StringIO()
            shutil.copytree(whole, workdir)
            data = bytearray((whole / path).read_bytes())
            data[len(data) // 2] ^= how == "flipped"
            content = {"cut": data[: len(data) // 2], "zeroed": bytes(len(data)), "flipped": data}
            if how == "deleted":
                (workdir / path).unlink()
            else:
                (workdir / path).write_bytes(content[how])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main([*COMMAND[2:], *words, f"--workdir={workdir}"])
            lines = err.getvalue().splitlines()
            if status == 0:
                new, old = table(workdir), table(whole)
                new["account"]["lost"] = 0  # of a ledger that was deleted
                same += new == old
                good = new == old
            else:
                # Of sums that changed, the files are named that they no longer fit.
                named = path.name if path.name != "SHA256SUMS" else str(path.parent)
                good = status == 2 and named in lines[-1]
                told += good
            if not good:
                wrong += 1
                print(f"{path} {how}: status {status}, {lines[-1:]}", flush=True)
            shutil.rmtree(workdir)
    return {"files": len(files), "same_table": same, "told_in_a_line": told, "wrong": wrong}


PARTS = {"kills": killed, "together": together, "damage": damaged}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="kills,together,damage")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--tries", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given, words = parser.parse_known_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            **os.environ,
        }
        process = once(root / "undisturbed", words, environment)
        _, err = process.communicate()
        assert process.returncode == 0, err
        for part in given.parts.split(","):
            found[part] = PARTS[part](root, given, words, environment)
            print(json.dumps({part: found[part]}), flush=True)
    return 1 if any(result["wrong"] for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
