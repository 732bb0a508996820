"""What holds of the code itself: its lints, its types, and which way its imports run."""

import ast
import json
import os
import subprocess
import sys

import pytest
from conftest import CONVOLUTIONS, ROOT

# A module may import those of its own level's right side, and nothing to its left.
BELOW = {
    "contract": set(),
    "losses": {"contract"},
    "augment": {"contract"},
    "optim": {"contract"},
    "methods": {"contract", "losses", "optim", "methods"},
    "models": {"contract", "checkpoint", "models"},
    "sharding": {"contract"},
    "data": {"contract", "sharding", "augment", "progress", "data"},
    "train": {"contract"},
    "inference": {"contract", "sharding"},
    "metrics": {"sharding"},
    "diagnostics": set(),
    "selection": {"data", "metrics", "selection"},
    "ledger": {"progress", "ledger"},
    "targets": {"contract", "inference", "checkpoint", "ledger", "targets"},
    "report": {"grid", "workdir", "report"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = node.module == "qmx"
            yield from [f"qmx.{alias.name}" for alias in node.names] if inner else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_run_one_way():
    """The layers of the design; and flax is known in qmx/models alone."""
    for path in (ROOT / "qmx").rglob("*.py"):
        layer = path.relative_to(ROOT / "qmx").parts[0].removesuffix(".py")
        used = list(imports(path))
        if layer != "models":
            assert not [name for name in used if name.split(".")[0] == "flax"], path
        if layer in BELOW:
            ours = {name.split(".")[1] for name in used if name.startswith("qmx.")}
            assert ours <= BELOW[layer], (path, ours - BELOW[layer])


def test_light_import():
    """`import qmx` brings nothing but what jax, flax.linen and optax bring; the command little more
    before it runs."""
    code = (
        "import sys, json, jax, flax.linen, optax; before = set(sys.modules); import {};"
        "print(json.dumps(sorted({{name.split('.')[0] for name in set(sys.modules) - before}})))"
    )
    for module, more in (("qmx", set()), ("qmx.main", {"absl", "ml_collections", "PIL"})):
        out = subprocess.run(
            [sys.executable, "-c", code.format(module)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        found = set(json.loads(out)) - sys.stdlib_module_names - {"qmx", *more}
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
