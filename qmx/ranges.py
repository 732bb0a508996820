"""Limits of the values of a config, key by key: one rule for numbers, one for words.

A key is looked up by its whole name first ("target.batch_size"), then by its last part. A test goes
through all keys, so that a new one cannot be forgotten.
"""

import difflib
import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from qmx import board
from qmx.ledger import access
from qmx.ledger.content import DTYPES as LEDGER_DTYPES
from qmx.methods.fixmatch import ALIGNMENTS, RULES
from qmx.models import NETWORKS
from qmx.models.vit import FEATURES, VITS
from qmx.optim import DECAYS, OPTIMIZERS, SCHEDULES
from qmx.settings import base, leaves, public, recipe
from qmx.targets.query import PRECISIONS
from qmx.targets.shown import DTYPES as SHOWN_DTYPES
from qmx.targets.shown import INTERPOLATIONS, LAYOUTS


class Range(NamedTuple):
    """The numbers that a key, or each member of its tuple, may have."""

    low: float
    high: float  # the largest that is no mistake
    above: bool = False  # `low` itself is too low
    below: bool = False  # `high` itself is too high
    why: str = ""


SHARE = Range(0, 1)
PROBABILITY = Range(0, 1, why="a probability")
ABOVE_0 = Range(0, 1e6, above=True)
FROM_0 = Range(0, 1e6)
FROM_1 = Range(1, 1e6)
PIXELS = Range(1, 65536)
SEED = Range(0, 2**32 - 1)  # what numpy's generators take

ADAMW = 0.1  # the largest rate of AdamW that is no mistake
DTYPES = ("float64", "float32", "bfloat16")
KINDS = ("weights", "callable", "table")  # of encoders that stay as they are

RANGES = {
    "seeds": SEED,
    "seed": SEED,
    "rounds": Range(1, 1000, why="without any, nothing is chosen by answers"),
    "budget": Range(1, 2**53, why="leave it out for no limit"),
    "price": Range(0, 1e12, why="what 1,000 calls cost"),
    "reach": Range(0, 1, above=True, why="shares of the target's accuracy"),
    "save_minutes": ABOVE_0,
    "per_second": Range(0, 1e6, why="queries of one principal; 0 is no limit"),
    "per_day": Range(0, 2**53, why="queries of one principal; 0 is no limit"),
    "per_month": Range(0, 2**53, why="queries of one principal; 0 is no limit"),
    "principals": Range(1, 1e9, why="one is the attacker alone"),
    "below": Range(0, 1, above=True, why="a share of accuracy and of agreement"),
    # Of a training.
    "epochs": ABOVE_0,
    "batch_size": Range(2, 1e6, why="two images have batch statistics"),
    "learning_rate": Range(0, 1e20),  # of too large a one the run itself says at which step
    "head_learning_rate": Range(0, 1e20),
    "warmup_epochs": FROM_0,
    "warmup_start": SHARE,
    "milestones": FROM_0,
    "factor": Range(0, 1000),
    "momentum": Range(0, 1, below=True),
    "weight_decay": Range(0, 1000),
    "min_steps": Range(0, 1e9),
    "target_temperature": ABOVE_0,
    "student_temperature": ABOVE_0,
    "layer_decay": Range(0, 1, above=True, why="1 is one rate for all layers"),
    "drop_path": Range(0, 1, below=True, why="a probability; 1 drops everything"),
    # Of the images and their views.
    "limit": Range(0, 1e12),
    "canvas": PIXELS,
    "resize": PIXELS,
    "crop": PIXELS,
    "mean": SHARE,
    "std": Range(1e-6, 1),
    "size": Range(0, 65536, why="0 is the image's own"),
    "crop_ratio": Range(0, 100, above=True, why="width by height"),
    "crop_scale": Range(0, 1, above=True, why="shares of the image's area"),
    "jitter": Range(0, 10),
    "blur_sigma": Range(0, 1000, above=True, why="pixels"),
    "flip_p": PROBABILITY,
    "jitter_p": PROBABILITY,
    "grey_p": PROBABILITY,
    "blur_p": PROBABILITY,
    # Of the target.
    "target.batch_size": FROM_1,
    "scale": FROM_0,
    "target.shown.mean": FROM_0,
    "target.shown.std": ABOVE_0,
    "channels": Range(0, 3, why="1 or 3, or 0 for the images' own"),
    "expect": Range(0, 100, why="a top-1 and a top-5 accuracy in per cent, or ()"),
    "retries": FROM_0,
    "max_refused": SHARE,
    "timeout": ABOVE_0,
    "rate": FROM_0,
    # Of the methods.
    "queue_size": Range(1, 1e9),
    "temperature": ABOVE_0,
    "decay": Range(0, 1, why="0 copies, 1 freezes"),
    "features": Range(1, 65536),
    "group_size": Range(2, 1e6, why="images that share batch statistics"),
    "views": Range(2, 10_000, why="of each image in one step"),
    "similarity": FROM_0,
    "distortion": ABOVE_0,
    "layers": Range(1, 100),
    "hidden": Range(1, 65536),
    "neighbours": FROM_1,
    "power": Range(0, 100, above=True),
    "alpha": Range(0, 1, above=True, below=True),
    "head_power": Range(0, 100, why="0 leaves the head out"),
    "patches": Range(0, 100, why="as the encoder's features have 1"),
    "mu": Range(1, 1000, why="images of the pool for each that was asked about"),
    "threshold": PROBABILITY,
    "guess_temperature": Range(0, 1e6, why="0 learns the class"),
    "guess_decay": Range(0, 1, below=True, why="1 freezes the averages"),
    "weight": FROM_0,
    "fixmatch.decay": Range(0, 1, below=True, why="1 freezes the teacher"),
    "fixmatch.epochs": Range(0, 1e6, why="0 is as many steps as the recipe has"),
    "knn_k": FROM_1,
    "knn_temperature": ABOVE_0,
    # Of recipes.
    "above": SHARE,
    "up_to": Range(0, 1, above=True),
    # Of heads.
    "head.hidden": Range(0, 65536, why="0 is a linear head"),
    "folds": Range(2, 1000, why="parts of the answers"),
    "decays": Range(0, 1e6, why="a decay of the weights"),
    "temperatures": ABOVE_0,
}
# Of an encoder that stays as it is, by any name.
PUBLIC = {"kind": KINDS, "features": FEATURES, "dtype": DTYPES}
WHOLE = ("seeds", "queries")  # tuples of whole numbers
OF_THE_GRID = ("fractions", "queries")  # whose limits are the pool's: qmx/grid.py
ANY_LENGTH = ("milestones", "mean", "std", "expect", "decays", "temperatures")

WORDS = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "weight_decay_on": DECAYS,
    "learn_from": ("scores", "labels"),
    "ledger_dtype": LEDGER_DTYPES,
    "target.kind": ("train", "torch", "onnx", "served", "callable", "recorded"),
    "target.precision": PRECISIONS,
    "target.access": access.ACCESS,
    "layout": LAYOUTS,
    "interpolation": INTERPOLATIONS,
    "target.shown.dtype": SHOWN_DTYPES,
    "student.arch": NETWORKS,
    "student.dtype": DTYPES,
    "pretrain.moco.head": ("mlp", "linear"),
    "rule": RULES,
    "align": ALIGNMENTS,
    **{f"pretrain.public.{key}": words for key, words in PUBLIC.items()},
}


def value_problems(config: Any) -> Iterator[str]:
    """A line for each key whose value cannot be meant, whatever the images are."""
    defaults, known = dict(_defaults()), {key.rpartition(".")[0] for key in _defaults()}
    for name in config.recipes:
        defaults.update(leaves(recipe(inits=("none",)), f"recipes.{name}."))
    named = [f"pretrain.{name}." for name in config.pretrain if f"pretrain.{name}" not in known]
    for group in named:
        defaults.update(leaves(public(), group))
    for key, value in leaves(config):
        default, last = defaults.get(key, value), key.rpartition(".")[2]
        if key.startswith(tuple(named)):
            last = f"pretrain.public.{last}" if last in PUBLIC else last
        allowed = RANGES.get(key, RANGES.get(last))
        if value is None and default is None:
            continue
        if _kind(value) != _kind(default):
            yield f"{key} is {value!r} and must be {_kind(default)}"
        elif words := WORDS.get(key, WORDS.get(last)):
            yield from choice(key, value, words)
        elif _kind(value) == "a tuple" and key not in OF_THE_GRID:
            yield from _tuple_problems(key, tuple(value), tuple(default), allowed)
        elif _kind(value) == "a number" and not (allowed and _meant(value, allowed)):
            whole = "a whole number " if isinstance(value, int) else ""
            yield f"{key} {value!r} must be {whole}{_said(allowed or FROM_0)}"
    if config.tensorboard is True and (lacking := board.problem()):
        yield lacking


@cache
def _defaults() -> dict[str, Any]:
    """Every key with its default, made once: it takes longer than to look at a config."""
    return dict(leaves(base()))


def view_problems(name: str, view: Any, shape: tuple[int, int, int]) -> Iterator[str]:
    """A line for each value of a view that does not fit the others, or images of this shape."""
    for key in ("crop_scale", "crop_ratio", "blur_sigma"):
        low, high = view[key]
        if low > high:
            yield f"{name}.{key} {view[key]} must be the smallest and then the largest"
    if view.jitter[3] > 0.5:
        yield f"{name}.jitter {view.jitter} turns the hue by more than half a turn; use 0.5 or less"
    if not view.size and shape[0] != shape[1]:
        yield (
            f"{name}.size must be given, for the images are not square but {shape[0]} x {shape[1]}"
        )


def size_problems(student: Any, view: Any, shape: tuple[int, int, int]) -> Iterator[str]:
    """A line for each size of a student that its training, or its network, does not have."""
    size, side = student.size, student.size or shape[0]
    if size and view.size != size:
        yield (
            f"student.size {size} needs weak_view.size={size}, on which students train, and not"
            f" {view.size}; strong_view.size is the encoders'"
        )
    square = size or shape[0] == shape[1]
    if student.arch in VITS and (
        side % VITS[student.arch].patch or (view.size or side) != side or not square
    ):
        patch = VITS[student.arch].patch
        near = max(round(side / patch), 1) * patch
        yield (
            f"{student.arch} sees squares of one size, a multiple of its patch of {patch} pixels;"
            f" student.size is {size}, weak_view.size {view.size}, and the images have {shape[0]} x"
            f" {shape[1]}; set student.size={near} and weak_view.size={near}"
        )


def rate_problems(name: str, keys: Any) -> Iterator[str]:
    """A line for each rate of SGD that is given to AdamW, which moves every weight by about its
    rate in one step: 0.1 is five times a weight of a fresh vision transformer."""
    if keys.optimizer == "adamw":
        for key in ("learning_rate", "head_learning_rate"):
            if keys.get(key, 0) > ADAMW:
                yield (
                    f"{name}.{key} {keys[key]} is a rate of SGD, and {name}.optimizer is adamw,"
                    " which moves every weight by about as much in one step; set it to 0.001, for"
                    " instance"
                )


def choice(key: str, value: Any, known: Any) -> Iterator[str]:
    """A problem unless `value` is among the known ones."""
    if value not in known:
        close = difflib.get_close_matches(str(value), known, 1)
        hint = f"did you mean {close[0]!r}" if close else f"choose among {', '.join(known)}"
        yield f"{key} has the unknown value {value!r}; {hint}"


def _kind(value: Any) -> str:
    """The kind of a value, or of the values for which a default of None stands."""
    kinds = {bool: "True or False", str: "a word", tuple: "a tuple", list: "a tuple"}
    return kinds.get(type(value), "a number")


def _meant(value: Any, allowed: Range, whole: bool = False) -> bool:
    return (
        type(value) in ((int,) if whole else (int, float))
        and (isinstance(value, int) or math.isfinite(value))
        and (value > allowed.low if allowed.above else value >= allowed.low)
        and (value < allowed.high if allowed.below else value <= allowed.high)
    )


def _tuple_problems(key: str, value: tuple, default: tuple, allowed: Range | None) -> Iterator[str]:
    last = key.rpartition(".")[2]
    for member in value:
        if not allowed and not isinstance(member, str):
            yield f"{key} has {member!r}; use words in quotes, as in ('random',)"
        if allowed and not _meant(member, allowed, last in WHOLE):
            kind = "whole numbers" if last in WHOLE else "numbers"
            yield f"{key} has {member!r}; use {kind} {_said(allowed)}"
    if allowed and "." in key and len(value) != len(default) and last not in ANY_LENGTH:
        yield f"{key} {value} must hold {len(default)} numbers, as {default} does"


def _said(allowed: Range) -> str:
    low, high = (f"{number:,.16g}" for number in allowed[:2])
    text = f"above {low}" if allowed.above else f"from {low}"
    if allowed.below:
        text += f" and below {high}" if allowed.above else f" on and below {high}"
    else:
        text += f" and at most {high}" if allowed.above else f" to {high}"
    return text + (f" ({allowed.why})" if allowed.why else "")
