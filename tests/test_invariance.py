"""What a training makes does not depend on the number of devices, nor on being stopped and gone on
with."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import LEVEL, ROOT

pytestmark = pytest.mark.slow

METHODS = ("moco", "simsiam", "rotation", "fixmatch", "distill")
STEPS = 20


@pytest.fixture(scope="module")
def trained(environment, tmp_path_factory):
    """trained(name, devices, dtype, stops) -> the folder of tests/small_trainings.py, made once.

    `stops` are the dispatches that each process but the last does, with its own number of devices.
    """
    root = tmp_path_factory.mktemp("trained")

    def run(name, devices=(1,), dtype="float32", stops=(), at_once=1, methods=METHODS):
        folder = root / name
        if not folder.exists():
            for number, stop in zip(devices, (*stops, 0), strict=True):
                flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={number} {LEVEL}"}
                wide = {"JAX_ENABLE_X64": "1"} if dtype == "float64" else {}
                words = [
                    sys.executable,
                    "tests/small_trainings.py",
                    str(folder),
                    ",".join(methods),
                    *map(str, (STEPS, stop, at_once)),
                ]
                done = subprocess.run(
                    words,
                    cwd=ROOT,
                    env={**environment, **flags, **wide},
                    capture_output=True,
                    text=True,
                    timeout=900,
                )
                assert done.returncode == 0 and done.stdout.split() == [str(number)], done.stderr
        return folder

    return run


def losses(folder, methods=METHODS):
    """The losses of each step, by method."""
    return {
        name: [
            json.loads(line)["loss"]
            for line in (folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in methods
    }


# Of float32, in losses, weights, statistics and answers; and in the momenta. Of the millions of
# activations of a run about one rounds to the other side of a ReLU's kink, which one it is depends
# on the machine, and its share of a gradient, 1/8192 of a channel's, is then there or not. float64
# has no such, and no such allowance.
ROUNDING = {"rtol": 1e-5, "atol": 2e-6, "of_momenta": 1e-4}


# Largest difference of a leaf that one of them was seen to make, in momenta; a tenth of it in
# weights.
KINK = 2e-3


def assert_same(a, b, rtol, atol, of_momenta=None, methods=METHODS, kinks=0):
    """The losses of 20 steps, every leaf of the last states, the answers and the neighbours.

    `kinks` is how many of the methods may meet a kink that changes the leaves by more, up to
    `KINK`: a difference that is not rounding's shows in all methods, and in float64.
    """
    for name in methods:
        assert len(losses(a)[name]) == STEPS
        np.testing.assert_allclose(
            losses(b, methods)[name], losses(a)[name], rtol=rtol, atol=atol, err_msg=name
        )
    beyond = []
    for file in (
        *(f"{name}/state.npz" for name in methods),
        *["evaluation.npz"] * ("distill" in methods),
    ):
        with np.load(a / file) as x, np.load(b / file) as y:
            assert x.files == y.files
            for path in x.files:
                assert x[path].dtype == y[path].dtype, path
                slack = (of_momenta or atol) if path.startswith("opt_state") else atol
                if not np.allclose(y[path], x[path], rtol=rtol, atol=slack):
                    beyond.append(file)
                    largest = KINK if path.startswith("opt_state") else KINK / 10
                    slack = largest if len(set(beyond)) <= kinks else slack
                np.testing.assert_allclose(
                    y[path], x[path], rtol=rtol, atol=slack, err_msg=f"{file} {path}"
                )


@pytest.mark.parametrize("devices", [2, 4])
def test_devices(trained, devices):
    """To float32's rounding; eight devices, where a group of statistics lies on several, are
    compared in float64."""
    assert_same(trained("1"), trained(f"{devices}", (devices,)), **ROUNDING, kinks=1)


def test_devices_in_float64(trained):
    """It is rounding and nothing else: in double precision the difference is ten million times
    smaller."""
    one, eight = (trained(f"{devices} in float64", (devices,), "float64") for devices in (1, 8))
    assert_same(one, eight, rtol=1e-12, atol=1e-13)
    with np.load(one / "moco/state.npz") as state:
        assert {str(state[path].dtype) for path in state.files} == {"float64", "int32"}
    # The same weights and the same views at the beginning as in float32.
    for name in METHODS:
        np.testing.assert_allclose(
            losses(one)[name][:2], losses(trained("1"))[name][:2], rtol=1e-5, atol=2e-6
        )


def test_resume(trained):
    """Stopped twice in the middle of an epoch, each time gone on with by a new process:
    equal to the bit."""
    pieces = trained("in pieces", (2, 2, 2), stops=(3, 6))
    assert_same(trained("2", (2,)), pieces, rtol=0, atol=0)


def test_resume_on_other_devices(trained):
    """A checkpoint of four devices goes on with one."""
    assert_same(trained("1"), trained("moved", (4, 1), stops=(7,)), **ROUNDING, kinks=1)


@pytest.mark.parametrize("devices", [1, 4])
def test_images_on_the_devices(trained, devices):
    """Batches that are gathered there are the host's: the same bits after as many steps."""
    host = trained(f"{devices} from the host", (devices,), at_once=0)
    assert_same(host, trained(f"{devices}", (devices,)), rtol=0, atol=0)


@pytest.mark.parametrize("devices", [1, 8])
def test_several_steps_in_one_dispatch(trained, devices):
    """The same bits as one in each gives, also where the run was stopped between two dispatches and
    went on.

    In float64, whose convolutions are matrix products: XLA's float32 ones round another way in a
      loop.
    """
    how = {"methods": ("moco", "fixmatch"), "at_once": 6, "stops": (1,)}
    pieces = trained(f"{devices} in pieces of six", (devices,) * 2, "float64", **how)
    whole = trained(f"{devices} in float64", (devices,), "float64")
    assert_same(whole, pieces, rtol=0, atol=0, methods=how["methods"])
