"""Advice on configs and on the command line, followed: see test_advice.py."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY
from ml_collections import ConfigDict, FrozenConfigDict
from test_advice import advice
from test_data import load
from test_photos import tree
from test_ranges import LEAVES, SINGLE, TUPLES, config
from test_settings import DIGITS, digits

from qmx.cautions import warnings
from qmx.checks import check_trainers, check_values, validate
from qmx.data.arrays import from_arrays
from qmx.frozen_keys import add_encoder
from qmx.ledger import BudgetSpent
from qmx.main import LESS_MEMORY, parse
from qmx.pipeline import STAGES
from qmx.ranges import OF_THE_GRID, RANGES, WORDS, value_problems
from qmx.selection.select import select
from qmx.settings import recipe
from qmx.shipped import config_file, load_file, with_files
from qmx.stages.query import check_budget
from qmx.stages.run import SMALLER

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
        made = digits(**{key: value}, inits=("none", "simsiam"), also=())
        if "moco" in key:  # what the method itself says
            made = digits(**{key: value}, inits=("moco",), also=(), student__arch="one_block")
            check_trainers(made, DIGITS, "pretrain")
        validate(made, DIGITS)
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


def test_keys_for_less_memory():
    """Each of them exists, and may be as low as can be."""
    texts = [LESS_MEMORY, *SMALLER.values()]
    ours = {key for text in texts for key in re.findall(r"\b[a-z_]+\.[a-z_.]+\w", text)}
    assert len(ours) > 9 and ours <= LEAVES.keys()
    numbers = [key for key in ours if isinstance(LEAVES[key], int)]
    lowest = {key: re.search("from (\\d+)", said({key: -1})[key])[1] for key in numbers}
    assert not said({key: int(number) for key, number in lowest.items()})
    assert not said({"target.precision": "bfloat16", "student.arch": "resnet8_narrow"})


# What a choice needs


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
