"""What was paid is not paid again, and nothing is paid or trained in vain."""

import json
import sys
import time

import jsonschema
import numpy as np
import pytest
from conftest import ROOT
from test_workdir import FUNCTION, asked, last, small

from qmx.targets import function
from qmx.train import Stopped

__all__ = ["small"]  # a fixture

MOCO = (
    "--config.inits=('moco',)",
    "--config.pretrain.moco.epochs=1",
    "--config.pretrain.moco.batch_size=32",
    "--config.pretrain.moco.group_size=16",
)


def ask(small, *more):
    """The stages that ask, one after the other; the status of the last and what it said."""
    for stage in ("target", "select"):
        status, _, err = small(f"--stage={stage}", *more)
        assert status == 0, err
    status, _, err = small("--stage=query", *more)
    return status, err


def known_as(tmp_path):
    return json.loads((tmp_path / "w/target.json").read_text())["known_as"]


def test_a_new_target_of_the_same_digest(small, tmp_path):
    """Weights outside the function's file change nothing that is seen: the user says that it is
    another model, and all is asked, once, however often the call is begun anew; then the next one
    means another model."""
    new = "--update=new-target"
    assert ask(small)[0] == 0
    paid, name = asked(tmp_path), known_as(tmp_path)
    assert paid
    assert ask(small)[0] == 0 and asked(tmp_path) == paid
    assert small("--stage=target", new)[0] == 0 and known_as(tmp_path) == f"{name}#2"
    assert ask(small, new)[0] == 0 and asked(tmp_path) == 2 * paid
    small("--stage=distill", new)
    assert known_as(tmp_path) == f"{name}#2"
    assert ask(small)[0] == 0 and asked(tmp_path) == 2 * paid, "it is this one from now on"
    assert ask(small, new)[0] == 0 and asked(tmp_path) == 3 * paid
    (tmp_path / "w/target.json").write_text("damaged")
    assert ask(small)[0] == 0 and asked(tmp_path) == 3 * paid
    assert known_as(tmp_path) == f"{name}#3", "whose answers are the last"


@pytest.mark.slow
def test_a_new_target_is_paid_once(small, tmp_path, monkeypatch):
    """A whole run that is stopped after it asked, and begun again by the same words, as a scheduler
    does, asks nothing more; its report keeps to the schema."""
    assert small()[0] == 0
    paid = asked(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("qmx.pipeline.distill", lambda *_: (_ for _ in ()).throw(Stopped("stopped")))
        for _ in range(2):
            assert small("--update=new-target")[0] == 75 and asked(tmp_path) == 2 * paid
    assert small("--update=new-target")[0] == 0 and asked(tmp_path) == 2 * paid
    jsonschema.validate(
        json.loads((tmp_path / "w/results.json").read_text()),
        json.loads((ROOT / "qmx/report/results.schema.json").read_text()),
    )
    assert small("--update=new-target")[0] == 0 and asked(tmp_path) == 3 * paid


def test_a_verdict_is_kept(small, tmp_path, monkeypatch):
    """Answers in another order end the run; the same command again does so too, and asks nothing:
    the answers that it has may be other images'."""
    monkeypatch.setattr("qmx.stages.trial.MANY", 1)
    (tmp_path / "own.py").write_text(
        FUNCTION.replace("return flat", "flat = flat[::-1]; return flat")
    )
    said = []
    for _ in range(2):
        status, out, err = small()
        assert (status, out) == (2, "") and "in the order of the images" in last(err)
        said.append((last(err), asked(tmp_path)))
    assert said[0] == said[1] and said[0][1] == 5
    assert "--update=new-target" in last(err)
    assert small("--update=new-target")[0] == 2 and asked(tmp_path) == 10
    status, _, err = small("--update=new-target")
    assert status == 2 and asked(tmp_path) == 15, "a verdict ends no name for ever"


def test_a_trial_that_was_not_passed_is_done_again(small, tmp_path, monkeypatch):
    """One of its images is refused: no pretraining is begun by the second call either."""
    monkeypatch.setattr("qmx.stages.trial.MANY", 1)
    body = "scores = flat @ np.random.default_rng(0).normal(size=(flat.shape[1], 10)).astype('f4')"
    text = FUNCTION.rpartition("    return")[0] + f"    {body}\n    scores[flat.sum(1) == "
    (tmp_path / "own.py").write_text(text + "flat.sum(1).max()] = np.nan\n    return scores\n")
    for _ in range(2):
        status, _, err = small(*MOCO)
        assert status == 2 and "max_refused" in last(err)
        assert not (tmp_path / "w/pretrain").exists()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (("--config.pretrain.moco.queue_size=100", *MOCO), "queue_size 100"),
        (("--config.audit.zero=missing.py:f", "--config.queries=(50,)"), "no file missing.py"),
    ],
)
def test_another_config_is_checked_as_the_first_was(small, tmp_path, wrong, said):
    assert ask(small)[0] == 0
    paid = asked(tmp_path)
    status, out, err = small("--update", *wrong)
    assert (status, out) == (2, "") and said in last(err)
    assert asked(tmp_path) == paid and not (tmp_path / "w/pretrain").exists()


def test_what_was_spent_counts_before_anything_is_sent(small, tmp_path, monkeypatch):
    """Other images than those that were paid are more than the budget has left: none of them is
    sent, and no encoder is trained first. A larger budget needs no --update."""
    monkeypatch.setattr("qmx.stages.answers.CHUNK", 8)
    assert ask(small, "--config.budget=45")[0] == 0
    paid, words = asked(tmp_path), ("--config.selects=('class_balanced',)", "--update")
    status, err = ask(small, "--config.budget=45", *words)
    assert status == 3 and "nothing was sent" in last(err) and asked(tmp_path) == paid
    assert small("--config.budget=45", *words, *MOCO)[0] == 3
    assert asked(tmp_path) == paid and not (tmp_path / "w/pretrain").exists()
    assert ask(small, "--config.budget=45", *words)[0] == 3
    status, err = ask(small, "--config.budget=80", words[0])
    assert status == 0 and asked(tmp_path) == paid + 10, err


def test_a_target_that_is_busy(small, tmp_path):
    """Status 75, as a stop: a scheduler may run it again."""
    (tmp_path / "own.py").write_text(
        "import qmx\ndef f(images):\n    raise qmx.Unavailable('busy')"
    )
    status, _, err = small("--config.target.retries=0")
    assert status == 75 and "the same command goes on" in last(err)


@pytest.mark.parametrize("key", ["url=http://localhost:1", "model=m", "token_env=TOKEN"])
def test_keys_of_a_server_alone(small, tmp_path, key):
    status, _, err = small(f"--config.target.{key}")
    assert status == 2 and "is read by target.kind=served alone" in last(err)
    assert not (tmp_path / "w").exists()


def test_a_rate_holds_for_a_function(tmp_path):
    (tmp_path / "own.py").write_text(FUNCTION)
    query = function.connect(f"{tmp_path}/own.py:f", shape=(8, 8, 1), classes=10, rate=20).query
    began = time.monotonic()
    for _ in range(4):
        query(np.zeros((1, 8, 8, 1), np.uint8))
    assert time.monotonic() - began >= 3 / 20


def test_a_function_is_loaded_once(small, tmp_path):
    """A model of gigabytes would not fit into memory twice; another file is another function."""
    counted = "open(__file__ + '.loads', 'a').write('x')\n"
    (tmp_path / "own.py").write_text(FUNCTION + counted)
    assert small("--stage=target")[0] == 0
    assert (tmp_path / "own.py.loads").read_text() == "x"
    (tmp_path / "own.py").write_text(FUNCTION + counted + "# another\n")
    function.load(f"{tmp_path}/own.py:f")
    assert (tmp_path / "own.py.loads").read_text() == "xx"


def test_modules_beside_a_function(tmp_path, monkeypatch):
    """A file finds what lies beside it, a module is found in the current directory, and neither
    takes the place of a library."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    (tmp_path / "beside_own.py").write_text("import numpy as np\nf = np.zeros_like\n")
    (tmp_path / "numpy.py").write_text("raise ImportError('not the library')")
    (tmp_path / "own.py").write_text("import beside_own\nf = beside_own.f\n")
    assert function.load(f"{tmp_path}/own.py:f")[0] == "f"
    sys.modules.pop("beside_own")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    assert function.load("beside_own:f")[1] is np.zeros_like
    sys.modules.pop("beside_own")


def test_budgets_of_nothing_chosen_up_front(small, tmp_path):
    """Nothing is known of what features will choose: more than the budget is told later."""
    assert ask(small, "--config.budget=80")[0] == 0
    words = ("--config.selects=('class_balanced',)", "--update", "--config.budget=80")
    assert ask(small, *words)[0] == 0
    words = ("--config.selects=('maxherding',)", "--update", "--config.budget=45", *MOCO)
    status, _, err = small("--stage=select", *words)
    assert "Traceback" not in err and status == 2, err


def test_a_damaged_config(small, tmp_path):
    """It is written anew, as the stages know what they were made with."""
    assert ask(small)[0] == 0
    paid = asked(tmp_path)
    (tmp_path / "w/config.json").write_text("{")
    status, err = ask(small)
    assert status == 0 and asked(tmp_path) == paid, err
