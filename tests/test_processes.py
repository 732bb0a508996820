"""Two processes of two devices each run as one: the same table, the same ledger, and no hang when
one dies."""

import json
import shutil
import signal
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ONE_BLOCK, QUICKLY

# In float64, where the order of sums makes no difference that lasts.
SHORT = [
    "--config=configs/digits.py",
    *ONE_BLOCK,
    "--config.seeds=(0,)",
    "--config.fractions=(0.05,1.0)",
    "--config.queries=()",
    "--config.inits=('none','moco')",
    "--config.also=('moco+typiclust+pool','moco+margin','none+fixmatch')",
    "--config.fixmatch.epochs=1",
    "--config.fixmatch.mu=1",
    "--config.data.limit=300",
    "--config.target.epochs=1",
    "--config.target.batch_size=32",
    "--config.pretrain.moco.epochs=2",
    "--config.pretrain.moco.batch_size=64",
    "--config.pretrain.moco.group_size=16",
    "--config.distill.epochs=0.1",
    "--config.distill.min_steps=8",
    "--config.distill.batch_size=32",
]


# Some seconds of steps, in the same programs for whoever stops it.
PRETRAIN = [
    "--config=configs/digits.py:float32",
    *ONE_BLOCK,
    "--config.seeds=(0,)",
    "--config.inits=('moco',)",
    "--config.pretrain.moco.epochs=20",
    "--stage=pretrain",
]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def launch(start):
    """launch(processes, devices, *words) -> the running commands."""

    def started(processes, devices, *words):
        flags = f"--xla_force_host_platform_device_count={devices} {QUICKLY}"
        several = [f"--coordinator=localhost:{free_port()}", f"--processes={processes}"]
        return [
            start(*words, *[*several, f"--process={index}"] * (processes > 1), XLA_FLAGS=flags)
            for index in range(processes)
        ]

    return started


def finish(processes, timeout=900):
    """(status, standard out, standard error) of each; none is left behind."""
    try:
        told = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(processes, told, strict=True)]


@pytest.fixture(scope="module")
def meanwhile():
    """meanwhile(processes) -> a future of what `finish` gives, which waits for a minute at most,
    beside the other tests."""
    with ThreadPoolExecutor() as waiting:
        yield lambda processes: waiting.submit(finish, processes, timeout=60)


@pytest.fixture(scope="module")
def with_an_error(start, meanwhile, tmp_path_factory):
    """Two processes, the first or the second of which has an error, to their ends."""
    script = tmp_path_factory.mktemp("error") / "failing.py"
    script.write_text(
        "import sys, jax; from qmx import sharding; jax.config.update('jax_platforms', 'cpu'); "
        "port, index, failing = map(int, sys.argv[1:]); "
        "sharding.connect(f'localhost:{port}', 2, index); sharding.any_process(False); "
        "assert index != failing, 'alone with this'; sharding.any_process(False)"
    )
    ports = [free_port() for _ in range(2)]
    return [
        meanwhile([start(script, port, index, failing) for index in range(2)])
        for failing, port in enumerate(ports)
    ]


@pytest.fixture(scope="module")
def left_alone(launch, meanwhile, tmp_path_factory):
    """The first of two processes, the second of which was killed, to its end."""
    workdir = tmp_path_factory.mktemp("alone") / "w"
    running = launch(2, 2, *PRETRAIN, f"--workdir={workdir}")
    wait_for(running, workdir / "pretrain/moco-seed0/metrics.jsonl", 5)
    running[1].kill()
    return meanwhile(running)


@pytest.fixture(scope="module")
def workdirs(launch, with_an_error, tmp_path_factory):
    """The same run by one process of four devices, and by two of two."""
    root = tmp_path_factory.mktemp("processes")
    for name, processes in (("one", 1), ("two", 2)):
        done = finish(launch(processes, 4 // processes, *SHORT, f"--workdir={root / name}"))
        assert [status for status, _, _ in done] == [0] * processes, done
        # The first one tells, and it alone. Collectives on CPUs print lines of their own.
        assert ["| queries" in out for _, out, _ in done] == [True, False][:processes]
        assert ["writing to" in err for _, _, err in done] == [True, False][:processes]
    return root


@pytest.mark.slow
def test_same_losses(workdirs):
    """Every step of every training."""
    columns = (
        "none-random-logits-asked",
        "moco-random-logits-asked",
        "moco-typiclust-logits-pool",
        "moco-margin-logits-asked",
        "none-random-logits-fixmatch",
    )
    stages = [
        "target",
        "pretrain/moco-seed0",
        *(f"distill/{column}-{queries}-seed0" for column in columns for queries in (15, 300)),
    ]
    assert len(list((workdirs / "two").glob("**/metrics.jsonl"))) == len(stages)
    for stage in stages:
        one, two = (
            [
                json.loads(line)["loss"]
                for line in (workdirs / name / stage / "metrics.jsonl").open()
            ]
            for name in ("one", "two")
        )
        assert len(one) == len(two) >= 8
        np.testing.assert_allclose(two, one, rtol=1e-10, err_msg=stage)


@pytest.mark.slow
def test_same_ledger(workdirs):
    """The same images were asked, once each, and all answers are in the one ledger."""
    answers = []
    for root in (workdirs / "one", workdirs / "two"):
        with sqlite3.connect(root / "ledger.sqlite") as db:
            # A key holds the target's digest, and its weights differ in the last bit.
            answers.append(
                dict(
                    db.execute(
                        "SELECT image, scores FROM answers JOIN scores USING (row)"
                    ).fetchall()
                )
            )
        results = json.loads((root / "results.json").read_text())
        # Choosing by answers, two thirds of the pool are asked about before the rest, and a few for
        # the smaller budget.
        select = results["account"]["purposes"]["select"]
        assert 200 <= select <= 200 + 10
        assert results["account"] == {
            "calls": 600,
            "images": 600,
            "views": 600,
            "lost": 0,
            "unanswered": 0,
            "failed": 0,
            "retried": 0,
            "purposes": {"train": 300 - select, "select": select, "report": 300},
            "refused": 0,
        }
    assert answers[0].keys() == answers[1].keys() and len(answers[0]) == 600
    for image, scores in answers[0].items():
        np.testing.assert_allclose(
            np.frombuffer(answers[1][image], "<f4"), np.frombuffer(scores, "<f4"), rtol=1e-6
        )


@pytest.mark.slow
def test_same_table(workdirs):
    """Every figure."""
    one, two = (
        json.loads((workdirs / name / "results.json").read_text()) for name in ("one", "two")
    )
    assert len(one["rows"]) == len(two["rows"]) == 10
    for a, b in zip(one["rows"] + one["monitors"], two["rows"] + two["monitors"], strict=True):
        for key in a.keys() - {"seconds", "sha256"}:
            assert a[key] == (
                pytest.approx(b[key], rel=1e-9) if isinstance(a[key], float) else b[key]
            ), key


@pytest.mark.slow
def test_budget_between_rounds(workdirs, launch, tmp_path):
    """The budget ends in a round of choosing by answers: status 3 in both, and nothing of that
    round was sent."""
    shutil.copytree(workdirs / "two", tmp_path / "w")
    for path in (tmp_path / "w").glob("ledger.sqlite*"):
        path.unlink()
    shutil.rmtree(tmp_path / "w/select")
    changed = (
        "--config.seeds",
        "--config.fractions",
        "--config.queries",
        "--config.inits",
        "--config.also",
    )
    words = [word for word in SHORT if not word.startswith(changed)]
    words += [
        "--config.seeds=(0,1)",
        "--config.fractions=()",
        "--config.queries=(71,)",
        "--config.inits=('moco',)",
        "--config.also=()",
        "--config.selects=('margin',)",
        "--config.budget=71",
        "--update",
        f"--workdir={tmp_path}/w",
    ]
    done = finish(launch(2, 2, *words))  # two rounds of 24 for each seed
    assert [status for status, _, _ in done] == [3, 3], done
    with sqlite3.connect(tmp_path / "w/ledger.sqlite") as db:
        (sent,) = db.execute("SELECT SUM(views) FROM requests").fetchone()
    assert 48 <= sent <= 71 and all(f"{sent} of 71 queries are spent" in err for _, _, err in done)


@pytest.mark.slow
def test_target_elsewhere(launch, tmp_path):
    """A Python function is called by the first process alone, once for each image, and both come to
    the table."""
    (tmp_path / "own.py").write_text(
        "import os\nfrom pathlib import Path\n\ndef scores(images):\n"
        "    with open(Path(__file__).with_name('asked'), 'a') as log:\n"
        "        log.write(f'{os.getpid()} {len(images)}\\n')\n"
        "    return images.reshape(len(images), -1)[:, :10].astype('f4')\n"
    )
    running = launch(
        2,
        2,
        "--config=configs/digits.py",
        *ONE_BLOCK,
        "--config.seeds=(0,)",
        "--config.fractions=(0.05,)",
        "--config.queries=()",
        "--config.inits=('none',)",
        "--config.also=()",
        "--config.distill.epochs=0.5",
        "--config.distill.min_steps=4",
        "--config.target.kind=callable",
        f"--config.target.path={tmp_path}/own.py:scores",
        f"--workdir={tmp_path}/w",
    )
    done = finish(running)
    assert [status for status, _, _ in done] == [0, 0], done
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert {process for process, _ in asked} == {str(running[0].pid)}
    assert [int(images) for _, images in asked] == [1, 2, *[64] * 5, 37, 64, 7]


@pytest.mark.slow
def test_stop_and_go_on(launch, left_alone, tmp_path):
    """SIGTERM to one of two stops both after the same step with status 75, and one process alone
    goes on from there."""
    longer = [*PRETRAIN, f"--workdir={tmp_path}/w"]
    metrics = tmp_path / "w/pretrain/moco-seed0/metrics.jsonl"
    running = launch(2, 2, *longer)
    wait_for(running, metrics, 20)
    running[1].send_signal(signal.SIGTERM)
    done = finish(running)
    assert [status for status, _, _ in done] == [75, 75], done
    steps = {err.partition("stopped after step ")[2].split()[0] for _, _, err in done}
    assert len(steps) == 1
    status, _, err = finish(launch(1, 4, *longer))[0]
    assert status == 0 and f"goes on from {metrics.parent}/checkpoints/{steps.pop()}\n" in err, err


@pytest.mark.slow
def test_a_dead_process_ends_the_other(left_alone):
    """Within a minute, with a message."""
    status, _, err = left_alone.result()[0]
    assert status not in (0, None) and err


@pytest.mark.slow
def test_an_error_in_one_ends_the_other(with_an_error):
    """Nor does an error that only one of them has, the first or the second, leave the other waiting
    for it."""
    for failing, both in enumerate(with_an_error):
        done = both.result()
        assert all(status != 0 for status, _, _ in done), done
        assert "alone with this" in done[failing][2], done


def wait_for(processes, path, lines):
    deadline = time.monotonic() + 200
    while not (path.exists() and len(path.read_text().splitlines()) >= lines):
        assert time.monotonic() < deadline and all(
            process.poll() is None for process in processes
        ), [process.communicate() for process in processes if process.poll() is not None]
        time.sleep(0.01)


@pytest.mark.parametrize(
    "words",
    [
        ("--processes=2",),
        ("--process=0",),
        ("--coordinator=localhost:1",),
        ("--coordinator=localhost:1", "--processes=2", "--process=2"),
    ],
)
def test_half_a_cluster(command, tmp_path, words):
    """Flags that do not go together: status 2 and one line, at once."""
    status, _, err = command(*SHORT, *words, f"--workdir={tmp_path}/w")
    assert status == 2 and len(err.splitlines()) == 1 and "--coordinator" in err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(("on_a_machine", "seen"), [(1, ["all", "all"]), (2, ["0", "1"])])
def test_devices_of_a_process(start, tmp_path, on_a_machine, seen):
    """Alone on its machine a process sees every GPU there; beside others the one of its number."""
    (tmp_path / "seen.py").write_text(
        "import jax; from qmx import sharding; jax.config.update('jax_platforms', 'cpu'); "
        "sharding.connect(); "
        "print(jax.process_count(), jax.config.values['jax_cuda_visible_devices'])"
    )
    said = {
        "JAX_COORDINATOR_PORT": str(free_port()),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(on_a_machine),
    }  # as mpirun says it
    started = [
        start(
            tmp_path / "seen.py",
            **said,
            OMPI_COMM_WORLD_RANK=str(rank),
            OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
    assert [out.split() for _, out, _ in finish(started)] == [["2", each] for each in seen]
