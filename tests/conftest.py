"""Everything runs on two CPU devices, so that what depends on their number shows.

XLA compiles quickly rather than well, in the tests' own processes and in the commands that they
start, so that both compute the same bits; it does as users have it where a test says so. All of
them share one compilation cache.
"""

import contextlib
import fcntl
import gc
import io
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# LLVM's lowest level, each program as one piece and not as one for each core, and XLA's older
# emitters: a quarter of the time for a step with random views. The emitters round float64 another
# way on other numbers of devices, so such tests take LEVEL alone.
LEVEL = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
QUICKLY = f"{LEVEL} --xla_cpu_use_fusion_emitters=false"
# As qmx.main sets it; test_code.py holds the two together.
CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
GIVEN = os.environ.get("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
for ours in (QUICKLY, CONVOLUTIONS):  # a worker inherits them, so they are taken out first
    GIVEN = GIVEN.replace(ours, "").strip()
os.environ["XLA_FLAGS"] = f"{GIVEN} {QUICKLY} {CONVOLUTIONS}"
# PyTorch 2.13's oneDNN 3.12 writes past its memory in the gradients of narrow convolutions, on CPUs
# with AVX2 and no AVX-512 ("corrupted double-linked list" and the like). Its code for AVX does not.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")
COMPILED = None  # the directory to remove at the end, in the process that made it
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core. More threads of PyTorch, scikit-learn and BLAS only wait for another,
    # and do it by computing: a fifth of their tests' time.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent

# Of tests/one_block.py, to which the commands below are known.
ONE_BLOCK = ["--config.student.arch=one_block", "--config.target.arch=one_block"]

# Every part of the pipeline, for a few steps each, in the precision of most runs.
TINY = [
    "--config=configs/digits.py:float32",
    *ONE_BLOCK,
    "--config.seeds=(0,)",
    "--config.fractions=(0.05,1.0)",
    "--config.queries=()",
    "--config.target.epochs=3",
    "--config.target.learning_rate=0.5",  # so that it learns: 79 % are right
    "--config.pretrain.moco.epochs=1",
    "--config.pretrain.simsiam.epochs=1",
    "--config.pretrain.rotation.epochs=1",
    "--config.distill.epochs=0.1",
    "--config.distill.min_steps=12",
    "--config.distill.batch_size=16",
]


# Look for garbage less often than after every 700 new objects: to trace a program makes many, and
# hardly any garbage. It took 6 % of the time.
gc.set_threshold(20_000)


def pytest_collection_finish():
    """And not among the modules."""
    gc.freeze()


def pytest_sessionfinish():
    """Nor at the end, when pytest looks for it five times among all that is left."""
    gc.freeze()


MAPS = Path("/proc/self/maps")
MANY_MAPS = 20_000  # Linux gives a process 65,530 (vm.max_map_count)
TESTS = itertools.count(1)


def pytest_runtest_teardown(nextitem):
    """Drop compiled programs before there are too many.

    Each takes a few memory maps. A process at the limit of them aborts where it starts a thread, or
    hangs. To count them takes some milliseconds, and ten tests do not make 40,000.
    """
    if next(TESTS) % 10 or not MAPS.exists():
        return
    if len(MAPS.read_bytes().splitlines()) > MANY_MAPS:
        import jax

        jax.clear_caches()


def pytest_unconfigure():
    """Remove what this process made."""
    if COMPILED:
        shutil.rmtree(COMPILED, ignore_errors=True)


# The first three are slow, and the others are the longest of the quick ones that would come late.
FIRST = {
    f"test_{name}.py"
    for name in ("invariance", "processes", "benchmarks", "workdir", "augment", "served", "parity")
}


def pytest_collection_modifyitems(items):
    """The longest files come first, so that no worker has one of them alone at the end."""
    items.sort(key=lambda item: item.path.name not in FIRST)


# Their tests run the same command, which one process compiles once.
TOGETHER = {
    f"test_{name}.py"
    for name in ("by_answers", "faults", "kill", "main", "pipeline", "reach", "recorded", "served")
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several workers a file's tests stay together, and so do those of `TOGETHER`."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "together" if Path(file).name in TOGETHER else file

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_block():
    """Makes the network known in this process."""
    import one_block  # noqa: F401


@pytest.fixture(scope="session")
def environment():
    """Of commands, which find compiled what another has compiled."""
    return dict(os.environ)


@pytest.fixture(scope="session")
def as_users():
    """The same for commands that are compiled as users compile them."""
    return {**os.environ, "XLA_FLAGS": GIVEN}


@pytest.fixture(scope="session")
def start(environment):
    """start(*arguments, **environment) -> the running command, see tests/forks.py."""
    from forks import Fork, Server

    server = Server(environment)
    yield lambda *arguments, **more: Fork(server, [*map(str, arguments)], more)
    server.close()


@pytest.fixture(scope="session")
def process(start):
    """process(*arguments) -> (exit status, standard out, standard error) of a new process."""

    def run(*arguments):
        running = start(*arguments)
        out, err = running.communicate()
        return running.returncode, out, err

    return run


@pytest.fixture(scope="session")
def command():
    """command(*arguments) -> what `process` gives, in this process: it imports nothing anew, and
    compiles nothing that an earlier one has compiled."""
    from qmx.main import main

    def run(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(ROOT),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            status = main(["qmx.main", *map(str, arguments)])
        return status, out.getvalue(), err.getvalue()

    return run


@pytest.fixture
def printed(monkeypatch, capsys):
    """printed(file, *words) -> the lines that a benchmark prints, as its own program, in this
    process: it imports nothing anew, and one compilation serves all that have the same step."""

    def run(file, *words):
        path = ROOT / "benchmarks" / file
        monkeypatch.syspath_prepend(str(path.parent))
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def on_small_disk(tmp_path):
    """on_small_disk(script, *folders): the ended process of a Python script on a real disk of 12
    MB, whose folder is its first word; it imports from the checkout and from `folders`."""
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=12m none {tmp_path}"
    if (
        not shutil.which("unshare")
        or subprocess.run([*alone, mount], capture_output=True).returncode
    ):
        pytest.skip("no small disk can be mounted here")

    def run(script, *folders):
        path = os.pathsep.join(map(str, (ROOT, *folders)))
        return subprocess.run(
            [*alone, f'{mount} && exec {sys.executable} -c "$0" {tmp_path}', script],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    return run


@pytest.fixture(scope="session")
def finished(command, tmp_path_factory):
    """The workdir of an undisturbed tiny run; of several workers one runs it, and each has a copy
    of its own."""
    ours = tmp_path_factory.mktemp("runs") / "tiny"
    several = "PYTEST_XDIST_WORKER" in os.environ
    made = tmp_path_factory.getbasetemp().parent / "tiny" if several else ours
    with open(f"{made}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "report.sha256").exists():
            status, _, err = command(*TINY, f"--workdir={made}")
            assert status == 0, err
    if several:
        shutil.copytree(made, ours)
    return ours


def table(workdir):
    """results.json without what differs from run to run."""
    results = json.loads((workdir / "results.json").read_text())
    for key in ("provenance", "audit"):  # the audit follows from the rest, and repeats the command
        del results[key]
    for row in results["rows"] + results["monitors"]:
        del row["seconds"]
    return results
