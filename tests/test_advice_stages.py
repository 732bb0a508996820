"""Advice of configs, stages and reports, followed: see test_advice.py."""

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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image
from safetensors.numpy import save_file
from test_advice import advice
from test_data import load
from test_encoders import file, photos  # noqa: F401
from test_ledger import Target, images
from test_ledger_commands import command as ledger_command
from test_methods import QUICK, batch, make, plain
from test_photos import tree
from test_ranges import LEAVES, SINGLE, TUPLES, config
from test_report import results
from test_settings import DIGITS, digits
from test_vit import tiny  # noqa: F401

from qmx import data as qmx_data
from qmx import distill, embed, emp_ssl, fastsiam, fixmatch, moco, models, optim, save_encoder
from qmx.cautions import warnings
from qmx.checkpoint import save_weights
from qmx.checks import check_trainers, check_values, validate
from qmx.data import cache, named
from qmx.data.arrays import from_arrays
from qmx.data.classes import number_of
from qmx.detection import mmd
from qmx.encoders import save_features
from qmx.files import write_json
from qmx.frozen_keys import add_encoder
from qmx.layer_rates import by_layer
from qmx.ledger import BudgetSpent, Ledger, table
from qmx.ledger.replay import traffic
from qmx.ledger.table import from_ledger
from qmx.ledger.verify import recover
from qmx.main import LESS_MEMORY, parse
from qmx.models.from_torch import convert
from qmx.pipeline import STAGES, of_targets_classes
from qmx.ranges import OF_THE_GRID, RANGES, WORDS, value_problems
from qmx.report import compare
from qmx.report.answer import next_steps
from qmx.selection.select import select
from qmx.settings import base, leaves, recipe
from qmx.sharding import check_batch
from qmx.shipped import config_file, load_file, with_files
from qmx.stages import frozen
from qmx.stages.pretrain import Pretrained
from qmx.stages.query import check_budget, query
from qmx.stages.run import SMALLER, Run
from qmx.stages.select import Selection
from qmx.stages.target import target
from qmx.stages.trial import trial
from qmx.train import fit, init_state, make_step

# Values of keys


def checked(data=DIGITS, stage="all", **changes):
    """The checks before a run, of configs/digits.py with some keys changed."""
    made = digits(**changes)
    check_values(made)
    validate(made, data, stage)


def said(values):
    """The lines about values of keys, by the key."""
    changes = {key.replace(".", "__"): value for key, value in values.items()}
    return {line.split()[0].rstrip(":"): line for line in value_problems(config(**changes))}


def test_limits():
    """Of each key both that are named are taken, or the numbers just within."""
    ours = [key for key in SINGLE + TUPLES if key not in OF_THE_GRID]
    ours = [key for key in ours if key not in TUPLES or key.rpartition(".")[2] in RANGES]
    bad, nan = {}, float("nan")
    for key in ours:
        bad[key] = (nan, *LEAVES[key][1:]) if key in TUPLES else nan
    lines, limits = said(bad), ({}, {})
    assert lines.keys() == bad.keys()
    for key, line in lines.items():
        numbers = r"(from|above) (\S+) (?:to|on and below|and at most|and below) (\S+)"
        _, *ends = re.search(numbers, line).groups()
        low, high = (float(number.replace(",", "")) for number in ends)
        whole = "whole number" in line
        step = 1 if whole else min(1e-6, (high - low) / 10)
        ends = low + step * (" above " in line), high - step * (" below " in line)
        for end, good in zip(ends, limits, strict=True):
            value = int(end) if whole else end
            good[key] = (value,) * len(LEAVES[key]) if key in TUPLES else value
    assert len(limits[0]) > 130 and [said(good) for good in limits] == [{}, {}]


def test_words():
    """Each that is listed is taken; so are the ones that are guessed."""
    ours = [key for key in LEAVES if key in WORDS or key.rpartition(".")[2] in WORDS]
    listed = {
        key: re.search("choose among (.*)", line)[1].split(", ")
        for key, line in said(dict.fromkeys(ours, "?")).items()
    }
    assert listed.keys() == {*ours}
    for place in range(max(map(len, listed.values()))):
        assert not said({key: words[place % len(words)] for key, words in listed.items()})
    typos = said({key: words[-1] + "x" for key, words in listed.items()})
    guessed = {key: re.search("did you mean '(.*)'", line)[1] for key, line in typos.items()}
    assert len(guessed) == len(ours) and not said(guessed)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"pretrain__simsiam__batch_size": 97}, r"(batch_size) 97 .*; use (\d+) or (\d+)"),
        ({"pretrain__moco__queue_size": 1000}, r"(queue_size) 1000 .* 128; (\d+) is"),
        ({"pretrain__moco__queue_size": 20}, r"(queue_size) 20 .* 128; (\d+) is"),
        ({"pretrain__moco__group_size": 48}, r"(group_size) 48 .* more; use (\d+) or (\d+)"),
        ({"pretrain__moco__group_size": 120}, r"(group_size) 120 .* more; use (\d+) or (\d+)"),
        ({"strong_view__jitter": (0.4, 0.4, 0.4, 0.6)}, r"(jitter) .* use (0.5) or less"),
    ],
)
def test_numbers(changes, pattern):
    """Those that are named are taken, and nothing is to be feared of them."""
    ((key, value),) = changes.items()

    def built(value):
        made = digits(**{key: value}, inits=("none", "moco"), also=("simsiam",))
        validate(made, DIGITS)
        check_trainers(made, DIGITS, "pretrain")
        return made

    name, *numbers = advice(pattern, built, value).groups()
    assert key.endswith(name)
    for number in map(float, numbers):
        good = (*value[:3], number) if isinstance(value, tuple) else int(number)
        assert not warnings(built(good), DIGITS), number


def test_kinds_of_values(tmp_path):
    """Each in the form that is shown."""
    bad = {"price": "a", "tensorboard": 1, "data.path": 1, "seeds": None}
    forms = {"a number": 2.5, "True or False": False, "a word": "w", "a tuple": (1,)}
    kinds = {key: re.search("must be (.*)", line)[1] for key, line in said(bad).items()}
    assert len(kinds) == 4 and not said({key: forms[kind] for key, kind in kinds.items()})
    shown = re.search(r"as in (\(.*\))", said({"selects": (1,)})["selects"])[1]
    words = ["qmx", *TINY, f"--workdir={tmp_path}"]
    assert parse([*words, f"--config.selects={shown}"]).config.selects == ("random",)
    short = {"strong_view.jitter": (0.5,), "weak_view.crop_scale": (0.5,)}
    good = {
        key: ast.literal_eval(re.search(r"must hold \d numbers, as (\(.*\)) does", line)[1])
        for key, line in said(short).items()
    }
    assert len(good) == 2 and not said(good)
    pattern = r"(crop_scale) (\(.*\)) must be the smallest and then the largest"
    told = advice(pattern, checked, weak_view__crop_scale=(0.9, 0.2))
    checked(**{f"weak_view__{told[1]}": tuple(sorted(ast.literal_eval(told[2])))})


def test_sizes_of_students():
    """Of the student and of its view, as many pixels as are named."""
    told = advice(r"needs (weak_view.size)=(\d+)", checked, student__size=16)
    checked(student__size=16, **{told[1].replace(".", "__"): int(told[2])})
    vit = {"student__arch": "vit_s16", "inits": ("none",), "also": ()}
    told = advice(r"set (student.size)=(\d+) and (weak_view.size)=(\d+)", checked, **vit)
    checked(**vit, **{told[k].replace(".", "__"): int(told[k + 1]) for k in (1, 3)})
    image = DIGITS.pool.shown(np.arange(60))[:, :, :6]
    wide = from_arrays("wide", image[:40], np.arange(40) % 4, image[40:], np.arange(20) % 4)
    few = {"inits": ("none",), "also": (), "queries": (20,), "fractions": ()}
    few |= {"target__batch_size": 20, "distill__batch_size": 20}
    sizes = {}
    for name in ("strong_view", "weak_view"):
        told = advice(rf"({name}.size) must be given", checked, data=wide, **few, **sizes)
        sizes[told[1].replace(".", "__")] = 8
    checked(data=wide, **few, **sizes)


def test_rates_of_adamw():
    """The rate that is named, or any up to a tenth."""
    for key in ("learning_rate", "head_learning_rate"):
        adam = {"distill__optimizer": "adamw", "distill__learning_rate": 0.01}
        adam |= {"distill__head_learning_rate": 0.01, f"distill__{key}": 0.5}
        told = advice(r"distill.(\w+) 0.5 .*; set it to (\S+), for", checked, **adam)
        checked(**{**adam, f"distill__{told[1]}": float(told[2])})


# The grid


def test_columns_that_lack_something():
    """A column by features is given an encoder; a control the column that is named beside it."""
    for words in ("none+typiclust", "none+margin", "none+pool"):
        example = advice("name one first, as in '(.*)'", checked, also=(words,))[1]
        checked(also=(f"{example.partition('+')[0]}+{words.partition('+')[2]}", example))
    only = {"inits": ("none",), "selects": ("typiclust",), "also": ()}
    advice("add one that is pretrained", checked, **only)
    checked(**{**only, "inits": ("none", "moco")})
    for words in ("moco+kcenter+true_labels", "rotation+pool+true_labels"):
        example = advice("without true_labels too, as '(.*)'", checked, also=(words,))[1]
        checked(also=(words, example))
    told = advice("'(margin)' chooses .*; leave it out", checked, also=("moco+margin+true_labels",))
    checked(also=(f"moco+{told[1]}",))
    answers = advice("add answers, as '(.*)'", checked, accesses=("true_labels",), also=())[1]
    checked(accesses=("true_labels", answers), also=())
    made = ConfigDict(digits(also=("mine+fixmatch",)))
    add_encoder(made, "mine", kind="callable", path="own.py:f")
    advice("its students are heads", validate, FrozenConfigDict(made), DIGITS)
    made.also = ("mine",)
    validate(FrozenConfigDict(made), DIGITS)
    listed = advice("is none of (.*)", checked, also=("moco+none",))[1].split(", ")
    for word in listed:
        partner = ("moco",) if word == "true_labels" else ()
        lists = {"lists": ("README.md",)} if word == "list" else {}
        validate(digits(also=(f"moco+{word}", *partner), inits=("none",), **lists), DIGITS)
    probs = {"target__kind": "callable", "target__path": "own.py:f", "target__access": "probs"}
    advice("lower accesses", checked, **probs)
    for level in ("probs", "label"):
        checked(**probs, accesses=(level,))
    plain = from_arrays("own", *unlabelled(DIGITS))
    target_of = {"target__kind": "callable", "target__path": "own.py:f"}
    level = advice(
        "accesses has '(.*)', which reads labels, .* leave it out",
        *(checked, plain),
        **target_of,
        accesses=("logits", "true_labels"),
    )[1]
    checked(plain, **target_of, accesses=tuple({"logits", "true_labels"} - {level}))


def unlabelled(data):
    """Arrays of both sides of a data set without labels."""
    none = np.zeros(0, np.int32)
    sides = (side.shown(np.arange(side.size)) for side in (data.pool, data.evaluation))
    return [array for images in sides for array in (images, none)]


def test_budgets():
    """One of two that are equal is left out; the numbers and shares that are named are taken."""
    both = advice(
        r"fractions (\S+) and fractions (\S+) are both .* leave one out",
        checked,
        fractions=(0.1, 0.1001),
    ).groups()
    for share in both:
        checked(fractions=(float(share),))
    numbers = advice(r"use whole numbers from (\d+) to (\d+)", checked, queries=(2000,)).groups()
    checked(queries=tuple(map(int, numbers)), fractions=())
    share = advice(r"; (\S+) is one image in a hundred", checked, fractions=("1 %",))[1]
    checked(fractions=(float(share),))
    for bad in (1e-5, 1e-9):
        least = advice("use at least (.*)", checked, fractions=(bad,))[1]
        checked(fractions=(float(least),))
    none = {"queries": (), "fractions": ()}
    told = advice(r"as in --config.(\w+)=(\d+), or .* with --stage=(\w+)", checked, **none)
    checked(**{**none, told[1]: (int(told[2]),)})
    checked(**none, stage=told[3])
    assert not warnings(digits(**none), DIGITS, told[3])


def test_recipes_that_overlap():
    """Ranges that do not, or another init."""
    made = ConfigDict(digits())
    with made.unlocked():
        for name in ("one", "two"):
            made.recipes[name] = recipe(("none",), up_to=0.5)
    told = advice(
        r"(\w+) and (\w+) both claim init none .*; give them ranges",
        validate,
        FrozenConfigDict(made),
        DIGITS,
    )
    made.recipes[told[2]].update(above=0.5, up_to=1.0)
    validate(FrozenConfigDict(made), DIGITS)


# What is likely to disappoint


def test_cautions():
    """Each is gone when the value that it names is changed as it says."""

    def caution(pattern, **changes):
        (line,) = warnings(digits(**changes), DIGITS)
        return re.search(pattern, line)

    told = caution(r"(\w+) 2048 is larger than the pool of (\d+)", pretrain__moco__queue_size=2048)
    fits = int(told[2]) // 128 * 128
    assert not warnings(digits(**{f"pretrain__moco__{told[1]}": fits}), DIGITS)
    told = caution(r"(group_size) .*; (\d+) images a group", pretrain__moco__group_size=128)
    assert not warnings(digits(**{f"pretrain__moco__{told[1]}": int(told[2])}), DIGITS)
    for key in ("decay", "guess_decay"):
        slow = {"also": ("none+fixmatch",), f"fixmatch__{key}": 0.999, "fixmatch__rule": "free"}
        slow = {"fixmatch__decay": 0.9, "fixmatch__guess_decay": 0.9, **slow}
        told = caution(rf"{key} .* of (\d+) steps .*; lower it, or raise (fixmatch.epochs)", **slow)
        lower = {**slow, f"fixmatch__{key}": 1 - 3 / int(told[1])}
        assert not warnings(digits(**lower), DIGITS)
        longer = {**slow, told[2].replace(".", "__"): 1000.0}
        assert not warnings(digits(**longer), DIGITS)


def test_labels_for_the_evaluation(tmp_path):
    """An array in the file, or class folders; and numbers 0..N-1 for classes without images."""
    image = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    label = np.arange(12) % 3
    paths = [str(tmp_path / f"{name}.npz") for name in ("pool", "held")]
    np.savez(paths[0], image=image[:8], label=label[:8])
    np.savez(paths[1], image=image[8:])
    few = digits(inits=("none",), also=(), queries=(1,), fractions=())
    (line,) = warnings(few, load("arrays", *paths))
    told = re.search(r'no labels \((class folders), or "(\w+)" in an npz\)', line)
    np.savez(paths[1], image=image[8:], **{told[2]: label[8:]})
    assert not warnings(few, load("arrays", *paths))
    np.savez(paths[1], image=image[8:], label=label[8:] * 2)
    (line,) = warnings(few, load("arrays", *paths))
    assert "have no image: 3; is label the number of the class, 0..N-1?" in line
    sides = [
        tree(tmp_path / side, {f"n{c}/{side}{c}.JPEG": (40, 30 + c + len(side)) for c in (1, 2)})
        for side in ("train", "val")
    ]
    for photo in Path(sides[1]).glob("*/*"):
        photo.rename(Path(sides[1], photo.name))
        photo.parent.rmdir()
    (line,) = warnings(few, load("folder", *sides))
    assert told[1] in line
    for photo in Path(sides[1]).glob("*.JPEG"):
        Path(sides[1], f"n{photo.stem[-1]}").mkdir()
        photo.rename(Path(sides[1], f"n{photo.stem[-1]}", photo.name))
    assert not warnings(few, load("folder", *sides))


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


def test_numbers_that_go_wrong():
    """Either cure, and it learns."""
    pattern, error = "a (lower learning rate) or a (warm-up) may cure it", FloatingPointError
    advice(pattern, steep, learning_rate=2.0, error=error)
    assert steep(learning_rate=1.0) < 1e-4
    assert steep(learning_rate=2.0, warmup_epochs=20) < 1e-4


def test_numbers_of_methods():
    """A queue, shares of the pool, views and words that are named."""
    data, key = batch(), jax.random.key(0)
    for size in (20, 3):

        def queue(size):
            return moco.make(QUICK, models.moco_head(16), plain, queue_size=size)

        told = advice(r"; (\d+) is$", queue(size).init, key, data)
        queue(int(told[1])).init(key, data)
    method = fixmatch.make(QUICK, models.classifier(10), plain, plain)
    params, state = method.init(key, data)
    wrong = {**data, "pool_image": data["pool_image"][:-1]}
    advice("make them a multiple", method.loss, params, state, wrong, key)
    for times in (1, 2):
        pool = data["pool_image"][: times * len(data["image"])]
        assert jnp.isfinite(method.loss(params, state, {**data, "pool_image": pool}, key)[0])
    for name in ("rule", "align"):
        known = advice("choose one of (.*)", make, "fixmatch", **{name: "?"})[1].split(", ")
        assert len(known) > 2 and all(make("fixmatch", **{name: word}) for word in known)
    heads = models.simsiam_projector(16, 2), models.simsiam_predictor(8)
    for one in (
        lambda views: fastsiam.make(QUICK, *heads, plain, views=views),
        lambda views: emp_ssl.make(QUICK, models.emp_ssl_projector(16, 8), plain, views=views),
    ):
        tried = one(int(advice(r"use (\d) or more", one, 1)[1]))
        params, state = tried.init(key, data)
        assert jnp.isfinite(tried.loss(params, state, data, key)[0])
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
    step, keys = step_of(failed, "Raise --config.queries, or try a stronger attack")
    assert taken(failed, *keys).also == ("moco+typiclust+pool",)
    taken(failed, '--config.queries="(10, 100, 1000, 1400)"')
    failed["pool"]["budgets"][-1]["queries"] = failed["pool"]["size"]
    assert step_of(failed, "Try a stronger attack")
    failed["config"]["also"] = ["moco+typiclust+pool"]
    assert not [step for step in next_steps(failed) if "stronger" in step or "Raise" in step]


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
        saved(access=np.array([level] * 3))
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
    """Under a limit: fewer in the file fit. Other lines name keys that can be lowered."""
    code = (
        "import resource, sys\nimport jax\nfrom qmx.main import main\nimport qmx.data\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, -1))\n"
        "sys.exit(main(['qmx', *sys.argv[1:]]))\n"
    )
    words = ["--config=digits:float32", f"--workdir={tmp_path}/w", "--config.data.source=arrays"]
    words += [f"--config.data.path={tmp_path}/pool.npz", "--config.inits=('moko',)"]

    def told(count):
        np.savez_compressed(tmp_path / "pool.npz", image=np.zeros((count, 160, 160, 3), np.uint8))
        done = [sys.executable, "-c", code, *words]
        done = subprocess.run(done, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
        return done.stderr

    assert "pool.npz: no memory for all of its images" in (line := told(4000))
    assert "; lower their number in the file" in line and LESS_MEMORY not in line
    assert "unknown value 'moko'" in told(40), "it is read, and the next mistake is told"


def test_keys_for_less_memory():
    """Each of them exists, and may be as low as can be."""
    texts = [LESS_MEMORY, *SMALLER.values()]
    ours = {key for text in texts for key in re.findall(r"\b[a-z_]+\.[a-z_.]+\w", text)}
    assert len(ours) > 9 and ours <= LEAVES.keys()
    numbers = [key for key in ours if isinstance(LEAVES[key], int)]
    lowest = {key: re.search("from (\\d+)", said({key: -1})[key])[1] for key in numbers}
    assert not said({key: int(number) for key, number in lowest.items()})
    assert not said({"target.precision": "bfloat16", "student.arch": "resnet8_narrow"})


# What a choice needs, and commands


@pytest.mark.parametrize(
    "changes",
    [
        *({"target__kind": kind} for kind in ("torch", "onnx", "callable", "recorded", "served")),
        {"inits": ("none", "imported")},
        {"inits": ("none", "public")},
        {"also": ("moco+list",)},
        {"target__access": "label"},
    ],
)
def test_what_a_choice_needs(changes, tmp_path):
    """The keys that are named, with values as they are shown."""
    there = tmp_path / "file"
    there.touch()
    given = {
        **{"https://HOST:PORT": "https://host:8000", "NAME": "m", "": str(there)},
        "FILE.py:function": f"{there}:f",
    }
    line = advice("--config", checked, **changes).string
    for key, value in re.findall(r"--config\.([\w.]+)(?:=([^\s,]+))?", line):
        value = given.get(value, str(there))
        if key == "lists":
            value = (value,)
        if key == "accesses":  # of a target that is computed here
            changes = {"accesses": ast.literal_eval(re.search(r"shows less: (\(.*\))", line)[1])}
            continue
        changes = {**changes, key.replace(".", "__"): value}
    checked(**changes)


def test_other_cures_of_a_config():
    """Stages that do without what is lacking; kinds that read a path; whole numbers."""
    path = {"target__path": "README.md"}
    kinds = advice(r"read by target.kind=(.*) alone; set one of them, or leave", checked, **path)
    for kind in re.split(", | and ", kinds[1]):
        arch = {"target__arch": "resnet50"} if kind == "torch" else {}
        checked(**path, **arch, target__kind=kind)
    checked()
    advice("must be a top-1 and a top-5 accuracy in per cent", checked, target__expect=(90.0,))
    for expect in ((90.0, 99.0), ()):
        checked(target__expect=expect)
    advice("epochs 1.5 must be a whole number", checked, pretrain__moco__epochs=1.5)
    checked(pretrain__moco__epochs=2.0)
    for axis in ("seeds", "inits", "selects", "accesses", "uses"):
        advice(f"{axis} is empty; name at least one", checked, **{axis: (), "also": ()})
    alone = {"inits": ("none",), "also": ()}
    names = advice("choose among (.*)", checked, stage="pretrain", **alone)[1].split(", ")
    for name in ("moco", "simsiam", "fastsiam", "emp_ssl", "rotation"):
        assert name in names
        checked(stage="pretrain", inits=(name,), also=())
    plain = from_arrays("own", *unlabelled(DIGITS))
    other = {"target__kind": "callable", "target__path": "own.py:f"}
    stage = advice(
        "--stage=monitor compares .*; --stage=(pretrain) trains the encoders",
        *(checked, plain, "monitor"),
        **other,
    )[1]
    checked(plain, stage)
    nothing = plain._replace(evaluation=DIGITS.evaluation._replace(size=0))
    stage = advice(r"--stage=(\w+) alone does without", checked, nothing, **other)[1]
    checked(nothing, stage, **other)


def test_a_budget_that_is_too_small(tmp_path):
    """Raised to the images that are told; or fewer queries, or seeds."""
    few = {"queries": (20, 50), "fractions": (), "also": (), "seeds": (0, 1)}

    def asks(**changes):
        check_budget(digits(**{**few, **changes}), tmp_path, DIGITS)

    pattern = r"about (\d+) .*raise --config.(budget), or lower --config.(queries) or the number of"
    told = advice(pattern, asks, budget=60, error=BudgetSpent)
    asks(**{told[2]: int(told[1])})
    asks(budget=60, **{told[3]: (20, 25)})
    asks(budget=60, seeds=(0,))


def test_lists_of_images(tmp_path):
    """One for each budget; and selections that look at no image, as listed."""
    names = tuple(f"n/{i}.png" for i in range(9))
    pool = DIGITS.pool._replace(size=9, names=names)
    paths = [str(tmp_path / f"{i}.txt") for i in range(2)]
    for path in paths:
        Path(path).write_text("\n".join(names[:3]))
    advice("there must be one list of as many images", select, "list", pool, 3, 0, tuple(paths))
    Path(paths[1]).write_text("\n".join(names[3:5]))
    for budget in (2, 3):
        assert len(select("list", pool, budget, 0, tuple(paths))) == budget
    for word in ("typiclust", "any"):
        known = advice("choose among (.*)", select, word, DIGITS.pool, 3, 0)[1].split(", ")
        for name in known:
            some = pool if name == "list" else DIGITS.pool
            assert len(select(name, some, 3, 0, tuple(paths))) == 3


def test_words_of_the_command(tmp_path, command):
    """Flags, configs, keys and stages as they are named."""
    words = ["qmx", f"--config={ROOT}/configs/digits.py", f"--workdir={tmp_path}/w"]
    told = advice(r"'(.*)' is no flag; write (--config.)key=value", parse, [*words, "budget=9"])
    assert parse([*words, told[2] + told[1]]).config.budget == 9
    typo = advice("did you mean '(.*)'", parse, [*words, "--config.pretrain.moco.epoch=3"])[1]
    assert parse([*words, f"--config.{typo}=3"]).config.pretrain.moco.epochs == 3
    example = advice("as in python -m qmx.main (.*)", parse, ["qmx"])[1].split()
    assert parse(with_files(["qmx", *example])).workdir.name == "digits"
    for name in advice("qmx's own are (.*)", config_file, "digit")[1].split(", "):
        assert Path(config_file(name)).exists()
    pattern = "is none of (.*)"
    for word in advice(pattern, load_file, "imagenet:any")[1].split(", "):
        load_file(f"imagenet:{word}")
    _, _, err = command(*words[1:], "--stage=any")
    stages = re.search("choose one of (.*)", err)[1].split(", ")
    assert stages == ["all", *STAGES]
    _, _, err = command(*words[1:], "--stage=report")
    assert "needs what earlier stages leave" in err and stages.index("report") == len(stages) - 1


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


@pytest.mark.slow
def test_where_features_are_written(file, tmp_path, capsys):  # noqa: F811
    """Each ending that is named; an encoder that qmx wrote."""
    path, encoder = file
    photos(tmp_path / "photos", 1)
    words = [str(path), str(tmp_path / "photos")]
    assert embed.main([*words, str(tmp_path / "f.txt")]) == 2
    ends = re.search("ends with (.*) in a directory", capsys.readouterr().err)[1].split(", ")
    assert len(ends) == 3
    for end in ends:
        assert embed.main([*words, str(tmp_path / f"f{end}")]) == 0
    save_weights(tmp_path / "bare.safetensors", encoder)
    bare = [str(tmp_path / "bare.safetensors"), words[1], str(tmp_path / "g.npz")]
    assert embed.main(bare) == 2
    assert "give one that qmx wrote" in capsys.readouterr().err
    with pytest.raises(ValueError, match="give one for each"):
        save_encoder(path, "resnet8_narrow", encoder, shape=(16, 16, 3), mean=(0,), std=(1, 1, 1))


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
        flag = re.search(r"run again with fewer (--\w+)", capsys.readouterr().err)[1]
        assert cache.main([*words, f"{flag}=1"]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
