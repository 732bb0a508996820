"""The list of a config's keys: names and defaults as `qmx.settings` makes them, and its comments
as their remarks."""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from qmx import audit_keys, frozen_keys, pool_keys, settings, training_keys

# The settings, and the functions that make parts of them elsewhere.
SOURCES = (audit_keys, frozen_keys, pool_keys, training_keys, settings)


class Key(NamedTuple):
    name: str  # as --config.NAME=VALUE spells it
    default: Any
    remark: str  # "" where the settings say nothing


def keys() -> list[Key]:
    """Every key that a config may change, in the order of the settings."""
    said = remarks("".join(map(inspect.getsource, SOURCES)))
    place = {name: number for number, name in enumerate(said)}
    found = [
        Key(name, value, said.get(name, "")) for name, value in settings.leaves(settings.base())
    ]
    # By the groups that a key is in, from the outermost on; then by its own name.
    return sorted(
        found,
        key=lambda key: [place[name] for name in accumulate(key.name.split("."), "{}.{}".format)],
    )


def listing() -> str:
    """All keys as text, one in a line; a group's own remark stands above its keys."""
    said = remarks("".join(map(inspect.getsource, SOURCES)))
    lines = [
        "# --config.KEY=VALUE changes a key. These are the defaults; a config has its own.",
        "# A config's recipes have the keys of distill, as recipes.NAME.KEY.",
    ]
    heads: list[str] = []
    for key in keys():
        group = key.name.rpartition(".")[0]
        if group and group not in heads:
            heads.append(group)
            lines += ["", f"# {group}" + (f": {said[group]}" if said.get(group) else "")]
        lines.append(line(key))
    return "\n".join(lines)


def most_used(names: tuple[str, ...]) -> str:
    """Some keys as text, one in a line, each with the first sentence of its remark."""
    known = {key.name: key for key in keys()}
    return "\n".join(
        "  " + line(known[name]._replace(remark=re.split(r"[.;] ", known[name].remark)[0]), 26)
        for name in names
    )


def line(key: Key, width: int = 36) -> str:
    """A key with its default as a shell takes it, and its remark behind so many characters."""
    value = key.default if isinstance(key.default, str) else repr(key.default).replace(", ", ",")
    shown = value if re.fullmatch(r"[\w.]+", value) else f'"{value}"'
    setting = f"{key.name}={shown}"
    return f"{setting:{width}}  # {key.remark}" if key.remark else setting


def remarks(source: str) -> dict[str, str]:
    """Remark of each key and group of keys that the source's `base` makes.

    It is the comment at the end of the line or directly above it, of what `base` assigns, of the
    keywords of the calls that make it, or of those of the function of the same source that does.
    """
    lines, comments = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.removeprefix("#").strip()

    def remark(node: Any) -> str:
        words: list[str] = []
        above = node.lineno - 1
        if not lines[above].encode()[: node.col_offset].strip():
            while above in comments and lines[above - 1].lstrip().startswith("#"):
                words.insert(0, comments[above])
                above -= 1
        behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        if re.match(r"[,\s]*#", behind):
            words.append(comments[node.end_lineno])
        return " ".join(words)

    functions = {
        node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
    }
    local: dict[str, ast.expr] = {}

    def parts(value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, ast.Name):
            value = local.get(value.id)
        if not isinstance(value, ast.Call):
            return
        maker = functions.get(getattr(value.func, "id", ""))
        inside: list[Any] = [*(maker.body if maker else ()), *value.args]
        for inner in inside:
            yield from parts(getattr(inner, "value", inner))
        for keyword in value.keywords:
            if keyword.arg is None:
                yield from parts(keyword.value)
            else:
                yield keyword.arg, remark(keyword)

    found: dict[str, str] = {}
    statement: Any
    for statement in functions["base"].body:
        if isinstance(statement, ast.For):  # of all groups below one: keys that each of them has
            above = ast.unparse(statement.iter).removeprefix("config.").removesuffix("values()")
            children = [name for name in found if re.fullmatch(re.escape(above) + r"\w+", name)]
            for inner in (inner for inner in statement.body if isinstance(inner, ast.Assign)):
                name = ast.unparse(inner.targets[0]).partition(".")[2]
                found.update({f"{child}.{name}": remark(inner) for child in children})
        elif isinstance(statement, ast.Assign):
            target, _, name = ast.unparse(statement.targets[0]).partition(".")
            if target != "config":
                local[target] = statement.value
                continue
            found[name] = remark(statement)
            for part, said in parts(statement.value):
                if said or f"{name}.{part}" not in found:
                    found[f"{name}.{part}"] = said
    return found
