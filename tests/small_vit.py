"""A vision transformer of two blocks, for grey images of 8 pixels. The processes of tests/forks.py
know it; in a test's own process it is known where the test says so."""

from qmx.models.vit import Arch

NAME = "vit_small_hf"
SMALL = Arch("vit_hf", dim=16, depth=2, heads=2, hidden=32, patch=4)
