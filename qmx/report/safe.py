"""Texts of others, as names of models, classes, files and servers, that do nothing where shown."""

import re
from collections.abc import Callable
from typing import Any

from qmx.terminal import printable

# Everything that begins markup in CommonMark or GitHub's tables; an underscore within a word does
# not.
MARKUP = re.compile(r"([\\`*{}\[\]<>#|&~$!@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
ADDRESS = re.compile(r"(?i)\b(https?|ftp|www)(?=[:.])")  # GitHub makes a link of it


def plain(text: str) -> str:
    """One line without control characters, terminal escapes and marks of direction."""
    return printable(" ".join(text.split()))


def markdown(text: str) -> str:
    """`plain`, and as itself in Markdown: no markup, no cell's end, no link."""
    return ADDRESS.sub(r"\1\\", MARKUP.sub(r"\\\1", plain(text)))


def texts(value: Any, change: Callable[[str], str]) -> Any:
    """JSON with all of its texts changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): texts(inner, change) for key, inner in value.items()}
    return [texts(inner, change) for inner in value] if isinstance(value, list) else value
