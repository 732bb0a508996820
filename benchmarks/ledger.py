"""The ledger with as many answers as ImageNet has images: written, found again, read for training.

    taskset -c 0 python benchmarks/ledger.py

A million images are asked about, of a target whose answers cost nothing, as the pipeline does: in
calls of 4,096 images and requests of 256, each committed to the disk before the next one. Then the
file is opened anew, it is found out which images have no answer (none), and what the account is;
all scores are read into one array, in another order. Takes minutes and some gigabytes in
--directory. Memory is the peak of the whole process less what it had when the reading began. The
share of the processor says how much of the time was ours: the rest was the disk, or others. Prints
a table, then JSON.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qmx.ledger import Ledger, keys_of

CALL = 4096  # images in one call of `ask`, as in qmx/stages/answers.py


def images_of(start: int, stop: int, side: int) -> np.ndarray:
    """Distinct images uint8[n, side, side, 3], each with its number in its pixels."""
    images = np.zeros((stop - start, side * side * 3), np.uint8)
    images[:, :8] = np.arange(start, stop, dtype="<i8")[:, None].view(np.uint8)
    return images.reshape(-1, side, side, 3)


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds that `work` took, and those of them in which this process computed."""
    began, computed = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - computed}


def peak() -> int:
    """The most bytes that this process had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256, help="images in one request")
    parser.add_argument(
        "--side", type=int, default=8, help="of the images; larger ones cost their SHA-256"
    )
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--budget", action="store_true", help="with a budget that is just enough")
    parser.add_argument(
        "--directory", default=None, help="where the file goes; the system's folder for such"
    )
    given = parser.parse_args()
    draw = np.random.default_rng(0)
    answers = (
        draw.normal(size=(2 * given.batch, given.classes)).astype(given.dtype).astype(np.float32)
    )
    keys: list[bytes] = []
    with tempfile.TemporaryDirectory(dir=given.directory) as folder:
        path = Path(folder) / "ledger.sqlite"

        def ledger() -> Ledger:
            return Ledger(
                path, target="t", dtype=given.dtype, budget=given.rows if given.budget else None
            )

        def write() -> None:
            with ledger() as opened:
                for start in range(0, given.rows, CALL):
                    opened.ask(
                        lambda images: answers[len(keys) % given.batch :][: len(images)],
                        images_of(start, min(start + CALL, given.rows), given.side),
                        batch_size=given.batch,
                    )

        def resume() -> None:
            with ledger() as opened:
                assert opened.count_missing_keys(keys) == 0
                assert opened.account().images == given.rows

        def read() -> None:
            with ledger() as opened:
                read = opened.read_keys(keys)
            assert read.shape == (given.rows, given.classes)

        parts = {"write": timed(write)}
        size = path.stat().st_size
        for start in range(0, given.rows, CALL):
            keys += keys_of(
                images_of(start, min(start + CALL, given.rows), given.side), "t", "as-is"
            )
        parts["resume"] = timed(resume)
        keys = [keys[place] for place in draw.permutation(given.rows)]
        before = peak()
        parts["read"] = timed(read)
    scores = given.rows * given.classes * 4
    print("| part | seconds | of them computing | rows/s |\n|---|---|---|---|")
    for part, took in parts.items():
        print(
            f"| {part} | {took['seconds']:.1f} | {took['cpu_seconds']:.1f} |"
            f" {given.rows / took['seconds']:.0f} |"
        )
    print(
        f"file {size / 1e9:.2f} GB; scores as float32 {scores / 1e9:.2f} GB, memory for reading "
        f"{(peak() - before) / 1e9:.2f} GB"
    )
    print(
        json.dumps(
            {
                **vars(given),
                "parts": parts,
                "file_bytes": size,
                "scores_bytes": scores,
                "read_bytes": peak() - before,
                "load": os.getloadavg()[0],
            }
        )
    )


if __name__ == "__main__":
    main()
