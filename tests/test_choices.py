"""benchmarks/choices.py, on blobs."""

import json
import runpy
import sys

import numpy as np
from conftest import ROOT


def test_choices(tmp_path, monkeypatch, capsys):
    """On separate blobs one image of each is enough where images are chosen, and not at random."""
    files = []
    for name, size, seed in (("pool", 60, 0), ("evaluation", 20, 1)):
        rng, labels = np.random.default_rng(seed), np.repeat(np.arange(4), size)
        features = np.eye(8, dtype="f4")[labels] + 0.02 * rng.normal(size=(len(labels), 8))
        files.append(str(tmp_path / f"{name}.npz"))
        np.savez(files[-1], features=features.astype("f4"), labels=labels)
    words = ["--images=200", "--seeds=2", "--budgets", "4", "12"]
    monkeypatch.setattr(sys, "argv", ["choices.py", *files, *words])
    runpy.run_path(str(ROOT / "benchmarks/choices.py"), run_name="__main__")
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])["accuracy"]
    assert [*found] == ["random", "probcover", "typiclust", "maxherding"]
    for way, told in found.items():
        assert [len(told[budget]) for budget in ("4", "12")] == [2, 2]
        if way != "random":
            assert told["4"] == [100.0, 100.0]
    assert np.mean(found["random"]["4"]) < 100
    assert out[0].startswith("| images | random |") and len(out) == 5
