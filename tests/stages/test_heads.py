"""Heads on features that stay as they are: the fit, the choice, and students in the pipeline."""

import json
import textwrap

import numpy as np
import pytest
from record_vits import weights
from safetensors.numpy import save_file
from scipy.special import log_softmax, softmax
from test_vit import RECORDED, tiny  # noqa: F401

from qmx import encoders, heads
from qmx.data import load


def blobs(n, seed=0, dimension=6):
    """(features, logits of a linear target), three classes."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, dimension)).astype(np.float32) + 1
    truth = np.random.default_rng(9).normal(size=(dimension, 3))
    return features, (2 * features @ truth).astype(np.float32)


def test_the_minimum():
    """As scikit-learn's logistic regression on hard answers, whose C is 1 / (decay n)."""
    from sklearn.linear_model import LogisticRegression

    features, logits = blobs(60)
    labels = logits.argmax(1)
    hard = np.where(np.eye(3, dtype=bool)[labels], 0, -np.inf)
    mean, scale = heads.spread(features)
    centred = (features - features.mean(0)) / scale
    assert np.isclose(np.square(centred).sum(1).mean(), 1, rtol=1e-5)
    head = heads.fit(features, hard, mean=mean, scale=scale, decays=(1e-2,), temperatures=(1.0,))
    theirs = LogisticRegression(C=1 / (1e-2 * 60), tol=1e-8, max_iter=1000).fit(centred, labels)
    ours = heads.scores(head.params, features)
    np.testing.assert_allclose(log_softmax(ours, 1), theirs.predict_log_proba(centred), atol=5e-3)


def test_temperature():
    """A head at any temperature tells the target's own probabilities."""
    features, logits = blobs(400)
    fresh, truth = blobs(50, seed=1)
    for temperature in (1.0, 4.0):
        head = heads.fit(features, logits, decays=(1e-7,), temperatures=(temperature,), folds=2)
        ours = softmax(heads.scores(head.params, fresh), axis=1)
        assert np.abs(ours - softmax(truth, axis=1)).max() < 0.05, temperature


def test_fewer_answers_than_features():
    """The same head, found among combinations of its rows."""
    features, logits = blobs(30, dimension=80)
    about = dict(zip(("mean", "scale"), heads.spread(features), strict=True))
    few = heads.fit(features, logits, **about)
    all_of_them = heads.fit(features, logits, **about, also=(features, logits))
    assert (few.decay, few.temperature) == (all_of_them.decay, all_of_them.temperature)
    fresh, _ = blobs(40, seed=1, dimension=80)
    ours, theirs = (heads.scores(head.params, fresh) for head in (few, all_of_them))
    np.testing.assert_allclose(ours, theirs, atol=0.01 * theirs.std())


def test_few_labels():
    """Of very few labels the head is as good as with the best decay: a strong one is no choice for
    its modesty, with which it tells nothing but the most frequent class."""
    rng = np.random.default_rng(0)
    truth = rng.integers(10, size=2000)
    features = (rng.normal(size=(10, 32))[truth] + 2.0 * rng.normal(size=(2000, 32))).astype("f4")
    mean, scale = heads.spread(features)
    right = {}
    for seed in range(4):
        some = np.random.default_rng(seed).permutation(len(truth))[:20]
        labels = 20 * np.eye(10, dtype=np.float32)[truth[some]]
        for decays in ((1e-1, 1e-4), (1e-1,), (1e-4,)):
            about = dict(mean=mean, scale=scale, decays=decays, temperatures=(1.0,))
            head = heads.fit(features[some], labels, **about)
            guess = heads.scores(head.params, features).argmax(1)
            right.setdefault(decays, []).append((guess == truth).mean())
    chosen, strong, weak = (np.mean(told) for told in right.values())
    assert weak > strong + 0.1, (strong, weak)
    assert chosen > weak - 0.02, (chosen, weak)


def test_the_choice():
    """Decay and temperature are those that tell held-out answers best; with few answers none is
    chosen. A hidden layer learns what a line cannot."""
    features, logits = blobs(60)
    head = heads.fit(features, logits, decays=(1e-4, 10.0), folds=2, temperatures=(1.0, 2.0))
    assert head.decay == 1e-4 and 0 < head.held_out < 1
    few = heads.fit(features[:5], logits[:5], decays=(1e-1, 1e-3, 1e-5))
    assert (few.decay, few.temperature) == (1e-3, 1.0) and np.isnan(few.held_out)
    x = np.random.default_rng(0).uniform(-1, 1, (200, 2)).astype(np.float32)
    either = np.stack([x[:, 0] * x[:, 1] > 0, x[:, 0] * x[:, 1] <= 0], 1)
    told = {}
    for hidden in (0, 16):
        head = heads.fit(
            x,
            np.log(either * 0.98 + 0.01),
            hidden=hidden,
            decays=(1e-5,),
            temperatures=(1.0,),
            folds=2,
        )
        told[hidden] = (heads.scores(head.params, x).argmax(1) == either.argmax(1)).mean()
    assert told[0] < 0.7 < 0.95 < told[16], told
    with pytest.raises(ValueError, match="not finite"):
        heads.fit(features * np.nan, logits)


def test_labels_have_no_temperature():
    """Each makes the same of them, so that the head is that of a temperature of 1."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 64)).astype(np.float32)
    with np.errstate(divide="ignore"):
        labels = np.log(np.eye(10, dtype=np.float32)[rng.integers(0, 10, 40)])
    plain = heads.fit(features, labels, temperatures=(1.0,))
    for temperatures in ((1.0, 2.0, 4.0), (4.0,)):
        made = heads.fit(features, labels, temperatures=temperatures)
        assert (made.temperature, made.decay) == (1.0, plain.decay)
        np.testing.assert_array_equal(made.params["fc"]["kernel"], plain.params["fc"]["kernel"])


FUNCTIONS = """
    from pathlib import Path

    import numpy as np

    COUNT = Path(__file__).with_name("asked")


    def features(images):
        before = int(COUNT.read_text()) if COUNT.exists() else 0
        if before == 1024 and not Path(__file__).with_name("go").exists():
            raise RuntimeError("killed here")
        COUNT.write_text(str(before + len(images)))
        return rows(images)


    def rows(images):
        x = images.reshape(len(images), 64).astype(np.float32) / 255
        return np.concatenate([x, x**2], 1)


    MIX = np.random.default_rng(0).normal(size=(128, 10))


    def target(images):
        return (rows(images) - 0.3) @ MIX
"""
CONFIG = """
    import runpy

    from qmx.frozen_keys import add_encoder


    def get_config():
        config = runpy.run_path("configs/digits.py")["get_config"]("float32")
        config.update(seeds=(0,), queries=(30,), fractions=(), also=("mine+balanced+pool",))
        config.inits = ("mine", "tabled", "public")
        config.target.update(kind="callable", path="{here}/own.py:target")
        own = "{here}/own.py:features"
        add_encoder(config, "mine", kind="callable", path=own, licence="MIT")
        add_encoder(config, "tabled", kind="table", path="{here}/table.npz")
        config.pretrain.public.update(path="{here}/vit.safetensors", size=8, features="both")
        config.head.update(folds=2, decays=(1e-2, 1e-4), temperatures=(1.0,))
        config.propagation.neighbours = 5
        config.audit.watermark = "{here}/triggers.npz"
        return config
"""


TRIGGERS = 40  # evaluation images that stand for a watermark's


@pytest.fixture
def public_run(tmp_path, command, tiny):  # noqa: F811
    """A run with an encoder of each kind, begun and killed in the middle of its features: (folder,
    workdir, arguments)."""
    (tmp_path / "own.py").write_text(textwrap.dedent(FUNCTIONS))
    (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG).replace("{here}", str(tmp_path)))
    rows = {}
    exec(textwrap.dedent(FUNCTIONS).replace("__file__", repr(str(tmp_path / "own.py"))), rows)
    data = load("digits")
    images = np.concatenate(
        [side.shown(np.arange(side.size)) for side in (data.pool, data.evaluation)]
    )
    encoders.save_features(tmp_path / "table.npz", images, rows["rows"](images))
    shown = data.evaluation.shown(np.arange(TRIGGERS))
    np.savez(tmp_path / "triggers.npz", image=shown, label=rows["target"](shown).argmax(1))
    names = RECORDED["transformers dinov2"]["names"]
    save_file(
        {name: weights(name, tuple(shape)) for name, shape in names.items()},
        tmp_path / "vit.safetensors",
    )
    arguments = f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"
    status, _, err = command(*arguments)
    assert status == 2 and "mine.path" in err and "killed here" in err
    return tmp_path, tmp_path / "run", arguments


@pytest.mark.slow
def test_students(public_run, command):
    """A function, a table and weights are encoders of one grid: features once, heads in seconds; a
    table of the same features gives the same students."""
    folder, workdir, arguments = public_run
    (folder / "go").touch()
    status, out, err = command(*arguments)
    assert status == 0, err
    results = json.loads((workdir / "results.json").read_text())
    rows = {(row["init"], row["select"], row["use"]): row for row in results["rows"]}
    assert set(rows) == {
        *((init, "random", "head") for init in ("mine", "tabled", "public")),
        ("mine", "balanced", "head_pool"),
    }
    mine, tabled = (rows[init, "random", "head"] for init in ("mine", "tabled"))
    figures = ("top1", "fidelity_top1", "kl_target_student", "head")
    assert [mine[key] for key in figures] == [tabled[key] for key in figures]
    assert mine["fidelity_top1"] > 50 and mine["head"]["decay"] in (1e-2, 1e-4)
    # 1,024 of the pool before the kill, and each other image once.
    assert int((folder / "asked").read_text()) == results["pool"]["size"] + 360 + TRIGGERS
    asked = results["account"]["images"]
    assert asked <= 60 + 360, "answers alone are paid for"
    for row in results["rows"]:  # on evaluation images marked as the target answers them: fidelity
        name = f"{row['init']}-{row['select']}-logits-{row['use']}-30-seed0"
        pair = np.load(workdir / "evaluate" / name / "named.npz")
        same = 100 * np.mean(pair["student"][:TRIGGERS] == pair["target"][:TRIGGERS])
        assert row["watermark"]["answered"] == pytest.approx(same)
    assert "licence MIT" in out and "licence Apache-2.0" in out and "features both" in out

    path = workdir / "pretrain/public/encoder.safetensors"
    encoder = encoders.load_encoder(path)
    pool = load("digits").pool.shown(np.arange(20))
    ours = encoders.encode(encoder, pool)
    stored = np.load(workdir / "select/features-public/features.npy")[:20]
    np.testing.assert_allclose(ours, stored, atol=1e-5)
    student = next(workdir.glob("distill/mine*head-*/student.safetensors"))
    with pytest.raises(ValueError, match="is a head on features of the encoder mine"):
        encoders.load_encoder(student)

    before = (folder / "asked").read_text()
    status, _, err = command(*arguments)
    assert status == 0 and "all of it was done before" in err
    assert (folder / "asked").read_text() == before

    # The same weights, and other images: nothing that was made of their features is left.
    made = {path: path.read_bytes() for path in workdir.glob("*/*/*.[ns][pa]*")}
    words = "--config.pretrain.public.mean=(0.1,0.1,0.1)", "--update"
    status, _, err = command(*arguments, *words)
    assert status == 0, err
    changed = {path.parent for path in made if path.read_bytes() != made[path]}
    assert {path.relative_to(workdir).as_posix() for path in changed} == {
        *("pretrain/public", "select/features-public", "evaluate/features-public"),
        "evaluate/trigger-features-public",
        *(f"{kind}/public-random-logits-head-30-seed0" for kind in ("distill", "evaluate")),
    }
    assert (folder / "asked").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("inits=('public',)", "the init 'public' needs --config.pretrain.public.path"),
        ("pretrain.public.kind=onnx", "pretrain.public.kind has the unknown value 'onnx'"),
        ("head.folds=1", "head.folds 1 must be a whole number from 2"),
    ],
)
def test_refused(change, message, command, tmp_path):
    status, _, err = command(
        "--config=configs/digits.py:float32", f"--workdir={tmp_path / 'w'}", f"--config.{change}"
    )
    assert status == 2 and message in err and not (tmp_path / "w").exists()
