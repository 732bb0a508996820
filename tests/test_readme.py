"""The README's text, run as it stands."""

import os
import re
import shlex
import subprocess

import numpy as np
import pytest
import yaml
from conftest import ROOT
from documents import alone, behind, blocks, check, lines

from qmx import __version__
from qmx.shipped import own_configs

README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_pieces(tmp_path, monkeypatch, capsys):
    """The functional API on one screen: a MoCo step in a loop of one's own, and the ledger. Each
    runs alone and prints something."""
    monkeypatch.chdir(tmp_path)
    (step,) = blocks((ROOT / "docs/functional.md").read_text(), "python")
    (ledger,) = blocks(README, "python")
    names = alone(step, "docs/functional.md")
    assert int(names["state"].step) == 32 and np.isfinite(names["metrics"]["loss"])
    assert names["encoder"].params["w"].shape == (192, 32)
    printed = capsys.readouterr().out
    assert printed == f"after 32 steps the loss is {float(names['metrics']['loss']):.2f}\n"

    names = alone(ledger, "README.md")
    np.testing.assert_array_equal(names["scores"], names["again"])
    np.testing.assert_array_equal(names["labels"].argmax(1), names["scores"].argmax(1))
    printed = capsys.readouterr().out
    assert "60 of 100 queries are spent and 41 more are asked for" in printed
    assert "calls=60, images=60, views=60, unanswered=0" in printed


def test_installed_command(command, tmp_path):
    """The short form of the command, and the configs it names, are known."""
    (line,) = [line for line in README.splitlines() if line.startswith("qmx ")]
    status, _, err = command(*shlex.split(line)[1:-1], f"--workdir={tmp_path}", "--stage=nonsense")
    assert status == 2 and err.startswith("qmx: --stage=nonsense is unknown"), err
    listed = re.search(r"comes with `qmx` \(([^)]*)\)", README).group(1)
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(own_configs())


def test_commands(command, tmp_path):
    """The flags and keys in the README's commands exist, and the configs that they name do."""
    commands = [line for line in lines(README) if "qmx.main" in line]
    assert len(commands) == 7  # the others are in docs/, see test_docs.py
    for line in commands:
        check(command, behind(line), tmp_path)


def test_kubernetes(command, tmp_path):
    """The example's command exists; its pods, their number and the name of the first one agree."""
    service, job = yaml.safe_load_all((ROOT / "configs/kubernetes.yaml").read_text())
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    line = pod["containers"][0]["args"][0]
    check(command, behind(line), tmp_path)
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert f"--processes={job['spec']['parallelism']} " in line
    assert (
        f"--coordinator={name}-0.{pod['subdomain']}:" in line
        and service["metadata"]["name"] == pod["subdomain"]
    )
    assert service["spec"]["selector"] == {"job-name": name}


def test_slurm(tmp_path):
    """The example script passes on its arguments, and asks to be queued again only if the command
    stopped and saved."""
    for status in (0, 75, 2):
        said = tmp_path / f"said{status}"
        for name, code in (("srun", status), ("scontrol", 0)):
            (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{said}\nexit {code}\n')
            (tmp_path / name).chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
        }
        done = subprocess.run(
            ["bash", ROOT / "configs/slurm.sh", "--config=a b.py"], env=environment
        )
        assert done.returncode == status
        first, *rest = said.read_text().splitlines()
        assert first.endswith("python -m qmx.main --config=a b.py")
        assert rest == (["scontrol requeue 7"] if status == 75 else [])


def test_files():
    """Links lead to files."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        for path in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert path.startswith("https://") or (ROOT / path).exists(), (name, path)


def test_front_door():
    """What is beside the README is whole: the version is the package's everywhere, CI runs the
    parts of the README's test line, and the page for contributors is one screen."""
    (line,) = [line for line in README.splitlines() if "pip install -q -e '.[test]'" in line]
    ci = (ROOT / ".github/workflows/ci.yml").read_text()
    for part in line.split(" && "):
        assert part in ci, part
    steps = yaml.safe_load(ci)["jobs"]["test"]["strategy"]["matrix"]
    assert steps["python"] == ["3.11", "3.13"] and len(steps["jax"]) == 2
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == (
        __version__
    )
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
