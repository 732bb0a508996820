"""The parts of faults.py in which files are damaged or cannot be written: damage, locked, full."""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from fault_runs import COMMAND, Bench, mistake, table, wait_until

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


def damage(bench: Bench) -> dict:
    """Each file damaged, in this process, so that nothing is compiled twice."""
    from qmx.main import main

    os.environ |= bench.environment
    whole, same, told, wrong = bench.root / "undisturbed", 0, 0, 0
    files = [
        path.relative_to(whole)
        for path in sorted(whole.rglob("*"))
        if path.is_file() and path.name not in WRITTEN and "compiled" not in path.parts
    ]
    for path in files[:: bench.given.every]:
        for how in ("deleted", "cut", "zeroed", "flipped"):
            workdir, out, err = bench.root / "damaged", io.StringIO(), io.StringIO()
            shutil.copytree(whole, workdir)
            data = bytearray((whole / path).read_bytes())
            data[len(data) // 2] ^= how == "flipped"
            content = {"cut": data[: len(data) // 2], "zeroed": bytes(len(data)), "flipped": data}
            if how == "deleted":
                (workdir / path).unlink()
            else:
                (workdir / path).write_bytes(content[how])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main([*COMMAND[2:], *bench.words, f"--workdir={workdir}"])
            lines = err.getvalue().splitlines()
            if status == 0:
                new, old = table(workdir), table(whole)
                if path.name == "ledger.sqlite":  # all is asked for again, and to train
                    for account in (new["account"], old["account"]):
                        account |= {"lost": 0, "purposes": {}}
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
    return {
        "files": len(files[:: bench.given.every]),
        "same_table": same,
        "told_in_a_line": told,
        "wrong": wrong,
    }


def requests(path: Path) -> int:
    """Requests that a ledger has on record, or -1."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            return db.execute("SELECT COUNT(*) FROM requests").fetchone()[0]
    except sqlite3.Error:
        return -1


def locked(bench: Bench) -> dict:
    """Another process writes in the ledger for a minute, from a random moment of the asking on."""
    draw, told, waited, wrong = random.Random(bench.given.seed), 0, 0, 0
    path = bench.root / "locked/ledger.sqlite"
    for place in range(bench.given.locks):
        process = bench.start(workdir := bench.unasked("locked"))
        wanted = draw.randint(0, 3)
        fault, err = "", ""
        if wait_until(process, lambda n=wanted: requests(path) >= n):
            with contextlib.closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")
                until = time.monotonic() + bench.given.hold
                while time.monotonic() < until and process.poll() is None:
                    time.sleep(0.1)
                db.execute("ROLLBACK")
        _, err = process.communicate()
        if process.returncode:
            told += 1
            if "ledger.sqlite" not in mistake(err) or process.returncode != 2:
                fault = f"status {process.returncode}"
            process = bench.start(workdir)
            process.communicate()
        else:
            waited += "can be written again" in err
        fault = fault or bench.fault(workdir, process.returncode)
        if fault:
            wrong += 1
            print(f"lock {place}: {fault}: {err[-2000:]}", flush=True)
        shutil.rmtree(workdir)
    return {
        "locks": bench.given.locks,
        "seconds": bench.given.hold,
        "waited_with_answers": waited,
        "told_in_a_line": told,
        "wrong": wrong,
    }


def full(bench: Bench) -> dict:
    """A small disk is full from a random moment of the asking on; in a name space of our own."""
    disk = bench.root / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size={bench.given.disk}m none {disk} && exec "$@"'
    command = [
        *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"),
        *(sys.executable, __file__, str(bench.root), str(disk)),
        json.dumps([bench.given.disks, bench.given.seed, bench.words]),
    ]
    done = subprocess.run(command, env=bench.environment, stdout=subprocess.PIPE, text=True)
    disk.rmdir()
    if done.returncode:
        return {"tries": 0, "why": "no small disk can be mounted here", "wrong": 1}
    print(done.stdout[: done.stdout.rindex("{")], end="")
    return json.loads(done.stdout[done.stdout.rindex("{") :])


def fill(path: Path) -> None:
    """Take all room that the disk has left."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16) if os.statvfs(path).f_bavail > 16 else bytes(4096))


def on_disk(bench: Bench, disk: Path) -> dict:
    """The part `full`, where `disk` is small."""
    draw, told, waited, wrong = random.Random(bench.given.seed), 0, 0, 0
    path = disk / "full/ledger.sqlite"
    for place in range(bench.given.disks):
        process = bench.start(workdir := bench.unasked("full", disk))
        wanted = draw.randint(0, 4)
        wait_until(process, lambda n=wanted: requests(path) >= n)
        fill(disk / "filler")
        try:
            _, err = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:  # it waits, or has not come to the disk
            waited += 1
            (disk / "filler").unlink()
            _, err = process.communicate()
        (disk / "filler").unlink(missing_ok=True)
        fault = ""
        if process.returncode:
            told += 1
            if process.returncode != 2 or str(disk) not in mistake(err):
                fault = f"status {process.returncode}"
            process = bench.start(workdir)
            err += process.communicate()[1]
        fault = fault or bench.fault(workdir, process.returncode)
        if fault:
            wrong += 1
            print(f"full disk {place}, {wanted} requests: {fault}: {err[-2000:]}", flush=True)
        shutil.rmtree(workdir)
    tries = bench.given.disks
    return {"tries": tries, "went_on_with_room": waited, "told_in_a_line": told, "wrong": wrong}


if __name__ == "__main__":
    root, disk, rest = sys.argv[1:]
    disks, seed, words = json.loads(rest)
    given = argparse.Namespace(disks=disks, seed=seed)
    print(json.dumps(on_disk(Bench(Path(root), given, words, dict(os.environ)), Path(disk))))
