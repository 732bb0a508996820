"""Images that carry a number, and what a target says of them; processes of tests import this in a
fifth of the time of test_ledger.py."""

import numpy as np


def images(*numbers):
    """One image for each number, which it carries in its pixels."""
    out = np.zeros((len(numbers), 4, 4, 1), np.uint8)
    out[:, 0, 0, 0], out[:, 3, 1, 0] = np.divmod(np.array(numbers, int), 256)
    return out


def numbers_of(pixels):
    return (pixels[:, 0, 0, 0].astype(int) * 256 + pixels[:, 3, 1, 0]).tolist()


def logits_of(*numbers):
    """What the target says of images; another vector for each, none of them round in decimal."""
    return np.sin(
        np.array(numbers, np.float32)[:, None] + np.array([1, 20, 300, 4000], np.float32)
    ) * np.float32(7.3)


def refuse(pixels):
    """The query function of what must not be asked."""
    raise AssertionError(f"{len(pixels)} images were sent")
