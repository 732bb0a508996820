"""Artefacts are handed on: what is looked up, how often, and on what each stage depends."""

import ast
import json
from collections import Counter

from conftest import ROOT, TINY
from ml_collections import FrozenConfigDict

from qmx import pipeline, workdir
from qmx.data import load
from qmx.main import load_file


def tiny():
    """The config of `finished`."""
    first, *words = (word.removeprefix("--config").lstrip("=.") for word in TINY)
    config = load_file(str(ROOT / first))
    pairs = (word.split("=") for word in words)
    config.update_from_flattened_dict({key: ast.literal_eval(value) for key, value in pairs})
    return FrozenConfigDict(config)


def test_nothing_is_looked_up_twice(finished, monkeypatch):
    """A walk over a finished workdir looks at each artefact once, and at one selection for each of
    the twelve cells, of which four columns share the images that are drawn at random."""
    looks, stage = Counter(), workdir.stage

    def counting(directory, *arguments):
        looks[str(directory.relative_to(finished))] += 1
        return stage(directory, *arguments)

    monkeypatch.setattr(workdir, "stage", counting)
    config = tiny()
    pipeline.run(config, finished, load(config.data), "all", lambda: False)
    selections = {name: looks.pop(name) for name in [*looks] if name.startswith("select/")}
    assert looks.pop("monitor/random-seed0") == 3, "it stands beside each of three encoders"
    assert set(looks.values()) == {1}
    kinds = Counter(name.partition("/")[0] for name in looks)
    assert kinds == {
        **{"target": 1, "pretrain": 3, "monitor": 3, "query": 1},
        **{"distill": 12, "evaluate": 12},
    }
    assert selections.pop("select/features-moco-seed0") == 1
    assert selections == {
        "select/random-71-seed0": 4,
        "select/random-1437-seed0": 4,
        "select/moco-typiclust-71-seed0": 2,
        "select/moco-typiclust-1437-seed0": 2,
    }


def test_inputs(finished):
    """A stage depends on the images that it reads: no training on those for the evaluation."""
    for path in finished.rglob("inputs.json"):
        inputs, kind = json.loads(path.read_text()), path.relative_to(finished).parts[0]
        assert ("evaluation" in inputs) == (kind in ("query", "evaluate")), path
        assert ("pool" in inputs) == (kind != "evaluate"), path
