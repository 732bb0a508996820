"""Artefacts are handed on: what is looked up, how often, and on what each stage depends."""

import json
import shutil
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from ml_collections import ConfigDict, FrozenConfigDict

from qmx import checks, models, pipeline, ranges, settings, trainers, workdir
from qmx.contract import Encoder, Method, begin_from, chain, network_key, view_shape
from qmx.data import load
from qmx.main import parse
from qmx.selection.by_features import maxherding
from qmx.selection.patches import beside

pytestmark = pytest.mark.slow  # each trains, or needs what a command trained


def tiny():
    """The config of `finished`."""
    return parse(["qmx", *TINY, "--workdir=not-used"]).config


def test_nothing_is_looked_up_twice(finished, monkeypatch, capsys):
    """A walk over a finished workdir looks at each artefact once, and at one selection for each of
    the twelve cells, of which four columns share the images that are drawn at random."""
    looks, stage = Counter(), workdir.stage

    def counting(directory, *arguments, **options):
        looks[str(directory.relative_to(finished))] += 1
        return stage(directory, *arguments, **options)

    monkeypatch.setattr(workdir, "stage", counting)
    config = tiny()
    pipeline.run(config, finished, load(**config.data), "all", lambda: False)
    assert "done again" not in capsys.readouterr().err
    selections = {name: looks.pop(name) for name in [*looks] if name.startswith("select/")}
    assert looks.pop("monitor/random-seed0") == 3, "it stands beside each of three encoders"
    assert set(looks.values()) == {1}
    kinds = Counter(name.partition("/")[0] for name in looks)
    assert kinds == {
        **{"target": 1, "pretrain": 3, "monitor": 3, "query": 1},
        **{"distill": 12, "evaluate": 12},
    }
    assert selections.pop("select/features-moco-seed0") == 1
    assert selections.pop("select/patches") == 1, (
        "beside the features, where answers are propagated"
    )
    assert selections == {
        "select/random-71-seed0": 4,
        "select/random-1437-seed0": 4,
        "select/moco-maxherding-71-seed0": 2,
        "select/moco-maxherding-1437-seed0": 2,
    }


def test_selection_by_patches(finished, command, tmp_path):
    """With `selection.patches` maxherding chooses by both features, and nothing else is redone."""
    shutil.copytree(finished, tmp_path / "w")
    selects = tmp_path / "w/select"
    before = {path: path.read_bytes() for path in selects.glob("*/ids.npz")}
    words = [*TINY, f"--workdir={tmp_path}/w", "--stage=select", "--config.selection.patches=0.7"]
    status, _, err = command(*words, "--update")
    assert status == 0, err
    after = {path: path.read_bytes() for path in selects.glob("*/ids.npz")}
    changed = selects / "moco-maxherding-71-seed0/ids.npz"
    assert {path for path in after if after[path] != before[path]} == {changed}
    names = "features-moco-seed0/features.npy", "patches/patches.npy"
    rows = beside(*(np.load(selects / name) for name in names), 0.7)
    want = maxherding(rows, 71, np.random.default_rng(0), 10)
    with np.load(changed) as file:
        np.testing.assert_array_equal(file["ids"], want)


def test_another_method(monkeypatch, tmp_path):
    """A new pretraining method is a function, a line of the table and its keys: it is trained,
    monitored and started from as the others are."""

    def regress(net, head, view):
        """Tell the mean brightness of an image."""
        network = chain(backbone=net, head=head)

        def init(rng, batch):
            return network.init(rng, view_shape(view, batch))

        def loss(params, state, batch, rng):
            x = view(rng, batch)
            y, state = network.apply(params, state, x, True, network_key(rng))
            return jnp.square(y[:, 0] - x.mean((1, 2, 3))).mean(), (state, {})

        def encoder(params, state):
            return Encoder(params["backbone"], state["backbone"])

        return Method(init, loss, encoder, start=begin_from, network=Encoder)

    def with_keys(config):
        with config.unlocked():
            config.pretrain.brightness = settings.training(epochs=1.0, batch_size=128)
            config.pretrain.brightness.path = ""
        return config

    monkeypatch.setattr(ranges, "base", lambda: with_keys(settings.base()))
    line = trainers.Pretraining(lambda keys, net, view: regress(net(), models.classifier(1), view))
    monkeypatch.setitem(trainers.PRETRAINING, "brightness", line)
    config = with_keys(ConfigDict(tiny()))
    changes = {
        **{"inits": ("none", "brightness"), "also": (), "fractions": (0.05,)},
        **{"target.epochs": 1.0, "distill.min_steps": 2, "distill.epochs": 0.1},
    }
    config.update_from_flattened_dict(changes)
    config = FrozenConfigDict(config)
    data = load(**config.data)
    checks.check_values(config)
    checks.validate(config, data)
    out = pipeline.run(config, tmp_path, data, "all", lambda: False)
    assert "brightness" in out.splitlines()[-3]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["init"] for row in rows] == ["none", "brightness"]


def test_inputs(finished):
    """A stage depends on the images that it reads: no training on those for the evaluation."""
    for path in finished.rglob("inputs.json"):
        inputs, kind = json.loads(path.read_text()), path.relative_to(finished).parts[0]
        assert ("evaluation" in inputs) == (kind in ("query", "evaluate")), path
        assert ("pool" in inputs) == (kind != "evaluate"), path
