"""Data sets by the names of their sources."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from qmx.augment import IMAGENET_MEAN, IMAGENET_STD
from qmx.data import copies, folder, prepared
from qmx.data.arrays import arrays, digits
from qmx.data.cached import reader
from qmx.data.chosen import leave_out as kept_and_dropped
from qmx.data.classes import number_of
from qmx.data.photos import photo_source
from qmx.data.sources import Dataset, Photos, Source, take
from qmx.progress import say

SOURCES = ("digits", "arrays", "folder", "tfds")


def load(
    source: str = "digits",
    *,
    path: str = "",
    eval_path: str = "",
    leave_out: str = "",
    cache: str = "",
    canvas: int = 256,
    resize: int = 256,
    crop: int = 224,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    limit: int = 0,
) -> Dataset:
    """A data set: a pool, and images to evaluate on.

    Args:
      source: one of `SOURCES`.
      path, eval_path: the pool and the evaluation images: npz files (arrays), class folders or
        folders of photos without labels (folder), the name of a prepared set and of its split
        (tfds). Not for "digits". Without `eval_path`, arrays and folders are a pool alone.
      leave_out: a text file with the names of photos that are not used, one a line, of the pool
        and of the evaluation images alike; see `qmx.data.chosen.leave_out`. "" uses all.
      cache: folder that qmx.data.cache wrote from the pool's photos, "" to decode the files.
      canvas: side of the square that photos are squashed onto for training. Arrays do not use it.
      resize, crop: short side and centre of the pixels that a target gets of a photo.
      mean, std: of each channel in 0..1; () for the source's own.
      limit: number of images to keep, of the pool and of the evaluation each; 0 keeps all.

    Raises:
      ValueError: what is wrong with an argument or a file, in one line.
      MemoryError: there is none for the arrays.
    """
    if source not in SOURCES:
        raise ValueError(f"data.source {source!r} is unknown; choose one of {', '.join(SOURCES)}")
    for key, value in {"cache": cache, "leave_out": leave_out}.items():
        if value and source in ("digits", "arrays"):
            raise ValueError(
                f"data.{key} is not read by data.source={source}, whose images are in memory;"
                f" remove data.{key}"
            )
    if limit < 0:
        raise ValueError(f"data.limit {limit} must be a number of images, or 0 for all")
    if source == "digits" and (path or eval_path):
        raise ValueError(
            "data.path and data.eval_path are not read by data.source=digits; use "
            "data.source=arrays for images of your own"
        )
    if source == "digits":
        data = digits()
    elif source == "arrays":
        try:
            data = arrays(path, eval_path)
        except MemoryError as error:
            raise MemoryError(
                f"{path}: no memory for all of its images{f' ({error})' if str(error) else ''};"
                " lower their number in the file, as data.limit counts after all are read"
            ) from None
    else:
        find = folder.photos if source == "folder" else prepared.photos
        data = photographs(
            *find(path, eval_path),
            leave_out=leave_out,
            cache=cache,
            canvas=canvas,
            resize=resize,
            crop=crop,
        )
    mean = channels("mean", mean, 0.0, data.shape[-1]) or data.mean
    std = channels("std", std, 1e-6, data.shape[-1]) or data.std
    return data._replace(
        mean=mean,
        std=std,
        pool_digest=digest_of(data.pool_digest, limit, mean, std),
        evaluation_digest=digest_of(data.evaluation_digest, limit, mean, std),
        pool=spread(data.pool, limit),
        evaluation=spread(data.evaluation, limit),
    )


def photographs(
    name: str,
    pool: Photos,
    evaluation: Photos,
    *,
    leave_out: str = "",
    cache: str,
    canvas: int,
    resize: int,
    crop: int,
) -> Dataset:
    """A data set of photos; the pool's canvases come from a cache if one is given. See `load`.

    A side's digest is over its listing, the photos that are left out of it, and the sizes. The
    pool's is also over the use of a cache, because a cache's canvases differ from the files' in the
    last bits.

    Raises:
      ValueError: see `load`; an evaluation photo is in the pool too.
    """
    for key, pixels in {"canvas": canvas, "resize": resize, "crop": crop}.items():
        if pixels < 1:
            raise ValueError(f"data.{key} {pixels} is no number of pixels; use 224 or 256")
    sized = partial(photo_source, canvas=canvas, resize=resize, crop=crop)
    (kept, dropped), (eval_kept, eval_dropped) = kept_and_dropped(leave_out, pool, evaluation)
    left_out = (*titles(pool, kept), *titles(evaluation, eval_kept))
    if left_out:
        say(f"{len(left_out):,} photos are left out by data.leave_out")
    if pool.sizes is not None and evaluation.sizes is not None:
        copies.refuse(pool, evaluation, kept, eval_kept)
    if cache:
        in_cache, squashed, broken = reader(cache, pool, canvas)
        places = np.flatnonzero(np.isin(in_cache, kept))  # a photo's place in the cache
        kept = in_cache[places]
        source = sized(pool, squashed=lambda ids: squashed(places[ids]), kept=kept)
        if broken:
            say(
                f"{len(broken):,} of {pool.size:,} images are unreadable and left out:"
                f" {folder.first_few(broken)}"
            )
        dropped = [*broken, *(name for name in dropped if name not in broken)]
    else:
        source = sized(pool, kept=kept if dropped else None)
    class_names = pool.class_names or evaluation.class_names
    classes = len(class_names) or number_of(
        {pool.where: pool.labels, evaluation.where: evaluation.labels}
    )
    return Dataset(
        name,
        source,
        sized(evaluation, kept=eval_kept if eval_dropped else None),
        classes,
        (crop, crop, 3),
        IMAGENET_MEAN,
        IMAGENET_STD,
        digest_of(pool.digest, bool(cache), dropped, canvas, resize, crop),
        digest_of(evaluation.digest, resize, crop, *([eval_dropped] if eval_dropped else ())),
        class_names,
        left_out,
    )


def titles(photos: Photos, kept: np.ndarray) -> list[str]:
    """The photos that are not kept, as messages name them."""
    return [photos.title(i) for i in np.setdiff1d(np.arange(photos.size), kept)]


def channels(name: str, given: Sequence[float], least: float, count: int) -> tuple[float, ...]:
    """A mean or deviation by channels, () if not set; ValueError unless `count` numbers in 0..1."""
    values = tuple(map(float, given))
    if values and (len(values) != count or not all(least <= value <= 1 for value in values)):
        raise ValueError(
            f"data.{name} {values} must be {count} numbers in {least:g} .. 1, one a channel"
        )
    return values


def digest_of(*facts: Any) -> str:
    """SHA-256 of facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def spread(source: Source, limit: int) -> Source:
    """`limit` examples at even distances, so that each class has its share; all if 0."""
    if not 0 < limit < source.size:
        return source
    return take(source, np.arange(limit) * source.size // limit)
