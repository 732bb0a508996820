"""Everything runs on two CPU devices, so that what depends on their number shows.

In the tests' own process XLA compiles quickly rather than well; the commands that the tests start
are compiled as users compile them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

QUICKLY = "--xla_backend_optimization_level=0"
GIVEN = (
    os.environ.get("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    .replace(QUICKLY, "")
    .strip()
)
os.environ["XLA_FLAGS"] = f"{GIVEN} {QUICKLY}"  # a worker inherits it, so it was taken out first

import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent

# Every part of the pipeline, for a few steps each, in the precision of most runs.
TINY = [
    "--config=configs/digits.py:float32",
    "--config.seeds=(0,)",
    "--config.fractions=(0.05,1.0)",
    "--config.queries=()",
    "--config.target.epochs=2",
    "--config.pretrain.moco.epochs=1",
    "--config.pretrain.simsiam.epochs=1",
    "--config.pretrain.rotation.epochs=1",
    "--config.distill.epochs=0.5",
    "--config.distill.min_steps=12",
]


MAPS = Path("/proc/self/maps")
MANY_MAPS = 20_000  # Linux gives a process 65,530 (vm.max_map_count)


def pytest_runtest_teardown(nextitem):
    """Drop compiled programs before there are too many.

    Each takes a few memory maps. A process at the limit of them aborts where it starts a thread, or
    hangs.
    """
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MANY_MAPS:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """For commands: one compilation cache, of all workers, so that only the first of them
    compiles."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return {
        **os.environ,
        "XLA_FLAGS": GIVEN,
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


@pytest.fixture(scope="session")
def start(environment):
    """start(*arguments) -> the running command, its standard out and error as text pipes."""

    def popen(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "qmx.main", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen


@pytest.fixture(scope="session")
def command(start):
    """command(*arguments) -> (exit status, standard out, standard error)."""

    def run(*arguments):
        process = start(*arguments)
        out, err = process.communicate(timeout=900)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="session")
def finished(command, tmp_path_factory):
    """The workdir of an undisturbed tiny run."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    status, _, err = command(*TINY, f"--workdir={workdir}")
    assert status == 0, err
    return workdir


def table(workdir):
    """results.json without what differs from run to run."""
    results = json.loads((workdir / "results.json").read_text())
    for row in results["rows"] + results["monitors"]:
        del row["seconds"]
    return results
