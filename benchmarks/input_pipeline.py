"""How fast photos become training batches on one core: writing the cache, reading it back, and doing without.

    taskset -c 0 python benchmarks/input_pipeline.py --photos=400

It makes photos of ImageNet's usual 500 x 375 pixels and about 110 kB, writes a cache of them as
`python -m qmx.data.cache --processes=1` does, and reads batches of 256 in random order: canvases
from the cache and from the files, and the target's own input. Prints a table and a line of JSON;
medians over the repeats.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from qmx.data import cache, folder, load
from qmx.settings import base


def make_photos(root: Path, count: int) -> float:
    """Photos of smooth shapes and noise in two classes; returns their mean size in kB."""
    rng = np.random.default_rng(0)
    for i in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        shapes = colours.resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(shapes, np.float32) + rng.normal(0, 18, (375, 500, 1))
        path = root / f"class{i % 2}" / f"{root.name}{i:05d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return sum(path.stat().st_size for path in root.rglob("*.JPEG")) / count / 1000


def rate(work: Callable[[], int], repeats: int) -> float:
    """Images per second of `work`, which returns how many it did: the median."""
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - began))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        size = make_photos(root / "train", given.photos)
        make_photos(root / "val", 4)
        photos, made = folder.listing(str(root / "train"))[0], itertools.count()

        def write() -> int:
            cache.write(photos, root / f"cache{next(made)}")
            return given.photos

        rates = {"write_cache": rate(write, given.repeats)}
        keys = base().data
        keys.update(source="folder", path=str(root / "train"), eval_path=str(root / "val"))
        files = load(keys).pool
        keys.cache = str(root / "cache0")
        cached = load(keys).pool
        order = np.random.default_rng(0).permutation(given.photos)

        def through(read: Callable) -> Callable[[], int]:
            def work() -> int:
                for first in range(0, given.photos, 256):
                    read(order[first : first + 256])
                return given.photos
            return work

        rates["read_cache"] = rate(through(cached.read), given.repeats)
        rates["read_files"] = rate(through(files.read), given.repeats)
        rates["target_input"] = rate(through(files.shown), given.repeats)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for name, value in rates.items():
        print(f"{name:14} {value:8.0f} images/s")
    print(json.dumps({"cores": cores, "photos": given.photos, "mean_kb": size, "images_per_second": rates}))


if __name__ == "__main__":
    main()
