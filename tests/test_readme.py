"""The README's text, run as it stands."""

import re
import shlex

import numpy as np
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_pieces(tmp_path, monkeypatch, capsys):
    """P22: the functional API on one screen: a MoCo step in a loop of one's own, and the ledger."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    assert int(names["state"].step) == 32 and np.isfinite(names["metrics"]["loss"])
    assert names["encoder"].params["w"].shape == (192, 32)
    np.testing.assert_array_equal(names["scores"], names["again"])
    np.testing.assert_array_equal(names["labels"].argmax(1), names["scores"].argmax(1))
    printed = capsys.readouterr().out
    assert "60 of 100 queries are spent and 41 more are asked for" in printed
    assert "calls=60, images=60, views=60, unanswered=0" in printed


def test_commands(command, tmp_path):
    """P22: the flags in the README's commands exist, and the files they name do."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if "qmx.main" in line]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line)[shlex.split(line).index("qmx.main") + 1 :]
        words = [word for word in words if not word.startswith("--workdir")]
        # Stops at the first check, after the flags were read: nothing is called nonsense.
        status, _, err = command(*words, f"--workdir={tmp_path}/w", "--stage=nonsense")
        assert status == 2 and err.startswith("qmx: --stage=nonsense is unknown"), err


def test_files():
    """Links lead to files."""
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
