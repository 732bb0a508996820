"""Checks of the code itself: its lints, its types, and the direction of its imports."""

import ast
import json
import os
import subprocess
import sys

import pytest
from conftest import CONVOLUTIONS, ROOT

# From the top down: a module imports from its own package and from the lines below it.
LEVELS = (
    ("__main__",),
    ("main",),
    ("pipeline", "keys", "shipped", "embed", "detect"),
    ("stages", "checks", "cautions"),
    ("column_checks",),
    ("report", "training", "trainers", "ranges", "encoders", "whole_statistics"),
    ("settings",),
    ("grid", "networks", "recipes"),
    ("targets",),
    ("ledger", "selection", "methods", "models", "diagnostics", "heads"),
    ("data", "metrics", "detection", "inference", "checkpoint", "workdir"),
    (
        "progress",
        "train",
        "losses",
        "augment",
        "optim",
        "layer_rates",
        "files",
        "operations",
        "board",
    ),
    ("sharding",),
    (
        "contract",
        "terminal",
        "signals",
        "audit_keys",
        "frozen_keys",
        "pool_keys",
        "training_keys",
        "version",
    ),
)
LEVEL = {name: place for place, names in enumerate(LEVELS) for name in names}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def module(path):
    """The name of a file of the package, as it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_run_one_way():
    """The layers of the design; and flax is known in qmx/models alone."""
    for path in (ROOT / "qmx").rglob("*.py"):
        layer = path.relative_to(ROOT / "qmx").parts[0].removesuffix(".py")
        used = list(imports(path))
        if layer != "models":
            assert not [name for name in used if name.split(".")[0] == "flax"], path
        if layer == "__init__":
            continue
        ours = {name.split(".")[1] for name in used if name.startswith("qmx.")}
        ours -= {layer, "__version__"}
        assert all(LEVEL[name] > LEVEL[layer] for name in ours), (path, ours)


def test_no_import_runs_in_a_circle():
    """Not between packages, and not within one."""
    files = {module(path): path for path in (ROOT / "qmx").rglob("*.py")}
    below = {
        name: {used for used in known(imports(path), files) if used != name}
        for name, path in files.items()
    }
    while leaves := [name for name, used in below.items() if not used & below.keys()]:
        for name in leaves:
            del below[name]
    assert not below


def known(names, files):
    """The files that import names mean: a module, or the one that a name is taken from."""
    for name in names:
        yield name if name in files else name.rpartition(".")[0]


def test_light_import():
    """`import qmx` brings nothing but what jax, flax.linen and optax bring; the command little more
    before it runs."""
    code = "import sys, json, jax, flax.linen, optax; before = set(sys.modules)" + "".join(
        f"\nimport {module}"
        "\nprint(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
        for module in ("qmx", "qmx.main")
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    for line, module, more in zip(
        out.splitlines(),
        ("qmx", "qmx.main"),
        (set(), {"absl", "ml_collections", "PIL"}),
        strict=True,
    ):
        found = set(json.loads(line)) - sys.stdlib_module_names - {"qmx", *more}
        assert not {name for name in found if not name.startswith("_")}, module


def test_flags_are_the_programs_own():
    """XLA's flags are set where the program starts: importing changes nothing, the user's word
    stands."""
    code = (
        "import os, qmx; before = os.environ.get('XLA_FLAGS'); from qmx import main;"
        "assert os.environ.get('XLA_FLAGS') == before == {given!r};"
        "main.set_xla_flags(); print(os.environ['XLA_FLAGS'])"
    )
    ours = CONVOLUTIONS
    theirs = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INVALID"
    other = "--xla_force_host_platform_device_count=3"
    for given, want in ((None, ours), (theirs, theirs), (other, f"{other} {ours}")):
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {"XLA_FLAGS": given} if given else {}
        out = subprocess.run(
            [sys.executable, "-c", code.format(given=given)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=environment,
        ).stdout
        assert out.strip() == want


@pytest.mark.parametrize("words", [["check"], ["format", "--check", "-q"]], ids=["lint", "format"])
def test_ruff(words):
    """No lint is left, and every file is formatted."""
    subprocess.run([sys.executable, "-m", "ruff", *words, "."], check=True, cwd=ROOT)


@pytest.mark.slow
def test_mypy():
    """The types hold."""
    subprocess.run([sys.executable, "-m", "mypy"], check=True, cwd=ROOT)
