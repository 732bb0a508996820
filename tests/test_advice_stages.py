"""Advice of stages, reports and commands, followed: see test_advice.py."""

import ast
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY
from ml_collections import ConfigDict, FrozenConfigDict
from numbered import images
from PIL import Image
from safetensors.numpy import save_file
from scipy.special import softmax
from test_advice import advice
from test_advice_config import checked
from test_data import load
from test_encoders import file, photos  # noqa: F401
from test_ledger import Target
from test_ledger_commands import command as ledger_command
from test_methods import QUICK, batch, make, plain
from test_photos import tree
from test_report import results
from test_settings import DIGITS
from test_vit import tiny  # noqa: F401

from qmx import data as qmx_data
from qmx import distill, emp_ssl, fastsiam, fixmatch, moco, models, optim
from qmx.checks import validate
from qmx.data import cache, named
from qmx.data.arrays import from_arrays
from qmx.data.classes import number_of
from qmx.detection import mmd
from qmx.encoders import read_features, save_features
from qmx.files import write_json
from qmx.frozen_keys import add_encoder
from qmx.grid import columns
from qmx.layer_rates import by_layer
from qmx.ledger import Ledger, pixel_digests, table
from qmx.ledger.replay import traffic
from qmx.ledger.table import Recorded, from_ledger
from qmx.ledger.verify import recover
from qmx.main import parse
from qmx.models.from_torch import convert
from qmx.pipeline import of_targets_classes
from qmx.report import compare
from qmx.report.answer import next_steps
from qmx.settings import base, leaves
from qmx.sharding import check_batch
from qmx.stages import frozen
from qmx.stages.pretrain import Pretrained
from qmx.stages.query import query
from qmx.stages.run import Run
from qmx.stages.select import Selection
from qmx.stages.target import target
from qmx.stages.trial import trial
from qmx.train import fit, init_state, make_step

# Trainings


def steep(**rates):
    """The last loss of two layers without a norm that learn to tell eight images apart."""
    layer, head = models.classifier(32), models.classifier(10)
    net = models.Network(
        lambda rng, x: layer.init(rng, x.reshape(len(x), -1)),
        lambda p, s, x, train, rng=None: layer.apply(p, s, x.reshape(len(x), -1), train),
    )
    method = distill.make(net, head, lambda rng, batch: batch["image"] / 255.0)
    data = {"image": batch()["image"], "scores": 30 * jnp.eye(10)[jnp.arange(8)]}
    tx = optim.sgd(optim.schedule("constant", epochs=60, steps=60, **rates))
    losses = []
    fit(
        make_step(method, tx),
        init_state(method, tx, jax.random.key(0), data),
        lambda start: iter([data] * (60 - start)),
        jax.random.key(1),
        steps=60,
        on_metrics=lambda step, metrics: losses.append(metrics["loss"]),
    )
    return losses[-1]


@pytest.mark.slow
def test_numbers_that_go_wrong():
    """Either cure, and it learns."""
    pattern, error = "a (lower learning rate) or a (warm-up) may cure it", FloatingPointError
    advice(pattern, steep, learning_rate=2.0, error=error)
    assert steep(learning_rate=1.0) < 1e-4
    assert steep(learning_rate=2.0, warmup_epochs=20) < 1e-4


def test_numbers_of_methods():
    """A queue, shares of the pool, views and words that are named; all of it traced alone."""
    data, key = batch(), jax.random.key(0)

    def begun(method):
        return jax.eval_shape(method.init, key, data)

    def queue(size):
        return moco.make(QUICK, models.moco_head(16), plain, queue_size=size)

    for size in (20, 3):
        told = advice(r"; (\d+) is$", lambda size: begun(queue(size)), size)
        begun(queue(int(told[1])))
    method = fixmatch.make(QUICK, models.classifier(10), plain, plain)

    def step(count):
        some = {**data, "pool_image": jnp.zeros((count, *data["image"].shape[1:]), jnp.uint8)}
        return jax.eval_shape(method.loss, *begun(method), some, key)

    advice("make them a multiple", step, 15)
    assert step(8) and step(16)
    for name in ("rule", "align"):
        known = advice("choose one of (.*)", make, "fixmatch", **{name: "?"})[1].split(", ")
        assert len(known) > 2 and all(make("fixmatch", **{name: word}) for word in known)
    heads = models.simsiam_projector(16, 2), models.simsiam_predictor(8)
    for one in (
        lambda views: fastsiam.make(QUICK, *heads, plain, views=views),
        lambda views: emp_ssl.make(QUICK, models.emp_ssl_projector(16, 8), plain, views=views),
    ):
        tried = one(int(advice(r"use (\d) or more", one, 1)[1]))
        assert jax.eval_shape(tried.loss, *begun(tried), data, key)
    known = advice("choose one of (.*)", optim.schedule, "?", 0.1, epochs=1, steps=2)[1]
    for word in known.split(", "):
        optim.schedule(word, 0.1, epochs=1, steps=2, milestones=(0.5,))
    known = advice("choose one of (.*)", optim.sgd, 0.1, weight_decay_on="?")[1]
    assert all(optim.sgd(0.1, weight_decay_on=word) for word in known.split(", "))
    for size in (4 * jax.device_count() + 1, 1):
        told = advice(r"use (\d+)(?: or (\d+))?$", check_batch, size, "batch_size")
        for number in filter(None, told.groups()):
            check_batch(int(number), "batch_size")
    flat, decays = {"backbone": {"conv": jnp.ones(2)}}, by_layer(0.5)
    told = advice(r"(layer_decay) .*; set it to (1) for", decays.init, flat)
    checked(**{f"distill__{told[1]}": float(told[2])})


# Stages


def a_run(tmp_path, data, only="all", code="return scores(images)", **target):
    """A run of a function that answers by the brightness of an image's first pixel."""
    config = base()
    path = tmp_path / "own.py"
    path.write_text(
        "import numpy as np\nfrom qmx.ledger import Refused\n\n\ndef scores(images):\n"
        "    return 9 * np.eye(3, dtype=np.float32)[images[:, 0, 0, 0].astype(int) // 100]\n\n\n"
        f"def f(images):\n    {code}\n"
    )
    config.update(inits=("none",), queries=(10,), fractions=())
    config.target.update(kind="callable", path=f"{path}:f")
    config.target.update(target)
    return Run(config, tmp_path / "w", data, only, lambda: False, [])


def told_classes(names=("a", "b", "c")):
    """Images whose first pixel tells the class, of these names."""
    image = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    label = np.arange(60) % 3
    image[:, 0, 0, 0] = 100 * label + 20
    made = from_arrays("own", image[:40], label[:40], image[40:], label[40:])
    return made._replace(class_names=names)


def asked(run):
    """The artefact of the query stage."""
    return query(run, target(run), [Selection(np.arange(10), 0)])


def test_classes_in_another_order(tmp_path, capsys):
    """The names in the target's order; what it takes; the accuracy that is expected."""
    data = told_classes(("b", "c", "a"))
    assert asked(a_run(tmp_path, data)).top1 == 100
    names = tmp_path / "names.txt"
    names.write_text("c\na\nb\n")
    capsys.readouterr()
    wrong = a_run(tmp_path, named(data, str(names)), expect=(99.0, 100.0))
    wrong = wrong._replace(workdir=tmp_path / "wrong")
    assert asked(wrong).top1 == 0
    err = capsys.readouterr().err
    assert "the config expects 99 / 100: other weights, other images, or another order" in err
    key = re.search(r"in the images' order \((target\.\w+)\)", err)[1]
    names.write_text("b\nc\na\n")
    wrong.config.update_from_flattened_dict({key: str(names)})
    right = wrong._replace(workdir=tmp_path / "right", data=of_targets_classes(wrong.config, data))
    assert asked(right).top1 == 100 and "warning" not in capsys.readouterr().err

    code = "return scores(np.minimum(images * 255.0, 299))"
    bytes_shown = a_run(tmp_path, data, code=code)._replace(workdir=tmp_path / "bytes")
    assert asked(bytes_shown).top1 < 50
    key = re.search(r"shown what it takes \((target\.\w+)\)", capsys.readouterr().err)[1]
    bytes_shown.config.update_from_flattened_dict({f"{key}.scale": 1.0, f"{key}.dtype": "float32"})
    assert asked(bytes_shown._replace(workdir=tmp_path / "floats")).top1 == 100
    assert "warning" not in capsys.readouterr().err


def test_images_on_both_sides(tmp_path, capsys):
    """Photos of the same pixels in other bytes: the list that is named leaves them out."""
    sizes, rng = {"canvas": 8, "resize": 8, "crop": 8}, np.random.default_rng(0)
    for place, side in enumerate(("train", "val")):
        for c in range(3):
            (tmp_path / side / f"n{c}").mkdir(parents=True)
            shown = rng.integers(0, 100, (8, 8, 3), np.uint8) + np.uint8(100 * min(c, 1))
            if c < 2:
                shown = np.full((8, 8, 3), 90 + 20 * c, np.uint8)
            photo = tmp_path / side / f"n{c}/{side}{c}.png"
            Image.fromarray(shown).save(photo, compress_level=9 * place)
    paths = {"path": str(tmp_path / "train"), "eval_path": str(tmp_path / "val")}
    run = a_run(tmp_path, qmx_data.load("folder", **paths, **sizes))
    query(run, target(run), [Selection(np.arange(3), 0)])
    err = capsys.readouterr().err
    line = r"warning: (\d) of .* too \((.*)\), .*; remove them from one side; (\S+) takes a list"
    count, names, key = re.search(line, err).groups()
    assert (count, names) == ("2", "n0/val0.png, n1/val1.png") and key == "data.leave_out"
    (tmp_path / "out.txt").write_text(names.replace(", ", "\n"))
    data = qmx_data.load("folder", **paths, **sizes, leave_out=str(tmp_path / "out.txt"))
    run = run._replace(data=data, workdir=tmp_path / "other")
    query(run, target(run), [Selection(np.arange(3), 0)])
    assert "evaluation images too" not in capsys.readouterr().err


def test_a_target_that_answers_nothing_at_first(tmp_path):
    """Names of its classes say what no answer does."""
    image = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    none = np.zeros(0, np.int32)
    data = from_arrays("own", image[:20], none, image[20:], none)
    run = a_run(tmp_path, data, code="raise Refused('not mine')", max_refused=1.0)
    told = target(run)
    pattern = r"(target\.\w+) names a file that says it, one a line"
    key = advice(pattern, trial, run, told)[1]
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    run.config.update_from_flattened_dict({key: str(tmp_path / "names.txt")})
    run = run._replace(data=of_targets_classes(run.config, data))
    assert trial(run, target(run)).data.classes == 3


def test_one_stage_after_the_other(tmp_path):
    """The stage that is named makes what is lacking."""
    data = told_classes()
    run = a_run(tmp_path, data, "query")
    stage = advice(r"--stage=query needs .*, which --stage=(\w+) makes", asked, run)[1]
    target(run._replace(only=stage))
    assert asked(run).top1 == 100


def test_another_normalisation(tiny, tmp_path, capsys):  # noqa: F811
    """A network's own, by the keys and the numbers that are named."""
    tensors, entry = tiny("transformers vit classifier")
    save_file(tensors, tmp_path / "vit.safetensors")
    image = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    classes = len(tensors["classifier.bias"])
    label = np.arange(40) % classes
    label[0] = classes - 1
    for name, some in {"pool": slice(0, 30), "held": slice(30, 40)}.items():
        np.savez(tmp_path / f"{name}.npz", image=image[some], label=label[some])
    paths = [str(tmp_path / f"{name}.npz") for name in ("pool", "held")]
    keys = {"kind": "torch", "path": str(tmp_path / "vit.safetensors"), "arch": ""}
    run = a_run(tmp_path, load("arrays", *paths), **keys)
    target(run)
    line = r"of its family they are (\(.*\)) and (\(.*\)): data.(\w+) and data.(\w+) set them"
    told = re.search(line, capsys.readouterr().err)
    given = {told[3]: ast.literal_eval(told[1]), told[4]: ast.literal_eval(told[2])}
    run = run._replace(data=load("arrays", *paths, **given), workdir=tmp_path / "other")
    target(run)
    assert "family" not in capsys.readouterr().err

    tensors, entry = tiny("torchvision vit")
    made, config = convert(tensors), base()
    said = advice(
        r"(\S+).mean and .std must be .* of ImageNet they are (\(.*?\)) and (\(.*?\)), .* of timm's"
        r" own ViTs (\(.*?\)) and (\(.*?\))$",
        *(frozen.normalisation, config, "public", run.data, made),
    ).groups()
    for mean, std in (said[1:3], said[3:5]):
        numbers = ast.literal_eval(mean), ast.literal_eval(std)
        config.update_from_flattened_dict({f"{said[0]}.mean": numbers[0]})
        config.update_from_flattened_dict({f"{said[0]}.std": numbers[1]})
        assert frozen.normalisation(config, "public", run.data, made) == numbers


def test_images_of_some_classes(tiny, tmp_path):  # noqa: F811
    """A file with a line for each class of the target, whether weights or answers tell how many."""
    tensors, _ = tiny("transformers vit classifier")
    save_file(tensors, tmp_path / "vit.safetensors")
    count = len(tensors["classifier.bias"])
    image = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    label = np.zeros(40, np.int32)  # of the first class alone
    some = from_arrays("own", image[:30], label[:30], image[30:], label[30:])
    digests = np.frombuffer(b"".join(pixel_digests(image)), np.uint8).reshape(40, 32)
    scores = np.random.default_rng(1).normal(size=(40, count)).astype(np.float32)
    answers = Recorded(digests, scores, np.array(["logits"] * 40), "owner's", "as-is")
    table.save(tmp_path / "table.npz", answers)
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {i}\n" for i in range(count)))
    for kind, path in (("torch", "vit.safetensors"), ("recorded", "table.npz")):
        run = a_run(tmp_path, some, kind=kind, path=str(tmp_path / path), arch="")
        run = run._replace(workdir=tmp_path / kind)
        key = advice(r"or (target\.\w+) names a file with a line for each", target, run)[1]
        run.config.update_from_flattened_dict({key: str(names)})
        assert target(run._replace(data=of_targets_classes(run.config, some))).name


def test_a_table_that_lacks_features(tmp_path):
    """Those of the image that is named, and of the others, are added."""
    data, config = told_classes(), base()
    add_encoder(config, "mine", kind="table", path=str(tmp_path / "table.npz"))
    run = Run(config, tmp_path, data, "all", lambda: False, [])
    encoder = Pretrained("mine", 0, tmp_path / "table.npz", {"kind": "table"})
    images = data.pool.shown(np.arange(40))
    rows = images.reshape(40, -1)[:, :5].astype(np.float32)
    there = np.delete(np.arange(40), (7, 9))
    save_features(tmp_path / "table.npz", images[there], rows[there])

    np.savez(tmp_path / "bad.npz", image=there, features=rows[there])
    told = advice(r"must be (uint8)\[n, 32\], SHA-256 digests", read_features, tmp_path / "bad.npz")
    digests, _ = read_features(tmp_path / "table.npz")
    assert np.frombuffer(digests[0], told[1]).shape == (32,)

    def read():
        return frozen.rows_of(run, encoder, data.pool, "pool")(np.arange(40), lambda done: None)

    told = advice(r"no features of image (\d+) and of (\d+) of the next .*; add them", read)
    assert told.groups() == ("7", "1")
    save_features(tmp_path / "more.npz", images, rows)
    (tmp_path / "more.npz").replace(tmp_path / "table.npz")
    np.testing.assert_array_equal(read(), rows)


# Reports


def taken(found, *texts):
    """A config with the keys that advice names for a shell, and the command's other words."""
    words = [word for text in texts for word in shlex.split(text)]
    keys = [word for word in words if word.startswith("--config.")]
    made = ConfigDict(base())
    made.update(found["config"])
    arguments = parse(["qmx", f"--config={ROOT}/configs/digits.py", "--workdir=w", *keys])
    for key in (word.partition("=")[0].removeprefix("--config.") for word in keys):
        value = arguments.config
        for part in key.split("."):
            value = value[part]
        made.update_from_flattened_dict({key: value})
    validate(FrozenConfigDict(made), DIGITS)
    return made


def step_of(found, pattern):
    """(the match, what is given) of the one step of the advice that begins so."""
    (step,) = [step for step in next_steps(found) if re.match(pattern, step)]
    assert any("--update" in step for step in next_steps(found))
    return step, re.findall(r"--config\.[^\s=]+=\"[^\"]*\"", step)


@pytest.mark.parametrize("use", ["asked", "head"])
def test_what_to_do_next(use):
    """Each command line that a report names is read, and can be run; and says what it promises."""
    small = {"pretrain.moco.queue_size": 1024, "pretrain.moco.batch_size": 128}
    found = results({**small, "audit.below": 0.5})
    step, keys = step_of(found, "Ask less: 10 queries, the smallest budget, reach 50 %")
    assert taken(found, *keys).queries == (5, 10, 100, 1000)
    step, keys = step_of(found, "Run three seeds")
    assert taken(found, *keys).seeds == (0, 1, 2)
    other = results({**small, "seeds": (7,)})
    assert taken(other, *step_of(other, "Run three seeds")[1]).seeds == (7, 0, 1)
    assert not [step for step in next_steps(results({"seeds": (3, 4, 5)})) if "seeds (" in step]
    step, keys = step_of(found, "See what weaker answers .* asks nothing more")
    made = taken(found, *keys)
    assert made.accesses == ("logits", "label")
    single = results({**small, "also": ("moco+typiclust",)})
    made = taken(single, *step_of(single, "See what weaker answers")[1])
    seen = {(column.select, column.access) for column in columns(made)}
    assert {("typiclust", "logits"), ("typiclust", "label")} <= seen, (
        "the strongest sees labels too"
    )
    weaker = results({**small, "accesses": ("label",)})
    assert not [step for step in next_steps(weaker) if "weaker" in step], "there are none"
    by_answers = results({**small, "also": ("moco+margin",)})
    assert step_of(by_answers, "See what weaker .* only where answers choose them")
    named_keys = re.findall(r"--config\.([\w.]+)", step_of(found, "Tell your limits")[0])
    limited = results({**small, **{f"{key}": 3 for key in named_keys}})
    assert limited["audit"]["time_to_extract"][-1]["hours_pooled"] is not None
    assert not [step for step in next_steps(limited) if "limits (" in step]

    weak = {(init, n) for init in ("none", "moco") for n in (10, 100, 1000)}
    failed = results(small, weak=weak)
    for row in failed["rows"]:
        row["recipe"] = "head" if use == "head" else "distill"
    longer = re.findall(r"--config\.([\w.]+)", step_of(failed, "Train the students longer")[0])
    assert longer and all(key in dict(leaves(base())) for key in longer)
    failed["pool"]["size"] = 1437
    step, keys = step_of(failed, "Ask more .*, or try a stronger attack")
    told = taken(failed, *keys)
    assert told.also == ("moco+typiclust+pool",) and told.queries == (10, 100, 1000, 1437)
    failed["pool"]["budgets"][-1]["queries"] = failed["pool"]["size"]
    assert step_of(failed, "Try a stronger attack")
    failed["config"]["also"] = ["moco+typiclust+pool"]
    assert not [step for step in next_steps(failed) if "stronger" in step or "Ask more" in step]


def test_compared_as_the_report_says(tmp_path, monkeypatch, capsys):
    """The command of the last step, and the use that a mistake names."""
    monkeypatch.chdir(tmp_path)
    for name in ("BEFORE", "AFTER"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "results.json", results())
    words = re.search("compare: qmx (compare .*)[.]$", next_steps(results())[-1])[1].split()
    assert words[0] == "compare" and compare.main(words[1:]) == 0
    with pytest.raises(SystemExit):
        compare.main(["one"])
    words = re.search("use qmx compare (.*)", capsys.readouterr().err)[1].split()
    assert compare.main(words) == 0


@pytest.mark.slow
def test_a_report_of_another_version(finished, command, tmp_path, capsys):
    """Its command with --update makes it anew, and asks nothing."""
    shutil.copytree(finished, tmp_path / "w")
    path = tmp_path / "w/results.json"
    now = json.loads(path.read_text())
    path.write_text(json.dumps({**now, "schema": 1}))
    assert compare.main([str(path), str(finished)]) == 2
    update = re.search(r"its command with (--\w+) asks nothing twice", capsys.readouterr().err)[1]
    status, _, err = command(*TINY, f"--workdir={tmp_path}/w", update)
    assert status == 0, err
    assert json.loads(path.read_text())["account"] == now["account"]
    assert compare.main([str(path), str(finished)]) == 0


# Files


def test_tables_of_other_answers(tmp_path):
    """One answer to an image; one target; digests, scores and texts as they are described."""
    with Ledger(tmp_path / "l", target="one") as ledger:
        ledger.ask(Target(), images(1, 2, 3))
    good, _ = from_ledger(tmp_path / "l")
    path = tmp_path / "table.npz"

    def saved(**changes):
        np.savez(path, **{**good._asdict(), **changes})

    def told(pattern, **changes):
        saved(**changes)
        return advice(pattern, table.load, path)

    twice = {name: np.concatenate([good._asdict()[name]] * 2) for name in ("image", "scores")}
    twice["access"] = np.concatenate([good.access] * 2)
    assert told("keep one of each", **twice)
    kept = np.unique(twice["image"], axis=0, return_index=True)[1]
    saved(**{name: rows[kept] for name, rows in twice.items()})
    assert len(table.load(path).scores) == 3
    targets = np.array(["one", "two", "two"])
    told("take one for each table", target=targets)
    for name in ("one", "two"):
        some = {key: getattr(good, key)[targets == name] for key in ("image", "scores", "access")}
        saved(**some, target=targets[targets == name])
        assert table.load(path).target == name
    levels = told("choose among (.*)", access=np.array(["all"] * 3))[1].split(", ")
    for level in levels:
        rows = {"probs": softmax(good.scores, 1), "label": np.eye(good.scores.shape[1])[:3]}
        scores = rows.get(level, good.scores).astype(np.float32)
        saved(access=np.array([level] * 3), scores=scores)
        assert table.load(path).access[0] == level
    told(r"SHA-256 digests, uint8\[n, 32\]", image=good.image.astype(int))
    told(r"must be float32 or float16 \[3, N\]", scores=good.scores.astype(int))
    told("every one needs finite scores", scores=good.scores * np.nan)
    told("must be a text, or 3 of them", target=np.arange(3))
    for good_scores in (good.scores, good.scores.astype(np.float16)):
        saved(scores=good_scores, target=np.array("one"))
        table.load(path)
    ends = advice("a file that ends in (.*)", table.load, tmp_path / "t.txt")[1].split(" or ")
    for end in ends:
        table.save(tmp_path / f"other{end}", good)
        assert table.load(tmp_path / f"other{end}").target == "one"


def test_places_that_are_taken(tmp_path):
    """A ledger that is recovered, moved away or by another name."""
    with Ledger(tmp_path / "l", target="one") as ledger:
        ledger.ask(Target(), images(1, 2, 3))
    out = tmp_path / "out.sqlite"
    recover(tmp_path / "l", out)
    told = advice(
        "move it away or give another --(out)", recover, tmp_path / "l", out, error=FileExistsError
    )
    status, _, err = ledger_command("verify", tmp_path / "l", f"--{told[1]}={tmp_path}/other")
    assert status == 0, err
    out.rename(tmp_path / "away")
    assert recover(tmp_path / "l", out).answers == 3


def test_classes_that_are_no_numbers(tmp_path):
    """Labels beyond the images are numbered from 0."""
    labels = np.array([3, 900, 17, 3])
    advice(r"number the classes 0\.\.N-1", number_of, {"own": labels})
    assert number_of({"own": np.unique(labels, return_inverse=True)[1]}) == 3


@pytest.mark.slow
def test_images_beyond_the_memory(environment, tmp_path):
    """Under a limit: fewer in the file fit. The command adds no keys that would not help."""
    code = (
        "import resource, sys\nimport numpy as np\nfrom qmx.data import load\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, -1))\n"
        "try:\n    print(load('arrays', path=sys.argv[1]).pool.size)\n"
        "except MemoryError as error:\n    print(error)\n"
    )
    path = tmp_path / "pool.npz"

    def told(count):
        np.savez_compressed(path, image=np.zeros((count, 160, 160, 3), np.uint8))
        words = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done
        return done.stdout.strip()

    line = told(4000)
    assert line.startswith(f"{path}: no memory for all of its images"), line
    assert "; lower their number in the file" in line
    assert told(40) == "40"


# Commands


def test_targets_of_a_ledger(tmp_path):
    """A beginning of those that are listed."""
    for name in ("abc", "abd"):
        with Ledger(tmp_path / "l", target=name) as ledger:
            ledger.ask(Target(), images(1, 2))
    pattern = "give --target=BEGINNING of one of: (.*)"
    for beginning in ("ab", "x"):
        listed = advice(pattern, lambda name: [*traffic(tmp_path / "l", name)], beginning)[1]
        for name in listed.split(", "):
            assert [*traffic(tmp_path / "l", name)]


def test_permutations_for_a_level():
    """One more than the number that is named."""
    rows = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    for level in (0.001, 0.05, 0.29):
        pattern, few = r"needs permutations above (\d+)", {"window": 4, "alpha": level}
        least = int(advice(pattern, mmd, rows, rows, permutations=1, **few)[1])
        mmd(rows, rows, permutations=least + 1, **few)


def test_a_worker_that_is_killed(tmp_path, capsys):
    """With fewer processes the rest is written."""
    pool = tree(tmp_path / "train", {f"n{c}/{i}.JPEG": (40, 30) for c in (1, 2) for i in range(4)})
    words = [pool, str(tmp_path / "cache"), "--shard=2"]

    def kill():
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.001)
        os.kill(workers[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert cache.main([*words, "--processes=2"]) == 2
        killer.join()
        said = capsys.readouterr().err
        assert (advice := re.search(r"run again with fewer (--\w+)", said)), said
        assert cache.main([*words, f"{advice[1]}=1"]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
