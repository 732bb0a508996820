"""Refusals of columns: levels of access, controls, and encoders that learn from others."""

from collections.abc import Iterator
from typing import Any

from qmx.data import Dataset
from qmx.grid import TRUE_LABELS, Column, columns, frozen, teacher
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
