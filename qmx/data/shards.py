"""Shards of a cache: writing one, and the JSON beside each whole one."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL
from PIL import Image

from qmx.data.cached import MANIFEST, OF_SHARD, SIZE, check_facts, missing_or_resized, sha256
from qmx.data.photos import canvas, decode, oddities
from qmx.data.sources import Photos, title

# Full colour resolution, because views exaggerate colour. It takes a quarter more bytes than 4:2:0;
# the error is 2 dB lower (39.2 against 37.1 on 126 ImageNet photos at quality 90).
SUBSAMPLING = "4:4:4"
LOCK = "writing.lock"
BESIDE = OF_SHARD | {"broken": list, "odd": dict, "pillow": str}  # facts in the JSON of a shard


def save(path: Path, text: str) -> None:
    """Write a file so that it is whole, and on the disk, before it gets its name."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    settle(part, path)


def settle(part: Path, path: Path) -> None:
    """Give a finished file its name; both survive a power cut."""
    for target in (part, path.parent):
        number = os.open(target, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
        if target == part:
            part.replace(path)


def write_shard(
    out: Path,
    number: int,
    made_of: dict[str, Any],
    where: str,
    read: Callable[[int, str], bytes],
    first: int,
    count: int,
    names: tuple[str, ...],
) -> int:
    """Write one shard, and then the JSON beside it that marks it as whole; returns `count`.

    Args:
      made_of: the facts that all shards of a cache must share.
      where, read: see `Photos`.
      first, count, names: the photos.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = out / f"shard-{number:05d}.array_record"
    part = path.with_name(path.name + ".part")
    broken, odd = [], Counter[str]()
    try:
        # A group is read as a whole, so it holds one photo. JPEG does not compress any further.
        writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
        for i in range(first, first + count):
            name = names[i - first] if names else ""
            data, called = read(i, name), title(where, i, name)
            try:
                image = decode(data, called)
                odd.update(oddities(data, called))
            except ValueError as error:
                broken.append((i, name or called, str(error).removeprefix(f"{called}: ")))
                continue
            pixels, size = canvas(image, made_of["side"])
            jpeg = io.BytesIO()
            Image.fromarray(pixels).save(
                jpeg, "JPEG", quality=made_of["quality"], subsampling=SUBSAMPLING
            )
            writer.write(SIZE.pack(*size) + jpeg.getvalue())
        writer.close()
        beside = {
            "file": path.name,
            "count": count - len(broken),
            "bytes": part.stat().st_size,
            "sha256": sha256(part),
            "broken": broken,
            "odd": dict(sorted(odd.items())),
            "pillow": PIL.__version__,
            **made_of,
        }
        settle(part, path)
        save(path.with_suffix(".json"), json.dumps(beside) + "\n")
    except RuntimeError as error:  # array_record raises it for a full disk, and for anything else
        raise OSError(f"{part}: {' '.join(str(error).split())}") from None
    finally:
        part.unlink(missing_ok=True)
    return count


def finished_shards(
    out: Path, made_of: dict[str, Any], photos: Photos
) -> dict[str, dict[str, Any]]:
    """The JSON beside each whole shard, by file name.

    Raises:
      ValueError: the folder holds other files, or a cache of other photos or settings.
    """
    shards = {}
    for beside in sorted(out.glob("shard-*.json")):
        try:
            shard = json.loads(beside.read_text())
            check_facts(shard, BESIDE | {key: type(fact) for key, fact in made_of.items()}, "it")
            if shard["file"] != beside.with_suffix(".array_record").name:
                continue
        except (ValueError, RecursionError):  # damaged; the shard is written again
            continue
        for key, value in made_of.items():
            if shard.get(key) == value:
                continue
            if key in ("digest", "images"):
                raise ValueError(
                    f"{out} holds a cache of other photos than {photos.where}, or these have"
                    " changed since; remove it, or write to another folder"
                )
            cure = "write to another folder" if key == "version" else f"give --{key}={shard[key]}"
            raise ValueError(
                f"{out} holds shards of {key} {shard[key]}, and this is {value}; remove it, or"
                f" {cure}"
            )
        shards[shard["file"]] = shard
    strangers = sorted(
        path.name for path in out.iterdir() if not path.name.startswith(("shard-", MANIFEST, LOCK))
    )
    if strangers:
        raise ValueError(f"{out} holds other files, such as {strangers[0]}; name a new folder")
    for file in missing_or_resized(out, list(shards.values())):
        del shards[file]
    return shards
