"""A network of one residual block, which compiles and steps in a fraction of the time that the
smallest of qmx's own takes. The runs of most tests train it.

    python tests/one_block.py WORDS    # `qmx WORDS`, which knows it
"""

from qmx.models.resnet import ARCHS, Arch

NAME = "one_block"
ARCHS[NAME] = Arch((1,), bottleneck=False, width=8, stem="small")

if __name__ == "__main__":
    from qmx.__main__ import run

    run()
