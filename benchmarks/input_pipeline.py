"""Speed of the way from photos to training batches, in parts and as a whole, against a step's.

    taskset -c 0 python benchmarks/input_pipeline.py --photos=400
    python benchmarks/input_pipeline.py --photos=2000 --arch=resnet50 --dtype=bfloat16 \\
        --batch=256 --step

It makes photos of ImageNet's usual 500 x 375 pixels and about 110 kB, writes a cache of them as
`python -m qmx.data.cache --processes=1` does, and reads batches in random order:

    write_cache   files to the cache              decode         a JPEG of a record, in one thread
    read_cache    canvases from the cache         to_device      canvases onto the device
    read_files    canvases from the files         views          both of MoCo's views, on the device
    target_input  the target's own input          together       cache to views, as a training reads
    step          the MoCo step on batches that are already there, its views included (with --step)
    training      the same step on batches that come from the cache

The parts take turns. "together" goes through `qmx.data.batches`, which reads ahead while the views
are made. Prints a table and a line of JSON; medians over the repeats.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qmx.data.cached import SIZE
from qmx.settings import base

ROUNDS = 4  # passes of a training in one turn; the read-ahead would hide a shorter one


def make_photos(root: Path, count: int) -> float:
    """Photos of smooth shapes and noise in two classes; returns their mean size in kB."""
    rng = np.random.default_rng(len(root.name))
    for i in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        shapes = colours.resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(shapes, np.float32) + rng.normal(0, 18, (375, 500, 1))
        path = root / f"class{i % 2}" / f"{root.name}{i:05d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return sum(path.stat().st_size for path in root.rglob("*.JPEG")) / count / 1000


def read_alone(root: Path) -> Callable[[np.ndarray], None]:
    """Decode records of the cache by their numbers, in this thread, with nothing around it."""
    from array_record.python.array_record_module import ArrayRecordReader

    shards = [ArrayRecordReader(str(path)) for path in sorted(root.glob("*.array_record"))]
    records = [record for shard in shards for record in shard.read_all()]

    def decode(ids: np.ndarray) -> None:
        for i in ids:
            np.asarray(Image.open(io.BytesIO(records[i][SIZE.size :])).convert("RGB"))

    return decode


def measure(
    *, photos: int, repeats: int, batch: int, size: int, arch: str, dtype: str, step: bool
) -> dict[str, Any]:
    """The rates of all parts, images in a second; see the command's own help for the arguments."""
    import jax
    import jax.numpy as jnp

    from qmx import augment, init_state, make_step, moco, models, optim
    from qmx.data import batches, cache, folder, load
    from qmx.sharding import put_batch, put_state

    batch = min(batch, photos)
    steps = photos // batch
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        mean_kb = make_photos(root / "train", photos)
        make_photos(root / "val", 4)
        paths, made = folder.listing(str(root / "train"))[0], itertools.count()
        cache.write(paths, root / "cache")
        keys = base().data
        keys.update(source="folder", path=str(root / "train"), eval_path=str(root / "val"))
        files = load(**keys).pool
        keys.cache = str(root / "cache")
        cached = load(**keys).pool
        order = np.random.default_rng(0).permutation(photos)[: steps * batch].reshape(steps, batch)
        view = augment.make_view(size)
        views = jax.jit(lambda batch, rng: [view(key, batch) for key in jax.random.split(rng)])
        host, root_key = cached.read(order[0]), put_state(jax.random.key(0))
        there = put_batch(host)

        def write() -> None:
            cache.write(paths, root / f"cache{next(made)}")

        def through(work: Callable[[Any], Any], each: Any = order) -> Callable[[], None]:
            return lambda: jax.block_until_ready([work(one) for one in each][-1])

        def together() -> None:
            for k, one in enumerate(
                batches(cached, batch, steps=steps, seed=next(made), drop_last=True)
            ):
                out = views(one, jax.random.fold_in(root_key, k))
            jax.block_until_ready(out)

        ways: dict[str, Callable[[], None]] = {
            "write_cache": write,
            "decode": through(read_alone(root / "cache")),
            "read_cache": through(cached.read),
            "read_files": through(files.read),
            "target_input": through(files.shown),
            "to_device": through(lambda _: jax.block_until_ready(put_batch(host))),
            "views": through(lambda _: views(there, root_key)),
            "together": together,
        }
        if step:
            net = models.backbone(arch, stats_groups=max(batch // 32, 1), dtype=jnp.dtype(dtype))
            method, tx = (
                moco.make(net, models.moco_head(), view, queue_size=64 * batch),
                optim.sgd(lambda step: 0.03),
            )
            one_step = make_step(method, tx)
            state = put_state(jax.jit(lambda: init_state(method, tx, jax.random.key(0), there))())

            def trained(feed: Callable[[], Any]) -> None:
                nonlocal state
                for one in feed():
                    state, metrics = one_step(state, one, root_key)
                jax.block_until_ready(metrics)

            ways["step"] = lambda: trained(lambda: [there] * (ROUNDS * steps))
            ways["training"] = lambda: trained(
                lambda: batches(
                    cached, batch, steps=ROUNDS * steps, seed=next(made), drop_last=True
                )
            )
        counts = {
            "write_cache": photos,
            "step": ROUNDS * steps * batch,
            "training": ROUNDS * steps * batch,
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeats + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if turn:  # the first compiles
                    rates[name].append(
                        counts.get(name, steps * batch) / (time.perf_counter() - began)
                    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates[name], rates["step"], strict=True))
        for name in ("read_cache", "training")
        if step
    }
    return {
        "cores": cores,
        "mean_kb": mean_kb,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "reading_over_step": ratios.get("read_cache"),
        "training_over_step": ratios.get("training"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="side of the views in pixels")
    parser.add_argument("--step", action="store_true", help="time the step of MoCo, too")
    parser.add_argument("--arch", default="resnet50", help="of the step")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the step"
    )
    given = vars(parser.parse_args())
    from qmx.main import set_xla_flags

    set_xla_flags()
    found = measure(**given)
    print("| | images/s, median |\n|---|---|")
    for name, value in found["images_per_second"].items():
        print(f"| {name} | {value:.0f} |")
    if given["step"]:
        print(
            f"reading the cache gives {found['reading_over_step']:.1f} times what the step"
            f" consumes; a training from it reaches {100 * found['training_over_step']:.0f} % of"
            " the step alone"
        )
    print(json.dumps({"arguments": given, **found}))


if __name__ == "__main__":
    main()
