"""Reader of the folder that `python -m qmx.data.cache` writes.

It is a folder of ArrayRecord shards. A record is the photo's own height and width, two
little-endian uint32, and the JPEG of its canvas. Records have the order of the listing.
`manifest.json` is written last. It holds the facts that the cache was made from, and the names of
the unreadable files, which have no record. ArrayRecord keeps a hash of each chunk, so reading shows
damage.
"""

import hashlib
import json
import shlex
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from qmx.data.photos import decode, in_threads
from qmx.data.sources import Photos

VERSION = 2  # 2: 16 bits are scaled to 8
MANIFEST = "manifest.json"
# The facts of a manifest, and of a shard in it, with their types.
FACTS = {
    "version": int,
    "digest": str,
    "images": int,
    "side": int,
    "quality": int,
    "shard": int,
    "count": int,
    "odd": dict,
    "broken": list,
    "shards": list,
}
SETTINGS = {key: FACTS[key] for key in ("side", "quality", "shard")}  # flags of the command
OF_SHARD = {"file": str, "count": int, "bytes": int, "sha256": str}
SIZE = struct.Struct("<II")  # height, width

Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def command(source: str, folder: str, like: str = "", /, **settings: int) -> str:
    """The command that makes a cache, or writes only what it lacks.

    Args:
      source: `Photos.remake`.
      like: a folder of shards whose settings it takes, by default the cache's own. Without them it
        would refuse the shards that are there.
      settings: other values.
    """
    for beside in sorted(Path(like or folder).glob("shard-*.json")):
        with suppress(OSError, ValueError, RecursionError):  # a damaged one is written again
            facts = json.loads(beside.read_text())
            check_facts(facts, SETTINGS, "it")
            settings = {key: facts[key] for key in SETTINGS} | settings
            break
    flags = "".join(f" --{key}={value}" for key, value in settings.items())
    return f"python -m qmx.data.cache {source} {shlex.quote(folder)}{flags}"


def elsewhere(folder: str, end: int, source: str, **settings: int) -> str:
    """The cure that makes another cache beside one: its command, and the key."""
    other = f"{folder.rstrip('/')}-{end}"
    made_by = command(source, other, folder, **settings)
    return f"run {made_by} and set data.cache={shlex.quote(other)}"


def read_manifest(folder: str, source: str, **settings: int) -> dict[str, Any]:
    """The manifest of a finished cache; if there is none, ValueError says how to make one.

    Args:
      source, settings: see `command`.
    """
    again = partial(command, source, folder, **settings)
    path = Path(folder, MANIFEST)
    try:
        manifest = json.loads(path.read_text())
        if not isinstance(manifest, dict) or not isinstance(manifest.get("version"), int):
            raise ValueError("not a manifest")
        if manifest["version"] != VERSION:
            raise OtherVersion(manifest["version"])
        check_manifest(manifest)
    except FileNotFoundError:
        raise ValueError(f"{folder}: no finished cache in it; run {again()}") from None
    except OtherVersion as other:
        raise ValueError(
            f"{path}: version {other}, and this is {VERSION};"
            f" {elsewhere(folder, VERSION, source, **settings)}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; remove it and run {again()}") from None
    return manifest


class OtherVersion(Exception):
    """A manifest of another version."""


def check_facts(facts: Any, types: dict[str, type], what: str) -> None:
    """Raise ValueError unless `facts` is a dict with values of these types, numbers from 0 on."""
    if not isinstance(facts, dict):
        raise ValueError(f"{what} is not a table of facts")
    for key, kind in types.items():
        if key not in facts:
            raise ValueError(f"no {key} in {what}")
        # True is an int to Python.
        if type(facts[key]) is not kind or (kind is int and facts[key] < 0):
            text = repr(facts[key])
            raise ValueError(f"{key} of {what} is {text[:60]}{'...' if len(text) > 60 else ''}")


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError unless the facts have their types and their numbers agree."""
    check_facts(manifest, FACTS, "it")
    for number, shard in enumerate(manifest["shards"]):
        check_facts(shard, OF_SHARD, f"shard {number}")
        if shard["file"] != f"shard-{number:05d}.array_record":
            raise ValueError(f"file of shard {number} is {shard['file']!r}")
    for entry in manifest["broken"]:
        if (
            not (isinstance(entry, list) and [type(fact) for fact in entry] == [int, str, str])
            or not 0 <= entry[0] < manifest["images"]
        ):
            raise ValueError(f"{str(entry)[:60]!r} is no broken image")
    records = sum(shard["count"] for shard in manifest["shards"])
    broken = len({i for i, _, _ in manifest["broken"]})
    if not records == manifest["count"] == manifest["images"] - broken:
        raise ValueError(
            f"{manifest['images']} images, {broken} broken, count {manifest['count']} and"
            f" {records} records in the shards do not agree"
        )


def missing_or_resized(folder: Path, shards: list[dict[str, Any]]) -> list[str]:
    """The shards that are missing, or whose size has changed."""
    return [
        shard["file"]
        for shard in shards
        if not (folder / shard["file"]).is_file()
        or (folder / shard["file"]).stat().st_size != shard["bytes"]
    ]


def verify(folder: str) -> str:
    """Check the digest of every shard; returns a line for the user, ValueError names damage."""
    manifest = read_manifest(folder, "SOURCE")
    bad = missing_or_resized(Path(folder), manifest["shards"])
    bad += [
        shard["file"]
        for shard in manifest["shards"]
        if shard["file"] not in bad and sha256(Path(folder, shard["file"])) != shard["sha256"]
    ]
    if bad:
        raise ValueError(
            f"{folder}: {len(bad)} of {len(manifest['shards'])} shards are damaged:"
            f" {', '.join(bad)}; remove them and make the cache again, which writes only these"
        )
    return (
        f"{folder}: {manifest['count']:,} images in {len(manifest['shards'])} shards, all as they"
        " were written"
    )


def reader(folder: str, photos: Photos, side: int) -> tuple[np.ndarray, Read, list[str]]:
    """Open a cache of `photos`.

    Args:
      folder: written by qmx.data.cache.
      photos: the photos that it must have been made of.
      side: of the canvases, in pixels.

    Returns:
      kept: i64[m], the photos that have a record.
      read: ids i64[b] in 0..m-1 -> (uint8[b, side, side, 3], f32[b, 2] heights and widths);
        ValueError names a damaged shard.
      left_out: names of the photos without a record.

    Raises:
      ValueError: no finished cache; one of other photos or of another side; a shard that is missing
        or has changed in size.
    """
    manifest = read_manifest(folder, photos.remake, side=side)
    again = partial(command, photos.remake, folder, side=side)
    if (manifest["digest"], manifest["images"]) != (photos.digest, photos.size):
        raise ValueError(
            f"data.cache {folder} was made of other photos than {photos.where}, or these have"
            f" changed since; remove it and run {again()}"
        )
    if manifest["side"] != side:
        raise ValueError(
            f"data.cache {folder} has canvases of {manifest['side']} pixels and data.canvas is"
            f" {side}; use data.canvas={manifest['side']}, or"
            f" {elsewhere(folder, side, photos.remake, side=side)}"
        )
    shards, root = manifest["shards"], Path(folder)
    bad = missing_or_resized(root, shards)
    if bad:
        raise ValueError(
            f"data.cache {folder}: {len(bad)} of {len(shards)} shards are missing or cut off: "
            f"{', '.join(bad[:3])}; run {again()}, which writes only these"
        )
    starts = np.cumsum([0] + [shard["count"] for shard in shards])
    broken = {i for i, _, _ in manifest["broken"]}

    @cache
    def opened(number: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        # Records are read in random order, one at a time, so reading ahead would be wasted.
        shard = ArrayRecordReader(
            str(root / shards[number]["file"]),
            "readahead_buffer_size:0",
            file_reader_buffer_size=32768,
        )
        if shard.num_records() != shards[number]["count"]:
            raise RuntimeError(f"{shard.num_records()} records of {shards[number]['count']}")
        return shard

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, sizes = (
            np.empty((len(ids), side, side, 3), np.uint8),
            np.empty((len(ids), 2), np.float32),
        )

        def one(row: int, i: int) -> None:
            number = int(np.searchsorted(starts, i, side="right")) - 1
            try:
                record = opened(number).read([int(i - starts[number])])[0]
                sizes[row] = SIZE.unpack_from(record)
                images[row] = np.asarray(
                    decode(record[SIZE.size :], f"record {i - starts[number]}")
                )
            except (RuntimeError, ValueError, struct.error) as error:
                raise ValueError(
                    f"{root / shards[number]['file']} is damaged, {' '.join(str(error).split())};"
                    f" remove it and run {again()}, which writes only it"
                ) from None

        in_threads(one, ids)
        return images, sizes

    kept = np.array([i for i in range(manifest["images"]) if i not in broken], np.int64)
    return kept, read, [name for _, name, _ in manifest["broken"]]
