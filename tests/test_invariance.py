"""What a training makes does not depend on the number of devices, nor on being stopped and gone on
with."""

import json
import shutil

import numpy as np
import pytest
from conftest import LEVEL, QUICKLY

pytestmark = pytest.mark.slow

METHODS = ("moco", "simsiam", "rotation", "fixmatch", "distill")
STEPS = 14  # two dispatches of six, and what is left


# Those whose batches are made each way there is: whole epochs of images alone; and epochs that run
# into each other, of images with scores, and of others beside them. By the number of devices.
FED = {1: ("rotation",), 4: ("rotation", "fixmatch"), 8: ("rotation", "fixmatch")}
# Those that a new process ends: with the largest state, and with two streams of images.
ENDED_ANEW = ("moco", "fixmatch")


@pytest.fixture(scope="module")
def train(start):
    """train(devices, dtype, *runs): a new process with so many devices, see
    tests/small_trainings.py."""

    def run(devices, dtype, *runs):
        quick = LEVEL if dtype == "float64" else QUICKLY
        flags = f"--xla_force_host_platform_device_count={devices} {quick}"
        words = json.dumps([(str(folder), *how) for folder, *how in runs])
        process = start("tests/small_trainings.py", dtype, STEPS, words, XLA_FLAGS=flags)
        out, err = process.communicate()
        assert process.returncode == 0 and out.split() == [str(devices)], err

    return run


@pytest.fixture(scope="module")
def float32(train, tmp_path_factory):
    """The folder of all runs in float32, of one and of four devices."""
    root = tmp_path_factory.mktemp("float32")
    pieces, others = root / "in pieces", sorted({*METHODS} - {*ENDED_ANEW})
    train(
        4,
        "float32",
        (root / "4", METHODS, (0,), 1),
        (root / "4 from the host", FED[4], (0,), 0),
        (pieces, ENDED_ANEW, (3, 6), 1),
        (pieces, others, (3, 6, 0), 1),
    )
    # Its checkpoints are those of the ninth step.
    shutil.copytree(pieces, root / "moved", ignore=shutil.ignore_patterns("*.npz"))
    train(4, "float32", (pieces, ENDED_ANEW, (0,), 1))
    train(
        1,
        "float32",
        (root / "1", METHODS, (0,), 1),
        (root / "1 from the host", FED[1], (0,), 0),
        (root / "moved", METHODS, (0,), 1),
    )
    return root


@pytest.fixture(scope="module")
def float64(train, tmp_path_factory):
    """The same in float64, of one and of eight devices; also with six steps in a dispatch, stopped
    between two of these."""
    root = tmp_path_factory.mktemp("float64")
    for devices in (1, 8):
        train(
            devices,
            "float64",
            (root / f"{devices}", METHODS, (0,), 1),
            (root / f"{devices} in pieces of six", FED[devices], (1, 0), 6),
        )
    return root


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
    """The losses of all steps, every leaf of the last states, the answers and the neighbours.

    `kinks` is how many of the methods may meet a kink that changes the leaves by more, up to
    `KINK`: a difference that is not rounding's shows in all methods, and in float64.
    """
    for name in methods:
        assert len(losses(a, methods)[name]) == STEPS
        np.testing.assert_allclose(
            losses(b, methods)[name], losses(a, methods)[name], rtol=rtol, atol=atol, err_msg=name
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


def test_devices(float32):
    """To float32's rounding; eight devices, where a group of statistics lies on several, are
    compared in float64."""
    assert_same(float32 / "1", float32 / "4", **ROUNDING, kinks=1)


def test_devices_in_float64(float32, float64):
    """It is rounding and nothing else: in double precision the difference is ten million times
    smaller."""
    one, eight = float64 / "1", float64 / "8"
    assert_same(one, eight, rtol=1e-12, atol=1e-13)
    with np.load(one / "moco/state.npz") as state:
        assert {str(state[path].dtype) for path in state.files} == {"float64", "int32"}
    # The same weights and the same views at the beginning as in float32.
    for name in METHODS:
        np.testing.assert_allclose(
            losses(one)[name][:2], losses(float32 / "1")[name][:2], rtol=1e-5, atol=2e-6
        )


def test_resume(float32):
    """Stopped twice in the middle of an epoch, gone on with by the same process, and two of them
    then by a new one: equal to the bit."""
    assert_same(float32 / "4", float32 / "in pieces", rtol=0, atol=0)


def test_resume_on_other_devices(float32):
    """A checkpoint of four devices goes on with one."""
    assert_same(float32 / "1", float32 / "moved", **ROUNDING, kinks=1)


@pytest.mark.parametrize("devices", [1, 4])
def test_images_on_the_devices(float32, devices):
    """Batches that are gathered there are the host's: the same bits after as many steps."""
    host = float32 / f"{devices} from the host"
    assert_same(host, float32 / f"{devices}", rtol=0, atol=0, methods=FED[devices])


@pytest.mark.parametrize("devices", [1, 8])
def test_several_steps_in_one_dispatch(float64, devices):
    """The same bits as one in each gives, also where the run was stopped between two dispatches and
    went on.

    In float64, whose convolutions are matrix products: XLA's float32 ones round another way in a
      loop.
    """
    pieces = float64 / f"{devices} in pieces of six"
    assert_same(float64 / f"{devices}", pieces, rtol=0, atol=0, methods=FED[devices])
