"""Orders of the pool's images for nested subsets of a given share, and published lists."""

import math
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np


def subset_size(fraction: float, size: int) -> int:
    """int(fraction * size), in decimal: 0.29 of 100 is 29; with binary floats it would be 28.

    Raises:
      ValueError: a fraction outside (0, 1], or one that leaves no image.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} is outside (0, 1]; 0.01 is one image in a hundred")
    count = int(Decimal(repr(float(fraction))) * size)
    if count == 0:
        digits = 10 ** (1 - math.floor(math.log10(1 / size)))
        least = math.ceil(digits / size) / digits  # rounded up, to two digits
        raise ValueError(f"fraction {fraction} of {size} images is none; use at least {least:g}")
    return count


def random_order(size: int, seed: int) -> np.ndarray:
    """A seeded order, i64[size]. Its start is the subset of any share: the 10 % holds the 1 %."""
    return np.random.default_rng(seed).permutation(size)


def class_balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A seeded order of the images, i64[n], with the same number of each class in every prefix.

    The numbers differ by at most one, as long as no class is used up. Each round has the classes in
    a new random order, so a prefix that ends within a round favours no class.

    Args:
      labels: i32[n].
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = np.asarray(labels)[order]
    return order[np.argsort(rank_within(shuffled), kind="stable")]


def rank_within(groups: np.ndarray) -> np.ndarray:
    """Number of entries of its own group before each entry; i[n] -> i64[n]."""
    by_group = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[by_group], groups[by_group])  # start of each entry's group
    rank = np.empty(len(groups), np.int64)
    rank[by_group] = np.arange(len(groups)) - starts
    return rank


def predecessor_order(size: int) -> np.ndarray:
    """The order of numpy.random.seed(1234) and numpy.random.shuffle, i64[size], for every run.

    It shuffles the list of all images. The ImageNet table that configs/imagenet.py repeats used the
    first int(f * size) images. Source: alright-code/model-extraction-self-supervision,
    src/dataset.py.
    """
    order = np.arange(size)
    # NumPy keeps the stream of RandomState the same for ever, but not that of default_rng.
    np.random.RandomState(1234).shuffle(order)
    return order


def from_list(path: str, names: Sequence[str]) -> np.ndarray:
    """The images that a text file names, one a line, in its order, i64[m].

    Names are file names, with or without folders, as in the published 1 % and 10 % of ImageNet
    (google-research/simclr, imagenet_subsets).

    Args:
      names: of all images, see `Source.names`.

    Raises:
      ValueError: the source has no names; the file is missing or empty; a name fits no image or
        several images, or comes twice.
    """
    if not names:
        raise ValueError(
            f"{path}: these images have no names to choose by; use another selection, or "
            "data.source=folder"
        )
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}"
        ) from None
    if not lines:
        raise ValueError(f"{path}: no names in it; write one a line")
    by_file: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        by_file.setdefault(name.rpartition("/")[2], []).append(i)
    # Two names are the same, or one is the end of the other without some folders.
    found = [
        [
            i
            for i in by_file.get(line.rpartition("/")[2], ())
            if line == names[i] or line.endswith("/" + names[i]) or names[i].endswith("/" + line)
        ]
        for line in lines
    ]
    ids = [i for few in found for i in few]
    problems = {
        "are of no image": [line for line, few in zip(lines, found, strict=True) if not few],
        "are of several images each": [
            line for line, few in zip(lines, found, strict=True) if len(few) > 1
        ],
        "come more than once": sorted({names[i] for i, times in Counter(ids).items() if times > 1}),
    }
    for problem, those in problems.items():
        if those:
            raise ValueError(
                f"{path}: {len(those)} of {len(lines)} names {problem}: {', '.join(those[:3])}"
            )
    return np.array(ids, np.int64)
