"""A network of one residual block, which compiles and steps in a fraction of the time that the
smallest of qmx's own takes. The runs of most tests train it.

    python tests/one_block.py WORDS                       # `qmx WORDS`, which knows it
    python tests/one_block.py benchmarks/FILE.py WORDS    # the benchmark, which knows it
    qmx --config=tests/one_block.py                       # configs/digits.py:float32 with it
"""

import runpy
import sys
from pathlib import Path

from qmx.models.resnet import ARCHS, Arch

NAME = "one_block"
ARCHS[NAME] = Arch((1,), bottleneck=False, width=8, stem="small")


def get_config(words=""):
    digits = runpy.run_path(str(Path(__file__).parent.parent / "configs/digits.py"))
    config = digits["get_config"]("float32")
    config.student.arch = config.target.arch = NAME
    return config


def run():
    """Run the script that the command line begins with, or `qmx`; ends the process."""
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first.endswith(".py") and not first.startswith("-"):  # as in --config=FILE.py
        sys.argv.pop(0)
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    from qmx.__main__ import run as command

    command()


if __name__ == "__main__":
    run()
