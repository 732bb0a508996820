"""The run that faults.py disturbs, and what must hold of it in the end."""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

COMMAND = [sys.executable, "-m", "qmx.main"]
SHORT = [
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
# Of a run whose encoders are trained and whose target was not asked yet, to choose images neither.
ASKED = (
    *("ledger.sqlite*", "account.json", "query", "distill", "evaluate", "results.json"),
    *("*margin*", "*entropy*"),
)


class Bench(NamedTuple):
    """What all parts are given."""

    root: Path  # "undisturbed" there is a finished run; parts leave nothing else
    given: argparse.Namespace
    words: list[str]  # for the command
    environment: dict[str, str]

    def start(self, workdir: Path) -> subprocess.Popen:
        """The command, started."""
        return subprocess.Popen(
            [*COMMAND, *self.words, f"--workdir={workdir}"],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # A shell ignores SIGINT for what it starts in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def fork(self, workdir: Path, told: str = "err") -> multiprocessing.Process:
        """The command in a process that has imported all modules already, and computed nothing; its
        standard error is in `root`/`told`."""
        made = multiprocessing.get_context("fork").Process(target=self._call, args=(workdir, told))
        made.start()
        return made

    def _call(self, workdir: Path, told: str) -> None:
        from qmx.main import main

        with open(self.root / told, "w") as err, open(os.devnull, "w") as out:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main([*COMMAND[2:], *self.words, f"--workdir={workdir}"])
        os._exit(status)

    def unasked(self, name: str, root: Path | None = None) -> Path:
        """A copy of the undisturbed run from before its target was asked."""
        workdir = (root or self.root) / name
        shutil.copytree(
            self.root / "undisturbed", workdir, ignore=shutil.ignore_patterns(*ASKED, "compiled")
        )
        return workdir

    def fault(self, workdir: Path, status: int) -> str:
        """How a run that has ended differs from the undisturbed one; "" if it does not."""
        if status:
            return f"status {status}"
        if table(workdir) != table(self.root / "undisturbed"):
            return "another table"
        twice = asked_twice(workdir)
        return f"{twice} images asked about twice" if twice else ""


def table(workdir: Path) -> dict:
    """results.json without times, and without what was sent when a kill came and has no answer."""
    results = json.loads((workdir / "results.json").read_text())
    del results["provenance"], results["audit"]  # dates and seconds
    for row in results["rows"] + results["monitors"]:
        del row["seconds"]
    del results["account"]["unanswered"]
    return results


def asked_twice(workdir: Path) -> int:
    """Images that were answered more than once."""
    account = json.loads((workdir / "results.json").read_text())["account"]
    return account["calls"] - account["images"]


def unanswered(workdir: Path) -> int:
    """Images that were sent when a kill came, and have no answer of that request."""
    return json.loads((workdir / "results.json").read_text())["account"]["unanswered"]


def mistake(err: str) -> str:
    """The last line of standard error, if it alone is an error's; else "" ."""
    lines = err.splitlines()
    told = [line for line in lines if line.startswith("qmx: ")]
    return told[0] if told == lines[-1:] and "Traceback" not in err else ""


def wait_until(process: subprocess.Popen, happened: Callable[[], bool]) -> bool:
    """Look every 2 ms; False if the process ended before."""
    while not happened():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def computed(pid: int) -> float:
    """Seconds that a process has computed, which other programs on the machine do not change."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def works(pid: int, workdir: Path) -> bool:
    """True once a process has the workdir for itself, after its imports."""
    lock = workdir / "lock"
    return lock.exists() and f"process {pid} " in lock.read_text()


def kill(process: subprocess.Popen) -> None:
    """SIGKILL."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
