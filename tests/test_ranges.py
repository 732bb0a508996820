"""Every value that no key can mean is refused in one line that names the key, before anything."""

import itertools

import pytest
from ml_collections import FrozenConfigDict
from test_settings import DIGITS, digits

from qmx.checks import validate
from qmx.main import MISTAKE, main
from qmx.ranges import ANY_LENGTH, OF_THE_GRID, RANGES, WORDS, value_problems
from qmx.settings import base, leaves, recipe

NAN, INF = float("nan"), float("inf")
NUMBERS = (-1, -1.0, NAN, INF, -INF, 1e300, -1e300, 10**30, 10**400, True, None, "a")


def config(**changes):
    """All keys, with a recipe, so that its keys are there too; dots as double underscores."""
    made = base()
    made.recipes.few = recipe(inits=("moco",))
    made.unlock()
    for key, value in changes.items():
        part, *path = made, *key.split("__")
        for name in path[:-1]:
            part = part[name]
        # As a config file can: an untyped field in the place of the typed one.
        del part[path[-1]]
        part[path[-1]] = value
    return FrozenConfigDict(made)


LEAVES = dict(leaves(config()))
SINGLE = [
    key
    for key, value in LEAVES.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
] + ["budget", "price"]
TUPLES = [key for key, value in LEAVES.items() if isinstance(value, tuple)]


def told(values):
    """The lines about these values of keys, all of them in one config, by the key."""
    problems = list(
        value_problems(config(**{key.replace(".", "__"): values[key] for key in values}))
    )
    found = {}
    for line in problems:
        assert len(line.splitlines()) == 1
        found.setdefault(line.split()[0].rstrip(":"), []).append(line)
    return found


def refused(values):
    """The one line about each of these keys, and there is no other line."""
    lines = told(values)
    assert lines.keys() == values.keys(), "these pass, or nothing was wrong with them"
    assert all(len(line) == 1 for line in lines.values()), lines
    return {key: line for key, (line,) in lines.items()}


def test_the_keys_as_they_are():
    """Nothing is said against the defaults; and each number, and each word of a closed set, has its
    own line in the tables: none falls through to another's."""
    assert not list(value_problems(config()))
    assert len(SINGLE) > 100 and len(TUPLES) > 30
    for key in SINGLE:
        assert key in RANGES or key.rpartition(".")[2] in RANGES, key
    used = {name for key in LEAVES for name in (key, key.rpartition(".")[2])}
    assert {*RANGES, *WORDS, *OF_THE_GRID, *ANY_LENGTH} <= used


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers(value):
    """Of the wrong type, negative, not finite, or beyond all reason."""
    refused({key: value for key in SINGLE if value is not None or LEAVES[key] is not None})


MEMBERS = [key for key in TUPLES if key not in OF_THE_GRID]
LONGEST = max(len(LEAVES[key]) for key in MEMBERS)


@pytest.mark.parametrize("value", NUMBERS)
def test_members_of_tuples(value):
    """A wrong member in the place of each, or in an empty tuple."""
    words = {key for key in MEMBERS if key.rpartition(".")[2] not in RANGES}
    right = words if isinstance(value, str) else set()  # any word may be a member
    for place in range(LONGEST):
        wrong = {}
        for key in set(MEMBERS) - right:
            members = list(LEAVES[key]) or [value]
            members[place % len(members)] = value
            wrong[key] = tuple(members)
        refused(wrong)


def test_no_tuples():
    refused(dict.fromkeys(MEMBERS))


def test_words():
    ours = [key for key in LEAVES if key in WORDS or key.rpartition(".")[2] in WORDS]
    for line in refused(dict.fromkeys(ours, "nonsense")).values():
        assert "unknown value 'nonsense'" in line
    refused(dict.fromkeys(ours))


def test_switches():
    ours = [key for key, value in LEAVES.items() if isinstance(value, bool)]
    refused(dict.fromkeys(ours))
    refused(dict.fromkeys(ours, 1))


# Keys, or last parts of keys, of which 0 is a value that somebody may mean.
ZERO = {
    *("seeds", "seed", "price", "per_second", "per_day", "per_month", "learning_rate"),
    *("head_learning_rate", "warmup_epochs", "warmup_start", "milestones", "factor", "momentum"),
    *("weight_decay", "min_steps", "drop_path", "limit", "mean", "size", "jitter", "flip_p"),
    *("jitter_p", "grey_p", "blur_p", "scale", "channels", "expect", "retries", "max_refused"),
    *("rate", "decay", "similarity", "patches", "threshold", "guess_temperature", "guess_decay"),
    *("head_power", "weight", "fixmatch.epochs", "above", "head.hidden", "decays"),
}


def test_zero():
    """Refused wherever it has no meaning, and nowhere else."""
    numbers = {key for key in SINGLE if key not in OF_THE_GRID}
    meant = {key for key in numbers if {key, key.rpartition(".")[2]} & ZERO}
    assert not told(dict.fromkeys(meant, 0))
    first = {
        key: (0, *LEAVES[key][1:])
        for key in MEMBERS
        if key.rpartition(".")[2] in RANGES and key.rpartition(".")[2] not in ZERO
    }
    refused({**dict.fromkeys(numbers - meant, 0), **first})


@pytest.mark.parametrize("key", OF_THE_GRID)
@pytest.mark.parametrize("value", [*NUMBERS, 0, 0.0])
def test_budgets(key, value):
    """Their limits are the pool's."""
    for members in ((value,), (7, value) if key == "queries" else (0.5, value)):
        with pytest.raises(ValueError, match=f"^{key}[ :]") as caught:
            validate(digits(**{key: members}), DIGITS)
        assert len(str(caught.value).splitlines()) == 1


BAD = itertools.cycle(["nan", "inf", "1e300", "-1e300", "-1", "x", "9" * 30, "None"])
OF_WORDS = [key for key in TUPLES if key.rpartition(".")[2] not in (*RANGES, *OF_THE_GRID)]


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, next(BAD)) for key in SINGLE + TUPLES] + [(key, "'nonsense'") for key in OF_WORDS],
)
def test_the_command(key, value, tmp_path, capsys):
    """Status 2, one line that names the key, no workdir, and the target is asked nothing."""
    if key in TUPLES:
        value = f"({value},)" if value not in ("x", "nan", "inf") else f"('{value}',)"
    if value == "None" and LEAVES.get(key, 0) is None:
        return  # it is what it is
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n\n\ndef f(images):\n"
        "    Path(__file__).with_name('asked').touch()\n    return images[:, :10, 0, 0]\n"
    )
    target = ["--config.target.kind=callable", f"--config.target.path={tmp_path}/own.py:f"]
    if key.startswith("recipes."):
        file = tmp_path / "recipes.py"
        file.write_text(
            "from qmx.settings import base, recipe\n\n\ndef get_config():\n    config = base()\n"
            "    config.recipes.few = recipe(inits=('moco',))\n    return config\n"
        )
    else:
        file = "configs/digits.py:float32"
    words = [f"--config={file}", f"--workdir={tmp_path / 'w'}", *target]
    status = main(["qmx", *words, f"--config.{key}={value}"])
    said = capsys.readouterr()
    assert status == MISTAKE and not said.out
    assert not (tmp_path / "w").exists() and not (tmp_path / "asked").exists()
    (line,) = said.err.splitlines()
    assert line.startswith("qmx: ") and key.rpartition(".")[2] in line, line
