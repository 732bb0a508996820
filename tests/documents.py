"""README.md and docs/ as tests read them: their blocks, their command lines, their snippets."""

import contextlib
import re
import shlex

from conftest import ROOT

from qmx.checks import check_values
from qmx.main import parse
from qmx.pipeline import STAGES
from qmx.shipped import with_files

# Of one among several processes; a check is of one alone.
OF_PROCESSES = ("--workdir", "--coordinator", "--process")


def blocks(text, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def lines(text):
    """The command lines, one by one."""
    return [line for block in blocks(text, "sh") for line in block.splitlines() if line.strip()]


def alone(block, name):
    """The names that a block makes out of none."""
    names = {}
    exec(compile(block, name, "exec"), names)  # noqa: S102
    return names


def check(command, words, tmp_path):
    """The words behind `qmx` exist: its flags, its config, the keys and their values."""
    words = [word for word in words if not word.startswith(OF_PROCESSES)]
    words.append(f"--workdir={tmp_path}/w")
    with contextlib.chdir(ROOT):
        given = parse(with_files(["qmx", *words]))
    check_values(given.config)
    assert given.stage in ("all", *STAGES)
    # Stops at the first check, after the flags were read: nothing is called nonsense.
    status, _, err = command(*words, "--stage=nonsense")
    assert status == 2 and err.startswith("qmx: --stage=nonsense is unknown"), err


def behind(line, program="qmx.main"):
    """The words of a line that a program is called with."""
    words = shlex.split(line)
    return words[words.index(program) + 1 :]
