"""The documentation as its readers use it: its commands, its snippets, its tables, its build."""

import doctest
import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from documents import alone, behind, blocks, check, lines
from test_report import results

import qmx
from qmx import keys
from qmx.data import cache
from qmx.data.arrays import arrays
from qmx.files import write_json
from qmx.report import compare
from qmx.report.standards import STANDARDS
from qmx.targets import function, onnx_file
from qmx.targets.shown import Shown

DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md"))}
# Programs that are not ours; of what they are given, the files and the extras exist.
OTHERS = {
    *("export", "kubectl", "mlserver", "pip", "python", "python3", "sbatch", "sphinx-build"),
    *("srun", "tensorboard"),
}


def test_commands(command, tmp_path, monkeypatch, capsys):
    """Every command line: flags, keys, values and files exist. Our own tools understand their
    words, and then miss the file that the reader has."""
    monkeypatch.chdir(tmp_path)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    commands = [line for page in PAGES.values() for line in lines(page)]
    assert len(commands) > 30
    for line in commands:
        words = shlex.split(line)
        for path in (word for word in words if re.match("(configs|docs)/", word)):
            assert path == "docs/_build" or (ROOT / path).exists(), line
        for extra in re.findall(r"'\.\[(\w+)\]'", line):
            assert extra in extras, line
        if "qmx.main" in words:
            check(command, behind(line), tmp_path)
        elif words[0] == "sbatch":  # passes on what follows the script
            check(command, behind(line, "configs/slurm.sh"), tmp_path)
        elif words[:2] == ["qmx", "compare"]:
            assert compare.main(words[2:]) == 2
            assert f"{words[2]} is missing" in capsys.readouterr().err, line
        elif words[0] == "qmx":
            check(command, words[1:], tmp_path)
        elif words[:2] == ["python", "-m"]:
            check_tool(words[2], words[3:], capsys)
        else:
            assert Path(words[0]).name in OTHERS, line


def check_tool(name, words, capsys):
    """A program of the package understands its words, and says in one line what it misses."""
    words = words[: words.index(">")] if ">" in words else words
    if name == "qmx.data.cache":  # it changes how this process takes signals
        assert cache.parse(words).path == words[0]
        return
    package = importlib.util.find_spec(name).submodule_search_locations
    module = importlib.import_module(f"{name}.__main__" if package else name)
    assert module.main(words) == 2, (name, words)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and any(word in told for word in words), told


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks(text, "pycon")])
def test_examples(page, tmp_path, monkeypatch):
    """The examples of a page, one after the other, print what stands below them."""
    monkeypatch.chdir(tmp_path)
    text = "\n".join(blocks(PAGES[page], "pycon"))
    example = doctest.DocTestParser().get_doctest(text, {}, page, f"docs/{page}.md", 0)
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.summarize(verbose=False) == (0, len(example.examples))


def test_snippets(tmp_path, monkeypatch, capsys):
    """The snippets without answers: own images, own model, a report as a program reads it."""
    monkeypatch.chdir(tmp_path)
    found = {name: blocks(text, "python") for name, text in PAGES.items() if blocks(text, "python")}
    counts = {"attacks": 1, "audit": 5, "report": 1, "functional": 1}  # the last: test_readme.py
    assert {name: len(some) for name, some in found.items()} == counts
    images, file, *servers, model = found["audit"]
    for code in servers:  # test_real_servers.py runs them, where their packages are
        compile(code, "docs/audit.md", "exec")
    config = alone(found["attacks"][0], "docs/attacks.md")["get_config"]()
    assert config.inits == ("moco", "mine") and config.pretrain.mine.path == "own.py:features"
    alone(images, "docs/audit.md")
    pool = arrays("pool.npz", "others.npz").pool
    assert pool.size == 500 and pool.labelled

    alone(file, "docs/audit.md")
    others = arrays("pool.npz", "eval.npz").evaluation
    shown = Shown(scale=1.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    target = onnx_file.connect("digits.onnx", shape=(8, 8, 3), classes=10, shown=shown)
    right = target.query(others.shown(np.arange(others.size))).argmax(1) == others.labels
    assert others.size == 397 and right.mean() > 0.7

    (tmp_path / "own.py").write_text(model)
    target = function.connect("own.py:scores", shape=(8, 8, 1), classes=10)
    assert target.query(np.zeros((3, 8, 8, 1), np.uint8)).shape == (3, 10)

    (tmp_path / "runs/digits").mkdir(parents=True)
    made = results(weak={("none", 10)})
    write_json(tmp_path / "runs/digits/results.json", made)
    alone(found["report"][0], "docs/report.md")
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.endswith(f"queries by moco: {made['audit']['answer']['text']}")
    assert len(rest) == len(made["rows"]) - 2  # both seeds of the weak ones are left out


def test_start_is_the_readmes():
    """The first command and the answer are those of the README; the picture is there."""
    readme = (ROOT / "README.md").read_text()
    (first,) = [line for line in lines(PAGES["start"]) if "venv" in line]
    assert first in lines(readme)
    (answer,) = [line for line in readme.splitlines() if line.startswith("> ")]
    for page in ("index", "start", "report"):
        assert answer in PAGES[page].splitlines(), page


def test_made_of_the_code():
    """The generated tables have every key with its default and remark, and every standard; the API
    page every public name."""
    conf = runpy.run_path(str(DOCS / "conf.py"))
    page = conf["keys_page"]().replace("\\", "")
    for key in keys.keys():
        assert f"| `{keys.line(key._replace(remark=''))}` | {key.remark} |" in page, key
    made = conf["standards_table"]()
    assert all(f"`{one['id']}`" in made for one in STANDARDS)
    for remark in conf["MADE"]:
        assert sum(remark in text for text in PAGES.values()) == 1
    assert set(qmx.__all__) <= set(re.findall(r":: qmx\.(\w+)", PAGES["api"]))


def test_links():
    """Links lead to pages and files."""
    for name, text in PAGES.items():
        for path in re.findall(r"\]\(([^)#]+)", text):
            assert path.startswith("https://") or (DOCS / path).exists(), (name, path)


@pytest.mark.slow
def test_build(tmp_path):
    """The site is built, without a warning."""
    for package in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-b", "html", DOCS, tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "pretrain.moco.epochs=200.0" in (tmp_path / "site/keys.html").read_text()
    assert 'id="qmx.moco.make"' in (tmp_path / "site/api.html").read_text()
    for path in (DOCS / "notebooks").glob("*.ipynb"):
        page = (tmp_path / f"site/notebooks/{path.stem}.html").read_text()
        assert "STEPS" in page and "execution_count" not in page, path
        assert list((tmp_path / "site/_downloads").glob(f"*/{path.name}")), path
