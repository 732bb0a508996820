"""Squash the photos of a folder once, so that training decodes small ones.

    python -m qmx.data.cache /imagenet/train /cache/train
    python -m qmx.data.cache --source=tfds imagenet2012 /cache/train
    python -m qmx.data.cache --verify /cache/train

It can be stopped at any time, by any means, and called again: a shard is there whole or not at all.
Photos that cannot be read are named and left out. Give the folder as data.cache.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from qmx.data import folder as folders
from qmx.data import prepared
from qmx.data.cached import MANIFEST, VERSION, verify
from qmx.data.shards import LOCK, finished_shards, save, write_shard
from qmx.data.sources import Photos
from qmx.progress import progress, say


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Refuse to write where another process is writing; the lock ends with the process."""
    with open(out / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{out}: another process is writing to it; wait for it, or stop it"
            ) from None
        yield


def start_worker() -> None:
    """Set up a worker: only the parent stops it, and it ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def leave() -> None:
        wait([parent.sentinel])  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def run_all(tasks: list[tuple], processes: int) -> Iterator[int]:
    """Run `write_shard` for each task, and yield each result as it comes."""
    if min(processes, len(tasks)) <= 1:
        yield from (write_shard(*task) for task in tasks)
        return
    # A fork would copy locks that jax's threads may hold.
    context = multiprocessing.get_context("spawn")
    killed = "a worker was killed, perhaps for memory; run again with fewer --processes"
    with ProcessPoolExecutor(min(processes, len(tasks)), context, start_worker) as pool:
        try:
            try:
                futures = [pool.submit(write_shard, *task) for task in tasks]
            except Exception:  # of many kinds, when a worker dies while the next one starts
                raise ValueError(killed) from None
            for done in as_completed(futures):
                yield done.result()
        except BaseException as error:
            for child in multiprocessing.active_children():
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ValueError(killed) from None
            raise


def write(
    photos: Photos,
    out: Path,
    *,
    side: int = 256,
    quality: int = 90,
    per_shard: int = 5000,
    processes: int = 1,
) -> dict[str, Any]:
    """Write the missing shards of a cache, and return its manifest.

    The files do not depend on `processes`.

    Raises:
      ValueError: see `finished_shards`; another process is writing there; a file is gone.
      OSError: no space, no permission.
    """
    out.mkdir(parents=True, exist_ok=True)
    made_of = {
        "version": VERSION,
        "digest": photos.digest,
        "images": photos.size,
        "side": side,
        "quality": quality,
        "shard": per_shard,
    }
    tasks, missing = [], 0
    with alone(out):
        shards = finished_shards(out, made_of, photos)
        for number, first in enumerate(range(0, photos.size, per_shard)):
            count = min(per_shard, photos.size - first)
            if f"shard-{number:05d}.array_record" not in shards:
                tasks.append(
                    (
                        out,
                        number,
                        made_of,
                        photos.where,
                        photos.read,
                        first,
                        count,
                        photos.names[first : first + count],
                    )
                )
                missing += count
        if shards and tasks:
            say(f"cache: {len(shards)} shards are there, {len(tasks)} are to be written")
        if tasks:
            with progress("cache", missing) as shown:
                done = 0
                shown.update(done)
                for count in run_all(tasks, processes):
                    done += count
                    shown.update(done)
            shards = finished_shards(out, made_of, photos)
        ordered = [shards[name] for name in sorted(shards)]
        manifest = {
            **made_of,
            "count": sum(shard["count"] for shard in ordered),
            "pillow": sorted({shard["pillow"] for shard in ordered}),
            "odd": dict(
                sorted(sum((Counter(shard["odd"]) for shard in ordered), Counter[str]()).items())
            ),
            "broken": [entry for shard in ordered for entry in shard["broken"]],
            "shards": [
                {key: shard[key] for key in ("file", "count", "bytes", "sha256")}
                for shard in ordered
            ],
        }
        save(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def describe(manifest: dict[str, Any], out: Path) -> str:
    """Describe a manifest for the user."""
    lines = [
        f"{out}: {manifest['count']:,} images in {len(manifest['shards'])} shards, "
        f"{sum(shard['bytes'] for shard in manifest['shards']) / 1e9:.3g} GB"
    ]
    lines += [f"  {count:,} {what}" for what, count in manifest["odd"].items()]
    if manifest["broken"]:
        lines.append(f"  {len(manifest['broken']):,} cannot be read and are left out:")
        lines += [f"    {name}: {reason}" for _, name, reason in manifest["broken"]]
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m qmx.data.cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path", nargs="?", help="the pool: a folder of class folders, or the name of a TFDS set"
    )
    parser.add_argument("out", nargs="?", help="the cache")
    parser.add_argument(
        "--source", choices=("folder", "tfds"), default="folder", help="what PATH is"
    )
    parser.add_argument(
        "--side", type=int, default=256, help="of the squashed canvas in pixels (256)"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 95 (90)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(as many as cores)")
    parser.add_argument("--shard", type=int, default=5000, help="images in a shard (5000)")
    parser.add_argument(
        "--verify", metavar="OUT", help="check the digests of a cache, and nothing else"
    )
    keys = parser.parse_args(argv)
    if not keys.verify and not keys.out:
        parser.error("PATH and OUT are needed, or --verify=OUT")
    for name, most in (("side", 4096), ("quality", 95), ("processes", 1024), ("shard", 10**6)):
        if not 1 <= getattr(keys, name) <= most:
            parser.error(f"--{name} {getattr(keys, name)} is outside 1 .. {most}")
    return keys


def main(argv: list[str]) -> int:
    """Run the command; returns 0 if done, 2 for a mistake, 75 if stopped, to be run again."""
    keys = parse(argv)
    # SIGINT too: a shell makes its background jobs ignore it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        if keys.verify:
            print(verify(keys.verify))
            return 0
        out = Path(keys.out)
        if keys.source == "folder":
            if Path(keys.path).resolve() in (out.resolve(), *out.resolve().parents):
                raise ValueError(
                    f"{out} is inside {keys.path}, where it would be taken for a class; write"
                    " elsewhere"
                )
            photos, _ = folders.listing(keys.path)
        else:
            photos = prepared.split_photos(keys.path, "train")
        print(
            describe(
                write(
                    photos,
                    out,
                    side=keys.side,
                    quality=keys.quality,
                    per_shard=keys.shard,
                    processes=keys.processes,
                ),
                out,
            )
        )
    except KeyboardInterrupt:
        print("qmx.data.cache: stopped; the same command goes on from here", file=sys.stderr)
        return 75
    except (ValueError, OSError) as error:
        print(f"qmx.data.cache: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
