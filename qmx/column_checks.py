"""Refusals of columns: levels of access, controls, heads, and encoders that learn from others."""

from collections.abc import Iterator
from typing import Any

from qmx.data import Dataset
from qmx.grid import (
    HEADS,
    TRUE_LABELS,
    Cell,
    Column,
    columns,
    frozen,
    recipe_name,
    recipe_of,
    teacher,
)
from qmx.ledger import access
from qmx.ranges import choice


def access_problems(config: Any, data: Dataset, shown: list[Column]) -> Iterator[str]:
    """A line for each level that nothing can be read at, and for controls without labels."""
    levels = list(dict.fromkeys([*config.accesses, *(column.access for column in shown)]))
    for level in levels:
        if level == TRUE_LABELS:
            if not data.pool.labelled:
                yield (
                    f"accesses has {level!r}, which reads labels, and the pool {data.name} has"
                    " none; leave it out"
                )
        elif not access.known(level):
            yield from choice("accesses", level, [*access.names(), TRUE_LABELS])
        elif not access.derivable(config.target.access, level):
            yield (
                f"accesses has {level!r}, and a target of target.access={config.target.access}"
                " shows no more than that; lower accesses"
            )


def teacher_problems(config: Any) -> Iterator[str]:
    """A line for each encoder that is to learn the features of one that cannot teach."""
    for init in dict.fromkeys(column.init for column in columns(config)):
        of = teacher(config, init)
        if of and not frozen(config, of):
            known = [name for name in config.pretrain if frozen(config, name)]
            yield from choice(f"pretrain.{init}.of", of, known)


def head_problems(config: Any, shown: list[Column], runs: list[Cell]) -> Iterator[str]:
    """A line for each head that would not learn what its column says."""
    for init in dict.fromkeys(c.init for c in shown if c.use in HEADS.values()):
        if of := teacher(config, init):
            yield (
                f"the grid has heads on {init}, which learns the features of {of} and has them from"
                f" there; name {of} for heads, and 'asked' or 'pool' as a use of {init}"
            )
    heads = [cell for cell in runs if cell.use in HEADS.values()]
    for name, keys in recipes_of(config, heads).items():
        if keys.learn_from == "labels":
            yield (
                f"{name}.learn_from 'labels' is for students that are no heads; a head on labels is"
                f" the control: set it to 'scores', and add {TRUE_LABELS!r} to accesses"
            )


def recipes_of(config: Any, runs: list[Cell]) -> dict[str, Any]:
    """Every recipe of some runs, under the key that it stands at."""
    return {
        f"recipes.{name}" if name else "distill": recipe_of(config, cell)
        for cell in runs
        for name in [recipe_name(config, cell)]
    }
