"""All that is to be known of a GPU, in one command that ends within the minutes given.

    python benchmarks/gpu.py --minutes=12 --parts machine steps trace --out=runs/gpu
    python benchmarks/gpu.py --minutes=14 --parts cifar story --out=runs/gpu \\
        --pool=train.npz --evaluation=test.npz
    python benchmarks/gpu.py --minutes=3 --tiny --out=/tmp/gpu      # every part, small, on a CPU

    machine   card, driver, versions; rates of matrix products and of a copy
    steps     every train step and the target's inference, beside PyTorch
    trace     where the time of the distil and the MoCo step goes, by kernels
    input     photos through the cache, against images that are there
    cifar     MoCo on CIFAR-10 by its authors' protocol, 200 epochs
    story     target, MoCo, selection, students and report on CIFAR-10, by qmx's own command

The parts run in this order, as far as --minutes go. Each writes OUT/PART.md and OUT/PART.json as it
goes on, and OUT/summary.md says of each whether it is done, wholly or in part, was skipped, or
failed. Programs are compiled into OUT/compiled, so that a second call compiles little, and steps
goes on with the rows that are missing. OUT/work is of no interest.

machine and steps share a process, since jax takes long to start on a GPU; every other part has one
of its own, trace with a flag of XLA's that it needs. So a part may crash or hang and take nothing
with it, memory is given back, and this process, which computes nothing, keeps the time.

machine, steps and trace need jax, flax, optax and numpy; PyTorch is the peer where it is there.
"""

import argparse
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from gpu_call import Call, Skipped, die_with_parent, reason
from gpu_summary import keep, lines, note, read, waiting

ROOT = Path(__file__).parent.parent
GRACE = 5  # seconds after its time in which a part may end by itself


class Part(NamedTuple):
    """A part, and the seconds without which it does not start and those that it may take."""

    where: str  # module:function
    least: float
    most: float
    tiny_least: float
    tiny_most: float
    needs: tuple[str, ...] = ()  # modules
    images: bool = False  # of CIFAR-10

    def seconds(self, tiny: bool) -> tuple[float, float]:
        return (self.tiny_least, self.tiny_most) if tiny else (self.least, self.most)


# On the safe side. On an H100 with 16 cores machine took 21 s, a row of steps beside PyTorch eager
# 35, trace 53, the first epoch of cifar with its evaluation 31, story 234. A part is told when to
# end, and leaves out what does not fit.
PARTS = {
    "machine": Part("gpu_machine:machine", 30, 60, 5, 20),
    "steps": Part("gpu_steps:steps", 90, 3600, 15, 90),
    "trace": Part("gpu_trace:trace", 60, 120, 15, 40),
    "input": Part(
        "gpu_data:photos", 100, 180, 15, 60, ("grain", "array_record", "PIL", "ml_collections")
    ),
    "cifar": Part("gpu_data:cifar", 60, 600, 15, 60, ("PIL",), True),
    "story": Part(
        "gpu_data:story",
        180,
        3600,
        30,
        120,
        ("grain", "ml_collections", "PIL", "safetensors", "sklearn", "matplotlib"),
        True,
    ),
}
TOGETHER = ("machine", "steps")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8, help="for everything")
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the tables")
    parser.add_argument("--tiny", action="store_true", help="all of it small, to try it on a CPU")
    parser.add_argument("--pool", default="", help="npz of CIFAR-10's training images")
    parser.add_argument("--evaluation", default="", help="npz of its test images")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=["eager", "compiled"],
        choices=("eager", "compiled"),
        help="of PyTorch, beside the steps",
    )
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a part's process
    given = parser.parse_args()
    given.out = given.out.absolute()
    given.pool, given.evaluation = (
        path and str(Path(path).absolute()) for path in (given.pool, given.evaluation)
    )
    given.parts = [part for part in PARTS if part in given.parts]
    return given


def allot(part: str, later: list[str], left: float, tiny: bool) -> float | None:
    """Seconds of what is left that a part gets; None if they are too few for it.

    All later parts keep what they need at least, or the next one alone, or none, as far as this
    part, which is worth more, has what it needs.
    """
    least, most = PARTS[part].seconds(tiny)
    if left < least:
        return None
    needed = [PARTS[name].seconds(tiny)[0] for name in later]
    reserves = (sum(needed), sum(needed[:1]), 0.0)
    return min(most, next(left - reserve for reserve in reserves if left - reserve >= least))


def missing(part: str, given: argparse.Namespace) -> str:
    """Why a part cannot be done here; "" if it can."""
    if PARTS[part].images and not given.tiny and not (given.pool and given.evaluation):
        return "it needs --pool and --evaluation, npz files of CIFAR-10"
    absent = [name for name in PARTS[part].needs if not there(name)]
    return f"{', '.join(absent)} not installed" if absent else ""


def there(module: str) -> bool:
    """True if a module can be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def in_order(given: argparse.Namespace) -> None:
    """The parts of this process, one after the other."""
    for part in given.parts:
        began = time.monotonic()
        left = given.until - began
        wanted = read(given.out)[-1]["wanted"]
        later = [name for name in wanted[wanted.index(part) + 1 :] if not missing(name, given)]
        seconds, why = allot(part, later, left, given.tiny), missing(part, given)
        if not why and seconds is None:
            least = PARTS[part].seconds(given.tiny)[0]
            why = f"{max(left, 0):.0f} s are left and it takes {least:g} at least"
        if why:
            note(given.out, part, state="skipped", why=why)
            print(f"{part}: skipped, {why}", flush=True)
            continue
        note(given.out, part, state="running", until=began + seconds)
        call = Call(
            given.out, given.tiny, began + seconds, given.pool, given.evaluation, tuple(given.peers)
        )
        module, function = PARTS[part].where.split(":")
        try:
            why = getattr(import_module(module), function)(call)
            state = "in part" if why else "done"
        except Skipped as error:
            state, why = "skipped", str(error)
        except ModuleNotFoundError as error:
            state, why = "skipped", f"{error.name} not installed"
        except Exception as error:  # one part's failure is not the end
            traceback.print_exc()
            state, why = "failed", reason(error)
        note(given.out, part, state=state, seconds=time.monotonic() - began, why=why)
        print(f"{part}: {state}{', ' * bool(why)}{why}", flush=True)


def environment(given: argparse.Namespace, part: str) -> dict[str, str]:
    """The variables of a part's process: caches, and room on the card for PyTorch."""
    compiled = given.out / "compiled"
    autotuned = "xla_gpu_per_fusion_autotune_cache_dir"
    (compiled / autotuned).mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    flags = os.environ.get("XLA_FLAGS", "")
    if part == "trace" and not given.tiny and "xla_gpu_enable_command_buffer" not in flags:
        flags += " --xla_gpu_enable_command_buffer="
    if given.tiny and "xla_backend_optimization_level" not in flags:
        flags += " --xla_backend_optimization_level=0"  # compiles in half the time
    # PyTorch's threads wait for each other in vain where others use the cores.
    threads = {"OMP_NUM_THREADS": "1"} if given.tiny else {}
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **threads,
        **os.environ,
        "PYTHONPATH": path,
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "XLA_FLAGS": flags.strip(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": autotuned,
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
    }


def run(given: argparse.Namespace, parts: list[str], deadline: float, stop: list[int]) -> None:
    """Some parts in a process of their own, which is ended when the time of one is over.

    A part in which it ended has failed; those after it wait for another process.
    """
    words = [word for word in sys.argv[1:] if not word.startswith("--until")]
    command = [
        sys.executable,
        __file__,
        *words,
        "--parts",
        *parts,
        "--peers",
        *given.peers,
        f"--until={deadline}",
    ]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment(given, parts[0]),
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    why = ""
    while process.poll() is None:
        time.sleep(0.1)
        states = read(given.out)[-1]["parts"]
        ends = [said["until"] for said in states.values() if said["state"] == "running"]
        limit = min(ends, default=deadline) + GRACE
        if stop or time.monotonic() > limit:
            why = signal.Signals(stop[0]).name if stop else "it took longer than its time"
            end(process)
    states = read(given.out)[-1]["parts"]
    unfinished = [part for part in parts if states[part]["state"] in ("waiting", "running")]
    if unfinished[:1] == ["steps"] and not why and process.returncode < 0 and given.peers:
        given.peers = []
        note(given.out, "steps", state="waiting")
        print(f"steps: crashed with status {process.returncode}; once more, without PyTorch")
    elif unfinished:
        why = why or f"its process ended with status {process.returncode}"
        seconds = time.monotonic() - began
        note(given.out, unfinished[0], state="failed", seconds=seconds, why=f"stopped: {why}")
        print(f"{unfinished[0]}: failed, stopped: {why}", flush=True)


def end(process: subprocess.Popen) -> None:
    """End a process and its children: a moment to save, then at once."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(3)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def main() -> int:
    given = arguments()
    if given.until is not None:
        in_order(given)
        return 0
    deadline, stop = time.monotonic() + 60 * given.minutes, []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))
    given.out.mkdir(parents=True, exist_ok=True)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    keep(
        given.out,
        [
            *read(given.out),
            {
                "began": began,
                "minutes": given.minutes,
                "tiny": given.tiny,
                "wanted": given.parts,
                "parts": {part: {"state": "waiting"} for part in given.parts},
            },
        ],
    )
    while not stop and (todo := waiting(given.out)):
        together = list(itertools.takewhile(lambda part: part in TOGETHER, todo))
        run(given, together or todo[:1], deadline, stop)
    for part in waiting(given.out):
        note(given.out, part, state="skipped", why=signal.Signals(stop[0]).name)
    states = read(given.out)[-1]["parts"]
    print(lines(states))
    failed = any(said["state"] == "failed" for said in states.values())
    return 128 + stop[0] if stop else int(failed)


if __name__ == "__main__":
    sys.exit(main())
