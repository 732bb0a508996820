"""README.md and docs/ as tests read them: their blocks, their command lines, their snippets."""

import contextlib
import re
import shlex
from functools import cache

from conftest import ROOT

from qmx.checks import check_values, validate
from qmx.data.arrays import digits
from qmx.main import parse
from qmx.pipeline import STAGES
from qmx.shipped import with_files

images = cache(digits)
# Of one among several processes; a check is of one alone.
OF_PROCESSES = ("--workdir", "--coordinator", "--process")


def blocks(text, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def lines(text):
    """The command lines, one by one; those that go on after a backslash are one."""
    whole = [re.sub(r" \\\n\s*", " ", block) for block in blocks(text, "sh")]
    return [line for block in whole for line in block.splitlines() if line.strip()]


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
    if given.config.data.source == "digits":  # whose images are at hand
        try:
            validate(given.config, images(), given.stage)
        except ValueError as error:
            assert "no such file" in str(error), error  # the reader has it
    # Stops at the first check, after the flags were read: nothing is called nonsense.
    status, _, err = command(*words, "--stage=nonsense")
    assert status == 2 and err.startswith("qmx: --stage=nonsense is unknown"), err


def behind(line, program="qmx.main"):
    """The words of a line that a program is called with."""
    words = shlex.split(line)
    return words[words.index(program) + 1 :]
