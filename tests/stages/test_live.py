"""The report while a run goes on: after each student, what is there and what is not."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import jsonschema
import pytest
from conftest import ROOT, table
from test_workdir import FUNCTION, SMALL

from qmx import pipeline
from qmx.data import load
from qmx.main import parse
from qmx.stages import live as live_module
from qmx.stages.live import live
from qmx.train import Stopped

SCHEMA = json.loads((ROOT / "qmx/report/results.schema.json").read_text())


def test_not_more_often_than_it_may(monkeypatch):
    """At once, then not before its time; where a report takes long, it may take a share."""
    monkeypatch.setattr(live_module, "EVERY", 60.0)
    calls = []
    page = live(lambda: calls.append("first"))
    for _ in range(3):
        page()
    assert calls == ["first"]

    monkeypatch.setattr(live_module, "EVERY", 0.0)
    slow = live(lambda: (calls.append("slow"), time.sleep(2)))  # which is 2 % of 100 seconds
    slow()
    slow()
    assert calls.count("slow") == 1
    monkeypatch.setattr(live_module, "SHARE", 1e9)
    quick = live(lambda: calls.append("quick"))
    quick()
    time.sleep(0.01)
    quick()
    assert calls.count("quick") == 2


def test_a_failure_stops_no_run(monkeypatch, capsys):
    """A full disk, or anything else: one line, and the next time is tried again."""
    monkeypatch.setattr(live_module, "EVERY", 0.0)
    monkeypatch.setattr(live_module, "SHARE", 1e9)
    calls = []

    def write():
        calls.append(0)
        raise OSError("report.html cannot be written: No space left on device")

    page = live(write)
    page()
    page()
    (line,) = capsys.readouterr().err.splitlines()
    assert len(calls) == 2 and "warning: the report of what is done so far" in line
    assert "No space left" in line


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(stopped) -> a run of four students of a function, in tmp_path/w, with a report after
    each."""
    monkeypatch.setattr(live_module, "EVERY", 0.0)
    monkeypatch.setattr(live_module, "SHARE", 1e9)
    (tmp_path / "own.py").write_text(FUNCTION)
    # Tuples given twice would be joined.
    words = [word for word in SMALL if "seeds" not in word and "queries" not in word]
    words += ["--config.queries=(20,40)", "--config.seeds=(0,1)"]
    words += [f"--config.target.path={tmp_path}/own.py:f", f"--workdir={tmp_path}/w"]
    monkeypatch.chdir(ROOT)
    config = parse(["qmx", *words]).config
    data = load(**config.data)

    def start(stopped=lambda: False, only="all", workdir=tmp_path / "w"):
        workdir.mkdir(exist_ok=True)
        return pipeline.run(config, workdir, data, only, stopped)

    return SimpleNamespace(start=start, workdir=tmp_path / "w")


def cells(page, title):
    """The texts of a table's cells but the first of each row."""
    body = page[page.index(title) :]
    return re.findall(r"<td>(.*?)</td>", body[: body.index("</table>")])


@pytest.mark.slow
def test_half_a_run(run, tmp_path):
    """After two of four students the page says so, as --stage=report would; the run that goes on
    ends with the report of one that was never stopped."""

    def evaluated():
        return len([*run.workdir.glob("evaluate/none-*/result.json")])

    with pytest.raises(Stopped):
        run.start(lambda: evaluated() == 2)
    found = json.loads((run.workdir / "results.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert (found["finished"], found["planned"], len(found["rows"])) == (False, 4, 2)
    page = (run.workdir / "report.html").read_text()
    told = found["audit"]["answer"]["text"]
    assert "2 of 4 students are not there yet" in page and 'http-equiv="refresh"' in page
    if not all(row["undertrained"] for row in found["rows"]):
        assert told.startswith("So far, by 2 of 4 students: ") and told in page
    assert cells(page, "Accuracy, top-1").count("not run yet") == 1  # the second budget
    assert "not run yet" in (run.workdir / "report.md").read_text()

    before = table(run.workdir)
    run.start(only="report")
    assert table(run.workdir) == before

    text = run.start()
    found = json.loads((run.workdir / "results.json").read_text())
    assert found["finished"] and len(found["rows"]) == found["planned"] == 4
    page = (run.workdir / "report.html").read_text()
    assert "So far" not in page + text and "not run yet" not in page + text
    assert 'http-equiv="refresh"' not in page
    run.start(workdir=tmp_path / "undisturbed")
    assert table(run.workdir) == table(tmp_path / "undisturbed")
    assert not list(run.workdir.rglob("*.part"))


@pytest.mark.slow
def test_students_that_are_there_count(run):
    """One that an earlier call evaluated is on the page before its turn comes."""
    run.start()
    done = sorted(run.workdir.glob("evaluate/none-*"))
    assert [path.name[-8:] for path in done] == ["20-seed0", "20-seed1", "40-seed0", "40-seed1"]
    for path in (done[0], done[2]):
        shutil.rmtree(path)
        shutil.rmtree(run.workdir / "distill" / path.name)
    with pytest.raises(Stopped):  # in the third
        run.start((done[0] / "result.json").exists)
    found = json.loads((run.workdir / "results.json").read_text())
    seeds = [(row["queries"]["train"], row["seed"]) for row in found["rows"]]
    assert seeds == [(20, 0), (20, 1), (40, 1)] and not found["finished"]
