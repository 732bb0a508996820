"""The notebooks as their readers run them, with fewer steps."""

import json
import re
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT
from one_block import NAME

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb"))}


def cells(name, kind):
    """The texts of a notebook's cells of one kind."""
    read = json.loads(NOTEBOOKS[name].read_text())["cells"]
    return ["".join(cell["source"]) for cell in read if cell["cell_type"] == kind]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(name, steps) -> (the names that the cells make, one after the other; their pictures)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plt.switch_backend("agg")

    def cell_by_cell(name, steps):
        names = {}
        first, *rest = (code.replace("resnet8_narrow", NAME) for code in cells(name, "code"))
        first, found = re.subn(r"^STEPS = \d+", f"STEPS = {steps}", first, flags=re.MULTILINE)
        assert found == 1
        for number, code in enumerate((first, *rest)):
            exec(compile(code, f"{name}, code cell {number}", "exec"), names)  # noqa: S102
        return names, len(plt.get_fignums())

    yield cell_by_cell
    plt.close("all")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_copy_digits(run):
    """The copies name the target's digit far more often than by chance, from 20 paid images."""
    names, pictures = run("copy_digits", 320)
    assert pictures == 4
    assert names["target_top1"] > 60
    assert names["account"].images == names["account"].calls == 20
    np.testing.assert_array_equal(names["again"], names["answers"]["random"])
    students = names["students"]
    assert list(students) == ["none", "moco + typiclust", "moco + typiclust + pool"]
    assert all(found["fidelity_top1"] > 25 for found in students.values()), students


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_audit_function(run, capsys):
    """No image is paid for twice, nothing is sent beyond the budget, and less is seen by less
    access."""
    names, pictures = run("audit_function", 150)
    assert pictures == 2
    assert names["bills"] == [60, 0, 40] and names["over"] == 0
    assert "100 of 100 queries are spent and 1 more are asked for" in capsys.readouterr().out
    np.testing.assert_array_equal(names["answers"][0], names["answers"][2][:60])
    account = names["account"]
    assert account.purposes == {"train": 100, "select": 0, "report": 360}
    assert names["sent"] == account.calls == 460
    copies = names["copies"]
    assert all(found["fidelity_top1"] > 60 for found in copies.values()), copies
    kls = [found["kl_target_student"] for found in copies.values()]  # from the richest level on
    assert kls[0] == pytest.approx(kls[1], abs=1e-3) and kls[1:] == sorted(kls[1:]), kls


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_encoders(run):
    """Features and scores come back from the files as they were; they know digits."""
    names, pictures = run("encoders", 200)
    assert pictures == 2
    np.testing.assert_array_equal(names["features"], names["before"])
    np.testing.assert_array_equal(names["scores"], names["found"])
    assert names["read"].facts["arch"] == NAME and names["knn_top1"] > 60
    assert all(len(set(ids)) == 20 for ids in names["choices"].values())
    assert all(right > 25 for right in names["accuracy"].values()), names["accuracy"]


def test_files():
    """Notebooks are committed without results, and their links lead to pages."""
    assert list(NOTEBOOKS) == ["audit_function", "copy_digits", "encoders"]
    for name, path in NOTEBOOKS.items():
        book = json.loads(path.read_text())
        for cell in book["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, (name, cell)
        for link in re.findall(r"\]\(([^)#]+)", "\n".join(cells(name, "markdown"))):
            assert link.startswith("https://") or (path.parent / link).exists(), (name, link)
