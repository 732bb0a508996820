"""The command line: mistakes end with status 2, one line on standard error, and no workdir."""

import ast
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib

import jax
import numpy as np
import pytest
from conftest import ONE_BLOCK, ROOT, TINY
from jax.experimental.compilation_cache import compilation_cache

from qmx import signals
from qmx.main import MOST_USED, load_file, main
from qmx.pipeline import STAGES
from qmx.settings import base, leaves
from qmx.shipped import config_file, with_files
from qmx.signals import stop_on_signals

DIGITS = "--config=configs/digits.py"
TYPO = (
    "from qmx.settings import base\n\n\ndef get_config():\n    c = base()\n    c.epochs = 3\n   "
    " return c\n"
)


def npz(path, n=40, **changes):
    rng = np.random.default_rng(len(str(path)))
    arrays = {
        "image": rng.integers(0, 256, (n, 8, 8, 1), np.uint8),
        "label": np.arange(n) % 4,
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [DIGITS, "--config.pretrain.moco.epoch=1"],
            "unknown config key 'pretrain.moco.epoch'; did you mean 'pretrain.moco.epochs'",
        ),
        ([DIGITS, "--config.distill.min_steps=2.5"], "config.distill.min_steps=2.5"),
        ([DIGITS, "--config.fractions=(0,)"], "fraction 0 is outside"),
        ([DIGITS, "--config.fractions=(1.5,)"], "fraction 1.5 is outside"),
        ([DIGITS, "--config.queries=2000"], "queries has 2000; use whole numbers from 1 to 1437"),
        ([DIGITS, "--config.queries=('20',)"], "queries has '20'; use whole numbers"),
        (
            [DIGITS, "--config.queries=()", "--config.fractions=()"],
            "fractions and queries are both empty",
        ),
        ([DIGITS, "--config.inits=('mocoo',)"], "unknown value 'mocoo'; did you mean 'moco'"),
        (
            [DIGITS, "--config.pretrain.moco.batch_size=2048"],
            "batch_size 2048 is larger than the pool of 1437",
        ),
        (
            [DIGITS, *ONE_BLOCK, "--config.pretrain.moco.queue_size=1000"],
            "queue_size 1000 is not a multiple of batch_size 128",
        ),
        ([DIGITS, "--cnfig.x=1"], "cnfig"),
        ([DIGITS, "word"], "'word' is no flag"),
        ([DIGITS, "--stage=pretain"], "--stage=pretain is unknown"),
        (["--config=nowhere.py"], "nowhere.py: no such file"),
        (["--config=digit"], "digit: no such file; .* are cifar10, digits.*imagenet"),
        (["--config=digits:float16"], "'float16' is none of float32"),
        (["--config={tmp}/typo.py"], "does not load: AttributeError.*epochs"),
        ([], "--config=NAME, or FILE.py, and --workdir=DIRECTORY are needed"),
        ([DIGITS, "--config.data.source=arrays"], "needs a file of images"),
        (
            [
                DIGITS,
                "--config.data.source=arrays",
                "--config.data.path={tmp}/nolabel.npz",
                "--config.data.eval_path={tmp}/good.npz",
                "--config.queries=(10,)",
            ],
            "target.kind=train learns from labels, and the pool nolabel has none",
        ),
        (
            [
                DIGITS,
                "--config.data.source=arrays",
                "--config.data.path={tmp}/good.npz",
                "--config.data.eval_path={tmp}/rank.npz",
            ],
            r"rank.npz: image has shape \(40, 64\)",
        ),
        (
            [
                DIGITS,
                "--config.data.source=arrays",
                "--config.data.path={tmp}/nan.npz",
                "--config.data.eval_path={tmp}/good.npz",
            ],
            "nan.npz: image holds NaN in 1 of 40",
        ),
    ],
)
def test_mistakes(tmp_path, command, arguments, message):
    """Each with the value and the cure."""
    npz(tmp_path / "good.npz")
    npz(tmp_path / "nolabel.npz", label=None)
    npz(tmp_path / "rank.npz", image=np.zeros((40, 64), np.uint8))
    broken = np.zeros((40, 8, 8, 1))
    broken[3, 2, 1] = np.nan
    npz(tmp_path / "nan.npz", image=broken)
    (tmp_path / "typo.py").write_text(TYPO)
    workdir = tmp_path / "w"
    status, out, err = command(
        *(word.format(tmp=tmp_path) for word in arguments), f"--workdir={workdir}"
    )
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("qmx: ") and re.search(message, err), err
    assert not workdir.exists()


def test_unwritable_workdir(command, tmp_path):
    """A file where the workdir should be: one line."""
    (tmp_path / "file").write_text("")
    status, _, err = command(*TINY, f"--workdir={tmp_path}/file/w")
    assert status == 2 and len(err.splitlines()) == 1 and "file" in err


@pytest.mark.slow
def test_images_of_ones_own(command, tmp_path):
    """Two npz files run from pixels to the table; colour images, and a target of the user's
    size."""
    rng = np.random.default_rng(0)
    for name in ("pool", "test"):
        label = rng.integers(0, 3, 64)
        image = rng.integers(0, 60, (64, 12, 12, 3), np.uint8)
        image[np.arange(64), :, :, label] += 120
        npz(tmp_path / f"{name}.npz", image=image, label=label)
    status, out, err = command(
        DIGITS,
        f"--workdir={tmp_path}/w",
        "--config.data.source=arrays",
        f"--config.data.path={tmp_path}/pool.npz",
        f"--config.data.eval_path={tmp_path}/test.npz",
        "--config.inits=('none',)",
        "--config.also=()",
        "--config.seeds=(0,)",
        "--config.fractions=(0.5,)",
        "--config.queries=20",
        *ONE_BLOCK,
        "--config.target.epochs=8",
        "--config.target.batch_size=16",
        "--config.distill.min_steps=32",
        "--config.distill.batch_size=16",
    )
    assert status == 0, err
    assert "64 images of pool; evaluated on 64 others" in out
    rows = [
        line.split("|")[1].strip()
        for line in out.split("Accuracy, top-1 / top-5")[1].splitlines()
        if "%" in line
    ]
    assert rows[:2] == ["20 (31 %)", "32 (50 %)"]


def test_help(capsys):
    """The flags, the exit statuses, each stage and the most used keys in a line each, at once."""
    assert main(["qmx", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--workdir=DIRECTORY" in printed and "Exit status" in printed
    assert tuple(re.findall(r"^  (\w+)  +[a-z]", printed, re.MULTILINE)) == STAGES
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert f"\nConfigs: {', '.join(names)}\n" in printed
    keys = re.findall(r"^  ([\w.]+)=\S+ +# \w", printed, re.MULTILINE)
    assert tuple(keys) == MOST_USED
    assert max(map(len, printed.splitlines())) <= 100


def test_keys(capsys):
    """Every key of the settings once, with its default, which the key takes, and its remark."""
    assert main(["qmx", "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line and not line.startswith("#")]
    found = dict(re.match(r"([\w.]+)=(\S+)", line).groups() for line in said)
    want = dict(leaves(base()))
    assert found.keys() == want.keys() and len(said) == len(want)
    for key, value in want.items():
        shown = found[key].strip('"')
        assert shown == value if isinstance(value, str) else ast.literal_eval(shown) == value, key

    for line in (
        # Behind a key; above one; of `training`, in every training; one's own in its place; of all
        # encoders; of a group.
        "save_minutes=10.0  # between two checkpoints of a training: what a kill may cost",
        "budget=None  # distinct images that may be asked about in all; None is no limit",
        "target.batch_size=256  # global, over all devices",
        "monitor.probe.batch_size=256  # global, over all devices",
        "pretrain.simsiam.learning_rate=0.1  # 0.05 x batch_size / 256",
        "pretrain.moco.queue_size=65536  # K, a multiple of batch_size",
        "weak_view.size=0  # side of the view; 0 is the image's own",
        '# propagation: of the use "pool", see qmx/selection/propagate.py',
    ):
        assert line in [re.sub(" +#", "  #", line) for line in lines], line
    path = 'pretrain.imported.path=""'
    assert any(line.startswith(path) and "# weights that somebody" in line for line in lines)


def test_config_by_name(tmp_path, monkeypatch):
    """A name finds qmx's own config, from any directory; a file of that name comes first."""
    own = ROOT / "configs/digits.py"
    monkeypatch.chdir(tmp_path)
    assert config_file("digits") == str(own)
    assert load_file("digits:float32") == load_file(f"{own}:float32") != load_file("digits")
    assert with_files(["qmx", "--config", "digits:float32", "--config.seeds=1", "--update"]) == [
        "qmx",
        f"--config={own}:float32",
        "--config.seeds=1",
        "--update",
    ]
    (tmp_path / "digits").write_text(own.read_text())
    assert config_file("digits:float32") == "digits:float32"


@pytest.mark.parametrize("module", ["qmx", "qmx.main"])
def test_both_commands(environment, tmp_path, module):
    """`python -m qmx` is `python -m qmx.main`, also outside the checkout."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--config=digits", "--stage=nonsense", "--workdir=w"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("qmx: --stage=nonsense is unknown"), done.stderr


def test_what_is_installed():
    """The command, and the configs inside the package, as pyproject.toml describes them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"qmx": "qmx.__main__:run"}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["only-include"] == ["qmx", "configs"]
    assert wheel["sources"] == {"configs": "qmx/configs"}


def what_a_call_sets():
    """Everything of the process that a call of `main` sets for itself, or opens."""
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return {
        "settings": (jax.config.jax_enable_x64, jax.config.jax_compilation_cache_dir),
        "flags for XLA": os.environ.get("XLA_FLAGS"),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        "wakeup": wakeup,
        "watching": [thread for thread in threading.enumerate() if "watch" in thread.name],
    }


@pytest.fixture
def no_cache():
    """Without the compilation cache that the tests share, as users call it."""
    cache = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", cache)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_two_calls_in_one_process(no_cache, tmp_path, monkeypatch, capsys):
    """Each has its own config, workdir and compilation cache, reads no words but its own, and
    leaves the process as it was; so does a mistake."""
    monkeypatch.setattr(sys, "argv", ["another", "--own=words", "--config.epochs=1"])
    before = what_a_call_sets()
    short = [*ONE_BLOCK, "--config.seeds=(0,)", "--config.inits=('none',)", "--config.also=()"]
    calls = {
        "target": [f"{DIGITS}:float32", *short, "--config.target.epochs=0.2"],
        "select": [DIGITS, *short, "--config.target.batch_size=32"],
    }
    for stage, words in calls.items():
        words = ["qmx", *words, f"--stage={stage}", f"--workdir={tmp_path}/{stage}"]
        assert main(words) == 0
        assert capsys.readouterr().out.startswith(f"stage {stage} is done")
        assert what_a_call_sets() == before, stage
        for mistake in ("word", "--config.inits=(1,)", "--config.seeds=(1,)"):
            assert main([*words, mistake]) == 2
            assert what_a_call_sets() == before, (stage, mistake)
    assert list((tmp_path / "target/compiled").iterdir()), "a cache of its own"
    first, second = (json.loads((tmp_path / stage / "config.json").read_text()) for stage in calls)
    assert (first["student"]["dtype"], second["student"]["dtype"]) == ("float32", "float64")
    assert (first["target"]["batch_size"], second["target"]["batch_size"]) == (64, 32)


def test_a_signal_is_for_its_call():
    """Within a call it is taken note of, after it it does what it did before; the next call has
    not seen it."""
    came = []
    kept = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        for _ in range(2):
            with stop_on_signals(print) as stopped:
                assert not stopped()
                os.kill(os.getpid(), signal.SIGTERM)
                deadline = time.monotonic() + 10
                while not stopped() and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert stopped() and not came
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_signals_of_others():
    """Those that a library handles, as a pool's SIGCHLD, and those of forked processes, which share
    the pipe that signals are written into, stop nothing."""
    kept = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        with stop_on_signals(print) as stopped:
            for _ in range(2):
                if not (child := os.fork()):
                    os.kill(os.getpid(), signal.SIGTERM)  # which ends it, as it would without us
                    time.sleep(10)
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            time.sleep(0.2)
            assert not stopped()
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 10
            while not stopped() and time.monotonic() < deadline:
                time.sleep(0.001)
            assert stopped()
    finally:
        signal.signal(signal.SIGCHLD, kept)


def test_a_signal_amid_something_long(monkeypatch):
    """The user is told that it was heard, and how to end at once; of what stops soon nothing."""
    told = []
    for patience, lines in ((60.0, 0), (0.01, 1)):
        monkeypatch.setattr(signals, "PATIENCE", patience)
        with stop_on_signals(told.append) as stopped:
            assert not told
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + 10
            while not stopped() or len(told) < lines:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        assert len(told) == lines
    assert "a second signal ends it at once" in told[0]
    code = (
        "import time\nfrom qmx.signals import stop_on_signals\n"
        "with stop_on_signals(print):\n    print('begun', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"begun\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(10) == 128 + signal.SIGINT
    process.stdout.close()


@pytest.mark.slow
def test_terminal(as_users, tmp_path):
    """In a terminal the progress is drawn as bars that go when they are done; the table is
    plain. Compiled as users have it."""
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "tests/one_block.py", *TINY, "--stage=target", f"--workdir={tmp_path}/w"],
        cwd=ROOT,
        env={**as_users, "TERM": "xterm-256color", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=writer,
    )
    os.close(writer)
    drawn = b""
    try:
        while chunk := os.read(reader, 4096):
            drawn += chunk
    except OSError:  # how a pty says that it was closed
        pass
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and b"stage target is done" in out and b"\x1b" not in out
    assert b"images/s loss" in drawn and "━".encode() in drawn
