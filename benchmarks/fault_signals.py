"""The parts of faults.py that end processes, or start two: kills, commits, metrics, interrupts,
together."""

import collections
import json
import math
import random
import shutil
import signal
import time
from pathlib import Path

from fault_runs import Bench, asked_twice, computed, kill, mistake, unanswered, wait_until, works

from qmx.files import Unreadable, check_file, read_json

# What a call imports.
MODULES = (
    "qmx.checks",
    "qmx.cautions",
    "qmx.pipeline",
    "qmx.data",
    "orbax.checkpoint",
    "sklearn.datasets",
)


def stage_of(workdir: Path) -> str:
    """Where a killed run was: the newest stage that it had begun and not ended."""
    begun = [
        path.parent
        for path in workdir.glob("**/inputs.json")
        if not (path.parent / "result.json").exists()
    ]
    return begun[0].relative_to(workdir).parts[0] if begun else "between stages"


def kills(bench: Bench) -> dict:
    """Killed after a random time of computing, again and again: one of ten from the start of a new
    program on, the others from when a fork of this one, with its imports, has the workdir."""
    given = bench.given
    draw, count, wrong, runs, lost = random.Random(given.seed), collections.Counter(), 0, 0, 0
    twice = 0
    process = bench.fork(bench.root / "again")  # a whole run, compiled
    longest = 0.0
    while process.is_alive():
        longest = computed(process.pid)
        time.sleep(0.01)
    assert process.exitcode == 0, (bench.root / "err").read_text()
    shutil.rmtree(bench.root / "again")
    deadline = time.monotonic() + 60 * given.minutes

    def more() -> bool:
        return count.total() < given.kills and time.monotonic() < deadline

    def killed(workdir: Path) -> tuple[bool, int | None, str]:
        """(True if it was killed, exit status, standard error) of one call."""
        if draw.random() < 0.1:
            started = bench.start(workdir)
            wait = draw.uniform(0, longest / 2)
            while started.poll() is None and computed(started.pid) < wait:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.02))
            if started.poll() is None:
                kill(started)
                return True, None, ""
            return False, started.returncode, started.communicate()[1]
        process = bench.fork(workdir)
        # Up to half a run, so that each needs several; the last one of a workdir comes to its end.
        wait, since = draw.uniform(0, longest / 2) if more() else math.inf, None
        while process.is_alive():
            now = computed(process.pid)
            if since is None and works(process.pid, workdir):
                since = now
            if since is not None and now >= since + wait:
                time.sleep(draw.uniform(0, 0.02))  # finer than the clock of the system
                if process.is_alive():
                    process.kill()
                    process.join()
                    return True, None, ""
            time.sleep(0.01)
        return False, process.exitcode, (bench.root / "err").read_text()

    while more():
        workdir = bench.root / f"run{runs}"
        while (ended := killed(workdir))[0]:
            count[stage_of(workdir)] += 1
        _, status, err = ended
        runs += 1
        if fault := bench.fault(workdir, status):
            wrong += 1
            print(f"run {runs}: {fault}: {err[-2000:]}")
            shutil.copytree(workdir, Path(given.keep) / f"run{given.seed}-{runs}")
        if status == 0:
            twice += asked_twice(workdir)
            lost += unanswered(workdir)
        shutil.rmtree(workdir)
        print(f"run {runs}: {count.total()} kills so far, status {status}", flush=True)
    return {
        "kills": count.total(),
        "seconds_of_a_run": round(longest, 1),
        "by_stage": count,
        "runs": runs,
        "wrong": wrong,
        "images_asked_twice": twice,
        "images_sent_when_a_kill_came": lost,
    }


def commits(bench: Bench) -> dict:
    """Killed as soon as the ledger's log grows, which is while a request or answers are written."""
    draw, done, runs, wrong, lost = random.Random(bench.given.seed), 0, 0, 0, 0
    log = bench.root / "commits/ledger.sqlite-wal"

    def length() -> int:
        try:
            return log.stat().st_size
        except FileNotFoundError:  # as before the first request, and from the call's end on
            return 0

    while done < bench.given.commits:
        workdir = bench.unasked("commits")
        while True:
            process = bench.start(workdir)
            # The first one of a call writes a request down; some let answers through.
            growths = draw.randint(1, 8) if done < bench.given.commits else 0
            for _ in range(growths):
                before = length()
                if not wait_until(process, lambda before=before: length() > before):
                    break
            if growths and process.poll() is None:
                time.sleep(draw.uniform(0, 0.003))
                kill(process)
                done += 1
                continue
            _, err = process.communicate()
            break
        runs += 1
        if fault := bench.fault(workdir, process.returncode):
            wrong += 1
            print(f"run {runs}: {fault}: {err[-2000:]}", flush=True)
        else:
            lost += unanswered(workdir)
        shutil.rmtree(workdir)
    return {"kills": done, "runs": runs, "images_sent_when_a_kill_came": lost, "wrong": wrong}


def metrics(bench: Bench) -> dict:
    """Killed in each training once it has a checkpoint; the last lines of its metrics are cut."""
    draw, workdir, cut = random.Random(bench.given.seed), bench.root / "metrics", set()

    def training() -> Path | None:
        for path in (*workdir.glob("*/metrics.jsonl"), *workdir.glob("*/*/metrics.jsonl")):
            began = any(path.parent.glob("checkpoints/[0-9]*")) and path.stat().st_size
            if began and path not in cut and not (path.parent / "result.json").exists():
                return path
        return None

    while True:
        process = bench.start(workdir)
        if not wait_until(process, lambda: training() is not None):
            break
        path = training()
        kill(process)
        if path is not None and path.exists():
            data = path.read_bytes()
            path.write_bytes(data[: -draw.randint(2, min(len(data), 300))])
            cut.add(path)
    fault = bench.fault(workdir, process.returncode)
    if fault:
        print(f"{fault}: {process.communicate()[1][-2000:]}")
    process.communicate()
    shutil.rmtree(workdir)
    return {"trainings_cut": len(cut), "wrong": int(bool(fault) or not cut)}


def half_written(workdir: Path) -> list[str]:
    """Files that are not whole: begun ones, JSON that does not parse, sums that do not fit."""
    wrong = [str(path) for path in workdir.rglob("*.part")]
    for path in (path for path in workdir.rglob("*") if "compiled" not in path.parts):
        try:
            if path.suffix == ".json":
                read_json(path)
            if path.is_file() and "checkpoints" not in path.parts:
                check_file(path)
        except Unreadable as error:
            wrong.append(str(error))
    return wrong


def interrupts(bench: Bench) -> dict:
    """SIGINT after every half second of computing; some of them go on to the end."""
    statuses, wrong, finished = collections.Counter(), 0, 0
    for halves in range(int(2 * bench.given.first), 1 + int(2 * bench.given.seconds)):
        workdir = bench.root / "interrupted"
        process = bench.start(workdir)
        while process.poll() is None and computed(process.pid) < halves / 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        status = process.returncode
        statuses[str(status)] += 1
        faults = half_written(workdir) if workdir.exists() else []
        if status not in (0, 75, 130, -signal.SIGINT):
            faults.append(f"status {status}")
        # Python itself was starting where the signal ended it.
        if err if status == -signal.SIGINT else status and not mistake(err):
            faults.append(f"not one line: {err[-2000:]}")
        if not faults and halves % 10 == 0:
            _, err = (process := bench.start(workdir)).communicate()
            faults += filter(None, [bench.fault(workdir, process.returncode)])
            finished += not faults
        if faults:
            wrong += 1
            print(f"after {halves / 2} s: {faults}", flush=True)
        shutil.rmtree(workdir, ignore_errors=True)
        print(f"interrupted after {halves / 2} s: status {status}", flush=True)
    return {"interrupts": statuses.total(), "by_status": statuses, "finished": finished} | {
        "wrong": wrong
    }


def together(bench: Bench) -> dict:
    """Two of the same command in one workdir."""
    draw, wrong, refused = random.Random(bench.given.seed), 0, 0
    for place in range(bench.given.tries):
        workdir = bench.root / f"both{place}"
        processes = {"first": bench.fork(workdir, "first")}
        time.sleep(draw.uniform(0, 3))
        processes["second"] = bench.fork(workdir, "second")
        for process in processes.values():
            process.join()
        lines = [(bench.root / name).read_text().splitlines()[-1] for name in processes]
        told = [line for line in lines if " works in " in line and line.startswith("qmx: ")]
        refused += len(told)
        ended = sorted(process.exitcode for process in processes.values()) == [0, 2]
        if not (len(told) == 1 and ended) or bench.fault(workdir, 0):
            wrong += 1
            account = json.loads((workdir / "results.json").read_text())["account"]
            print(f"try {place}: {lines}, {account}", flush=True)
        shutil.rmtree(workdir)
    return {"tries": bench.given.tries, "second_one_refused": refused, "wrong": wrong}
