"""A workdir belongs to one process, and what is in it outlives damage, other files and other
data."""

import fcntl
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_BLOCK, ROOT, TINY, table
from numbered import images
from test_ledger import Target
from test_ledger_commands import command as ledger_command
from test_named import arrays

from qmx.files import SUMS, Unreadable, check_file, read_json, read_sums, write_arrays, write_sums
from qmx.ledger import Ledger
from qmx.main import main
from qmx.settings import base
from qmx.sharding import connect
from qmx.stages import target as targets
from qmx.stages.query import note_calls
from qmx.stages.run import Run, out_of_memory
from qmx.training import _log
from qmx.workdir import Mismatch, locked, stage

# One student of a function, for seconds.
SMALL = [
    "--config=configs/digits.py:float32",
    ONE_BLOCK[0],
    "--config.seeds=(0,)",
    "--config.inits=('none',)",
    "--config.also=()",
    "--config.fractions=()",
    "--config.queries=(40,)",
    "--config.data.limit=120",
    "--config.distill.min_steps=2",
    "--config.distill.epochs=0.1",
    "--config.distill.batch_size=40",
    "--config.target.kind=callable",
]
FUNCTION = """
from pathlib import Path
import numpy as np

def f(images):
    with open(Path(__file__).with_name("asked"), "a") as file:
        file.write("x" * len(images))
    if Path(__file__).with_name("broken").exists():
        raise RuntimeError("a fault of the user's")
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    return flat @ np.random.default_rng(0).normal(size=(flat.shape[1], 10)).astype(np.float32)
"""


def asked(tmp_path):
    """Number of images that the function was asked about."""
    path = tmp_path / "asked"
    return path.stat().st_size if path.exists() else 0


@pytest.fixture
def small(tmp_path, command):
    """small(*more) -> what the command gives, with a function of its own as the target."""
    (tmp_path / "own.py").write_text(FUNCTION)

    def run(*more):
        return command(
            *SMALL, f"--config.target.path={tmp_path}/own.py:f", f"--workdir={tmp_path}/w", *more
        )

    return run


def last(err):
    """The one line of a mistake, the last one."""
    lines = err.splitlines()
    assert lines[-1].startswith("qmx: ") and "Traceback" not in err, err
    return lines[-1]


def test_one_process_at_a_time(tmp_path):
    """Another one is told who works there; the lock goes with any death."""
    code = (
        "import sys, time; from pathlib import Path; from qmx.workdir import locked\n"
        f"with locked(Path({str(tmp_path / 'w')!r})):\n    print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in\n"
    with (
        pytest.raises(Mismatch, match=rf"process {process.pid} on .* works in .*another --workdir"),
        locked(tmp_path / "w"),
    ):
        raise AssertionError("both are in")
    process.kill()
    process.wait()
    with locked(tmp_path / "w"):
        pass


def test_a_command_beside_another(small, tmp_path):
    """Status 2 in one line; nothing is asked and nothing changed."""
    (tmp_path / "w").mkdir()
    with open(tmp_path / "w/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, out, err = small()
    assert (status, out) == (2, "") and "works in" in last(err) and len(err.splitlines()) == 1
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["lock"] and not asked(tmp_path)


@pytest.mark.slow
def test_paid_answers_outlive_a_change_of_the_function(small, tmp_path):
    """A comment is added to the file: one line with both ways on, and each does what it says."""
    (tmp_path / "broken").touch()
    assert small()[0] == 2, "the usual story begins with a function that raises"
    (tmp_path / "broken").unlink()
    (tmp_path / "asked").unlink()
    (tmp_path / "own.py").write_text(FUNCTION + "# mended\n")
    status, _, err = small()
    assert status == 0, f"nothing was answered yet, so it is the target: {err}"
    paid, before = asked(tmp_path), table(tmp_path / "w")

    (tmp_path / "own.py").write_text(FUNCTION + "# and a remark\n")
    for more in ((), ("--update",)):
        status, _, err = small(*more)
        assert status == 2 and asked(tmp_path) == paid
        assert re.search(
            r"is not what it was when .*ledger.sqlite got its \d+ answers; --update=same-target "
            "goes on with them, --update=new-target asks it everything",
            last(err),
        )
    assert small("--update=sometarget")[0] == 2
    for more in (("--update=same-target",), (), ("--update",)):
        status, _, err = small(*more)
        assert status == 0 and asked(tmp_path) == paid, err
    same = table(tmp_path / "w")
    assert same["rows"] == before["rows"] and same["account"] == before["account"]

    status, _, err = small("--update=new-target")
    assert status == 0 and asked(tmp_path) == 2 * paid, err
    assert small()[0] == 0 and asked(tmp_path) == 2 * paid


def test_a_ledger_that_is_gone(small, tmp_path):
    """What it no longer has is asked again, and the report counts both."""
    assert small()[0] == 0
    paid = asked(tmp_path)
    db = sqlite3.connect(tmp_path / "w/ledger.sqlite")
    db.execute("DELETE FROM answers WHERE row <= 10")
    db.commit()
    db.close()
    status, _, err = small()
    assert status == 0 and f"10 of {paid} answers that it had are no longer in" in err
    assert asked(tmp_path) == paid + 10
    for path in (tmp_path / "w").glob("ledger.sqlite*"):
        path.unlink()
    status, _, err = small()
    assert status == 0 and asked(tmp_path) == 2 * paid + 10, err
    account = table(tmp_path / "w")["account"]
    assert (account["calls"], account["lost"]) == (paid, paid + 10)
    report = (tmp_path / "w/report.md").read_text()
    assert f"{2 * paid + 10} calls" in report
    assert f"{paid + 10} of the calls are no longer in the ledger" in report


def test_a_damaged_ledger_and_its_cure(small, tmp_path):
    """A run names it and the command that recovers it; this one says what to do next; then the same
    run asks for the answer that is missing, and for no other."""
    assert small()[0] == 0
    paid, ledger = asked(tmp_path), tmp_path / "w/ledger.sqlite"
    with sqlite3.connect(ledger) as db:
        db.execute("UPDATE answers SET checksum = checksum + 1 WHERE row = 7")
    db.close()
    shutil.rmtree(tmp_path / "w/distill")
    shutil.rmtree(tmp_path / "w/evaluate")
    status, _, err = small()
    assert status == 2 and asked(tmp_path) == paid
    found = re.search(r"is damaged .*; python -m (qmx.ledger verify \S+)", last(err))
    status, out, _ = ledger_command(*found[1].split()[1:])
    assert status == 1
    subprocess.run(["sh", "-c", re.search("in its place: (.*)", out)[1]], check=True)
    status, _, err = small()
    assert status == 0 and asked(tmp_path) == paid + 1, err
    account = table(tmp_path / "w")["account"]
    assert (account["calls"], account["images"], account["lost"]) == (paid + 1, paid, 0)


def test_bits_of_what_a_ledger_is_known_by(tmp_path):
    """One flipped bit anywhere in target.json and account.json: the target keeps its name, so that
    nothing is paid again, and no calls are made up."""
    run = Run(base(), tmp_path, arrays(), "all", lambda: False, [])
    run.config.target.kind = "callable"
    result, draw = {"name": "f", "sha256": "ab" * 32, "preprocessing": "as-is"}, random.Random(0)
    with Ledger(tmp_path / "ledger.sqlite", target="ab" * 32) as ledger:
        ledger.ask(Target(), images(1, 2, 3))
    known = targets.Target(**targets.known_as(run, result))
    assert note_calls(run, known) == 0
    for name in ("target.json", "account.json"):
        path = tmp_path / name
        content = path.read_bytes()
        for place in range(len(content)):
            bit = 1 << draw.randrange(8)
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            assert targets.Target(**targets.known_as(run, result)) == known, (name, place, bit)
            assert note_calls(run, known) == 0, (name, place, bit)
            path.write_bytes(content)


def test_work_of_minutes_is_kept(tmp_path):
    """Of other inputs, or damaged: refused with what would be lost; --update throws it away."""
    runs = []

    def work():
        runs.append(1)
        write_arrays(tmp_path / "s/a.npz", a=np.arange(3))
        return {"n": len(runs)}

    def look(inputs, **options):
        return stage(tmp_path / "s", inputs, work, print, **options)

    assert look({"pool": "a"}) == {"n": 1}
    os.utime(tmp_path / "s/inputs.json", (time.time() - 7200,) * 2)
    with pytest.raises(Mismatch, match='pool: "a" there, "b" now; it took 2.0 hours. --update'):
        look({"pool": "b"})
    damaged = bytearray((tmp_path / "s/a.npz").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "s/a.npz").write_bytes(damaged)
    with pytest.raises(Mismatch, match="s/a.npz is not as it was written; it took 2.0 hours"):
        look({"pool": "a"})
    with pytest.raises(Unreadable, match="a.npz is not as it was written"):
        check_file(tmp_path / "s/a.npz")
    assert len(runs) == 1
    assert look({"pool": "a"}, update=True) == {"n": 2}
    assert look({"pool": "b"}) == {"n": 3}, "what took moments is done again"


def test_a_kill_before_the_end_keeps_the_checkpoints(tmp_path):
    """They go when the sums are written, and not before."""

    def work():
        (tmp_path / "s/checkpoints").mkdir(exist_ok=True)
        (tmp_path / "s/checkpoints/1").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "s", {}, work, print)
    assert (tmp_path / "s/checkpoints/1").exists()
    assert stage(tmp_path / "s", {}, lambda: {"a": 1}, print) == {"a": 1}
    assert not (tmp_path / "s/checkpoints").exists()


def test_sums_are_those_of_coreutils(tmp_path):
    """`sha256sum -c` agrees."""
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_bytes(bytes(range(256)))
    write_sums(tmp_path, ["a", "b"])
    subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=tmp_path, check=True)
    assert set(read_sums(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize("content", [b"", b"\0" * 20, b'{"a": ', b"[1]", b"\xff\xfe"])
def test_json_that_cannot_be_read(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(Unreadable, match="x.json cannot be read"):
        read_json(tmp_path / "x.json")
    with pytest.raises(Unreadable, match="y.json is missing"):
        read_json(tmp_path / "y.json")


def test_a_cut_line_of_the_metrics(tmp_path):
    """It is dropped, wherever it is; so is what no step wrote."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n{"step": 2, "lo\n\xff\0\n[3]\n{"step": 3}\n{"st')
    with _log(path, 3) as file:
        file.write('{"step": 4}\n')
    assert path.read_text() == '{"step": 1, "loss": 2}\n{"step": 3}\n{"step": 4}\n'


def files_of(workdir):
    """Every file that a run leaves for itself, but what is written anew at each call."""
    written = ("results.json", "report.md", "report.html", "curve.png", "report.sha256")
    written += ("lock", "metrics.jsonl")
    return sorted(
        path.relative_to(workdir)
        for path in workdir.rglob("*")
        if path.is_file() and path.name not in written and "compiled" not in path.parts
    )


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "zeroed":
        path.write_bytes(bytes(len(data)))
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.slow
def test_damaged_files(finished, command, tmp_path):
    """One file of each kind in a workdir, each damaged one way or another: the same command gives
    the same table, or one line that names the file. benchmarks/faults.py damages all of them, all
    ways."""
    draw = random.Random(0)
    kinds = {(path.parts[0], path.name): path for path in files_of(finished)}
    assert len(kinds) > 20
    for (part, name), path in kinds.items():
        how = draw.choice(["deleted", "cut", "zeroed", "flipped"])
        workdir = tmp_path / f"{part}-{name}"
        shutil.copytree(finished, workdir)
        damage(workdir / path, how)
        status, _, err = command(*TINY, f"--workdir={workdir}")
        if status == 0:
            new, old = table(workdir), table(finished)
            for account in (new["account"], old["account"]):
                account["lost"] = 0  # of a ledger that was deleted
            assert new == old, (path, how)
        else:
            assert status == 2 and name in last(err), (path, how, err)
        shutil.rmtree(workdir)


@pytest.mark.slow
def test_a_bit_of_the_weights(finished, command, tmp_path):
    """Where this call may not train, they are not read; where it may, they are made again."""
    shutil.copytree(finished, tmp_path / "w")
    path = Path("pretrain/moco-seed0/encoder.safetensors")
    damage(tmp_path / "w" / path, "flipped")
    shutil.rmtree(tmp_path / "w/distill/moco-random-logits-asked-71-seed0")
    status, _, err = command(*TINY, f"--workdir={tmp_path}/w", "--stage=distill")
    assert status == 2 and f"{path} is not as it was written" in last(err)
    # On a slow machine it took more than a minute, which goes with this flag alone.
    status, _, err = command(*TINY, f"--workdir={tmp_path}/w", "--update")
    assert status == 0 and f"because {tmp_path}/w/{path} is not as it was written" in err
    assert table(tmp_path / "w") == table(finished)


def test_files_that_end_the_program(small, tmp_path, capsys):
    """sys.exit(0) in a config or in a target's file is a mistake like any other."""
    (tmp_path / "c.py").write_text("import sys\n\ndef get_config():\n    sys.exit(0)\n")
    assert main(["qmx", f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/v"]) == 2
    assert re.search("c.py does not load: SystemExit: 0", capsys.readouterr().err)
    for text in ("import sys; sys.exit(0)", "import sys\n\ndef f(images):\n    sys.exit(0)\n"):
        (tmp_path / "own.py").write_text(text)
        status, out, err = small()
        assert (status, out) == (2, "") and re.search("exit|SystemExit", last(err)), err


@pytest.mark.slow
def test_streams_that_are_closed(finished, tmp_path):
    """Progress that nobody can read stops nothing; a table that nobody reads is no mistake; one
    that cannot be written is told."""
    shutil.copytree(finished, tmp_path / "w")
    words = " ".join(
        f"'{word}'"
        for word in [sys.executable, "tests/one_block.py", *TINY, f"--workdir={tmp_path}/w"]
    ).replace("'--config.", "'--config.")

    def shell(redirection, **environment):
        return subprocess.run(
            ["bash", "-c", f"{words} {redirection}"],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )

    ascii_alone = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}  # one stream in each of two calls
    done = shell("2>&-", **ascii_alone)
    assert done.returncode == 0 and "| 1437 (100 %)" in done.stdout and not done.stderr
    done = shell("2>&1 >/dev/null | head -c 1; exit ${PIPESTATUS[0]}")
    assert done.returncode == 0, done
    done = shell("| true; exit ${PIPESTATUS[0]}", **ascii_alone)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    done = shell(">/dev/full")
    assert done.returncode == 2, done
    assert "standard out cannot be written: No space left" in last(done.stderr)


def test_out_of_memory():
    """The device's own error, and the host's, in a line that says what to lower."""
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED") as caught:
        jnp.zeros(1 << 47, jnp.uint8).block_until_ready()
    text = str(out_of_memory("pretrain", "moco-seed0", caught.value))
    assert re.match(r"cpu \d has no memory left for \S+.* in pretrain/moco-seed0; lower ", text)
    assert "pretrain.moco.batch_size" in text
    with pytest.raises(MemoryError) as error:
        np.zeros(1 << 60, np.uint8)
    assert "the machine has no memory left" in str(out_of_memory("distill", "x", error.value))


def test_out_of_memory_in_a_run(small, tmp_path):
    """A target that takes more than there is, for more than eight images: status 2, one line; the
    key that it names is lowered, and the rest is asked for."""
    (tmp_path / "own.py").write_text(
        FUNCTION.rstrip() + " if len(images) <= 8 else np.zeros(1 << 58)\n"
    )
    status, out, err = small()
    assert (status, out) == (2, ""), err
    line = r"the machine has no memory left for \S+ EiB in query/.; lower (\S+) .*with --update"
    key = re.search(line, last(err))[1]
    status, _, err = small(f"--config.{key}=8")  # how it is asked may change in any workdir
    assert (key, status) == ("target.batch_size", 0), err
    account = table(tmp_path / "w")["account"]
    assert account["calls"] == account["images"] == asked(tmp_path) - account["failed"]


@pytest.mark.slow
def test_out_of_memory_in_a_training(command, tmp_path):
    """What the device has no room for: one line with the keys; the cure goes on from what is
    there."""
    words = [*TINY, "--config.inits=('moco',)", "--stage=pretrain", f"--workdir={tmp_path}/w"]
    status, _, err = command(*words, "--config.strong_view.size=65536")
    line = (
        r"cpu 0 has no memory left for .* in pretrain/moco-seed0; lower .*, or (\S+) .*(--update)"
    )
    assert status == 2, err
    key, update = re.search(line, last(err)).groups()
    assert key == "strong_view.size"
    status, _, err = command(*words, f"--config.{key}=0", update)
    assert status == 0, err


def computed(pid):
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_interrupted_early(tmp_path, after):
    """One line, 130 or 75, and nothing half-written; as users start it, from the first import."""
    words = [word for word in TINY if word not in ONE_BLOCK]
    # Python's own start, before the first module of qmx, is not qmx's to guard.
    start = "print('started', flush=True); import runpy; runpy.run_module('qmx', None, '__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", start, *words, f"--workdir={tmp_path}/w"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell ignores SIGINT for what it starts in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "started\n"
    until = computed(process.pid) + after
    while process.poll() is None and computed(process.pid) < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode in (75, 130), (process.returncode, err)
    assert not out and err.splitlines()[-1].startswith("qmx: ") and "Traceback" not in err, err
    assert not list(tmp_path.rglob("*.part"))


def test_one_of_a_launchers_processes(monkeypatch):
    """--processes=1 runs alone inside `srun --pty` and the like."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    connect(processes=1)


def test_who_is_waited_for(tmp_path):
    """At once, with the way to run alone; a signal ends the wait at once."""
    process = subprocess.Popen(
        [sys.executable, "tests/one_block.py", *SMALL, f"--workdir={tmp_path}/w"],
        cwd=ROOT,
        env={
            **os.environ,
            **{"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},
            **{"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            **{"SLURM_STEP_NUM_NODES": "1"},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    assert line.startswith("this is one of 4 processes") and "--processes=1 runs alone" in line
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err and not out, err
