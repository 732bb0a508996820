"""The data set that a config names."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from qmx.augment import IMAGENET_MEAN, IMAGENET_STD
from qmx.data import folder, prepared
from qmx.data.arrays import arrays, digits
from qmx.data.cached import reader
from qmx.data.photos import Photos, photo_source
from qmx.data.sources import Dataset, Source, take
from qmx.progress import say


def photographs(find: Callable[[Any], tuple[str, Photos, Photos]], keys: Any) -> Dataset:
    """A data set of photos; the pool's canvases come from a cache if one is given.

    A side's digest is over its listing and the sizes. The pool's is also over the use of a cache,
    because a cache's canvases differ from the files' in the last bits.
    """
    for name in ("canvas", "resize", "crop"):
        if getattr(keys, name) < 1:
            raise ValueError(
                f"data.{name} {getattr(keys, name)} is no number of pixels; use 224 or 256"
            )
    name, pool, evaluation = find(keys)
    left_out: list[str] = []
    if keys.cache:
        kept, squashed, left_out = reader(keys.cache, pool, keys.canvas)
        source = photo_source(pool, keys, squashed, kept if left_out else None)
        if left_out:
            say(
                f"{len(left_out):,} of {pool.size:,} images are unreadable and left out:"
                f" {folder.first_few(left_out)}"
            )
    else:
        source = photo_source(pool, keys)
    shown = [keys.resize, keys.crop]
    classes = len(pool.class_names) or int(max(pool.labels.max(), evaluation.labels.max())) + 1
    return Dataset(
        name,
        source,
        photo_source(evaluation, keys),
        classes,
        (keys.crop, keys.crop, 3),
        IMAGENET_MEAN,
        IMAGENET_STD,
        digest_of(pool.digest, bool(keys.cache), left_out, keys.canvas, *shown),
        digest_of(evaluation.digest, *shown),
        pool.class_names,
    )


# data.source -> (data) -> the data set
SOURCES: dict[str, Callable[[Any], Dataset]] = {
    "digits": digits,
    "arrays": arrays,
    "folder": lambda keys: photographs(folder.photos, keys),
    "tfds": lambda keys: photographs(prepared.photos, keys),
}


def channels(keys: Any, name: str, least: float, count: int) -> tuple[float, ...]:
    """data.mean or data.std, () if not set; ValueError unless it is `count` numbers in 0..1."""
    values = tuple(map(float, getattr(keys, name)))
    if values and (len(values) != count or not all(least <= value <= 1 for value in values)):
        raise ValueError(
            f"data.{name} {values} must be {count} numbers in {least:g} .. 1, one a channel"
        )
    return values


def load(keys: Any) -> Dataset:
    """Load the data set that a config names; ValueError says in one line what is wrong with it.

    Args:
      keys: the config's `data`.
        source: one of SOURCES; path, eval_path: its files, folders or names.
        canvas: side of the square that photos are squashed onto for training; resize, crop: short
          side and centre of the pixels that a target gets. Arrays do not use these.
        cache: folder that qmx.data.cache wrote from the pool, "" to decode the files themselves.
        mean, std: of each channel in 0..1; () for the source's own.
        limit: number of images to keep, of the pool and of the evaluation each; 0 keeps all.
    """
    if keys.source not in SOURCES:
        raise ValueError(
            f"data.source {keys.source!r} is unknown; choose one of {', '.join(SOURCES)}"
        )
    if keys.cache and keys.source in ("digits", "arrays"):
        raise ValueError(
            f"data.cache is not read by data.source={keys.source}, whose images are in memory;"
            " leave it out"
        )
    if keys.limit < 0:
        raise ValueError(f"data.limit {keys.limit} must be a number of images, or 0 for all")
    data = SOURCES[keys.source](keys)
    mean = channels(keys, "mean", 0.0, data.shape[-1]) or data.mean
    std = channels(keys, "std", 1e-6, data.shape[-1]) or data.std
    return data._replace(
        mean=mean,
        std=std,
        pool_digest=digest_of(data.pool_digest, keys.limit, mean, std),
        evaluation_digest=digest_of(data.evaluation_digest, keys.limit, mean, std),
        pool=spread(data.pool, keys.limit),
        evaluation=spread(data.evaluation, keys.limit),
    )


def digest_of(*facts: Any) -> str:
    """SHA-256 of facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def spread(source: Source, limit: int) -> Source:
    """`limit` examples at even distances, so that each class has its share; all if 0."""
    if not 0 < limit < source.size:
        return source
    return take(source, np.arange(limit) * source.size // limit)
