"""Advice of configs, stages and reports, followed: see test_advice.py."""

import ast
import re

import numpy as np
import pytest
from conftest import TINY
from ml_collections import ConfigDict, FrozenConfigDict
from test_advice import advice
from test_ranges import LEAVES, SINGLE, TUPLES, config
from test_settings import DIGITS, digits

from qmx.cautions import warnings
from qmx.checks import check_trainers, check_values, validate
from qmx.data.arrays import from_arrays
from qmx.frozen_keys import add_encoder
from qmx.main import parse
from qmx.ranges import OF_THE_GRID, RANGES, WORDS, value_problems
from qmx.settings import recipe

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
    for level in advice(
        "lower accesses",
        checked,
        target__kind="callable",
        target__path="a.py:f",
        target__access="probs",
    ).string.split("'")[1:2]:
        assert level == "logits"


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
