"""Disturb the program in all ways that a run meets, and compare; the long form of
tests/test_kill.py, tests/test_workdir.py and tests/ledger/test_ledger_writes.py.

    python benchmarks/faults.py --parts=kills --kills=100 --config.data.limit=400
    python benchmarks/faults.py --parts=together,damage

A short run on digits is done once undisturbed. Then, with the same command in other workdirs:

kills       its process is killed (SIGKILL) after a random time of computing, up to half of what a
            whole run takes, again and again until it ends; then in the next workdir, until there
            were enough kills, or --minutes are over; workdirs in which something was otherwise are
            left in --keep
commits     killed while the ledger's log grows, --commits times
metrics     killed in each training once it has saved; metrics.jsonl is cut amid a line
interrupts  SIGINT after every half second of computing, from --first to --seconds
together    two are started in one workdir, the second one up to three seconds later
locked      another process holds the ledger for --hold seconds, from a request on
full        the disk, a small one, fills from a request of the ledger on; it needs `unshare`
damage      each file of a finished workdir (of --every so many) is deleted, cut, zeroed, and has
            one bit flipped, one at a time, and the same command is given again

At the end of each the table must be the undisturbed one, or one line names the file (damage, locked
and full), who works there (together) or that it was stopped (interrupts); no image may have been
asked twice, and no file may be half written. Prints a line for each finished run, then JSON; status
1 if anything was otherwise. Other words go to the command, as in --config.student.dtype=float32.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

from fault_files import damage, full, locked
from fault_runs import SHORT, Bench
from fault_signals import MODULES, commits, interrupts, kills, metrics, together

PARTS = {
    part.__name__: part
    for part in (kills, commits, metrics, interrupts, together, locked, full, damage)
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--keep", default="wrong")
    parser.add_argument("--commits", type=int, default=50)
    parser.add_argument("--first", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--tries", type=int, default=50)
    parser.add_argument("--locks", type=int, default=4)
    parser.add_argument("--hold", type=float, default=60)
    parser.add_argument("--disks", type=int, default=10)
    parser.add_argument("--disk", type=int, default=48, help="MB of the small disk")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="configs/digits.py", help="of the short run")
    given, words = parser.parse_known_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            **os.environ,
        }
        words = [f"--config={given.config}", *SHORT, *words]
        bench = Bench(root, given, words, environment)
        os.environ |= environment
        for module in MODULES:
            importlib.import_module(module)
        process = bench.fork(root / "undisturbed")
        process.join()
        assert process.exitcode == 0, (root / "err").read_text()
        for part in given.parts.split(","):
            found[part] = PARTS[part](bench)
            print(json.dumps({part: found[part]}), flush=True)
    return 1 if any(result["wrong"] for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
