"""Photos of a set that TFDS has prepared as array_record; read without TensorFlow."""

import hashlib
import json
import logging
import os
from functools import cache, partial
from typing import Any

import numpy as np

from qmx.data.sources import Photos

PREPARE = "pip install tensorflow-datasets tensorflow && tfds build {} --file_format=array_record"


@cache
def builder(name: str) -> Any:
    """TFDS's builder of a set that is prepared on this machine; nothing is ever downloaded.

    Raises:
      ValueError: an unknown name; not prepared, or not as array_record; no image or no label.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.file_adapters import FileFormat

    absl, level = logging.getLogger("absl"), logging.getLogger("absl").level
    # TFDS would warn of a missing folder before our own message.
    absl.setLevel(logging.ERROR)
    try:
        # TFDS itself reads this variable only once, when imported.
        data = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
        ready = data.is_prepared()
    except Exception as error:  # TFDS raises many kinds, some with a list of all its sets
        reason = " ".join((str(error).strip() or repr(error)).splitlines()[0].split())
        raise ValueError(
            f"data.path {name!r} is no set of tensorflow-datasets that can be read: {reason};"
            " set TFDS_DATA_DIR to where it is, if it is prepared"
        ) from None
    finally:
        absl.setLevel(level)
    cure = PREPARE.format(name)
    if not ready:
        raise ValueError(
            f"{name} is not prepared in {data.data_path}; run {cure}, or set TFDS_DATA_DIR to where"
            " it is"
        )
    formats = {data.info.file_format, *(data.info.alternative_file_formats or ())}
    if FileFormat.ARRAY_RECORD not in formats:
        raise ValueError(
            f"{name} in {data.data_path} is kept as {data.info.file_format.value}, which has no"
            f" random access; prepare it again in another TFDS_DATA_DIR with {cure}"
        )
    lacking = [key for key in ("image", "label") if key not in data.info.features]
    if lacking:
        raise ValueError(
            f"{name} has no {lacking[0]!r} among its features, only {', '.join(data.info.features)}"
        )
    return data


@cache
def records(name: str, split: str) -> Any:
    """The examples of a split, images as the files' bytes."""
    import tensorflow_datasets as tfds

    return builder(name).as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def example(name: str, split: str, i: int) -> dict[str, Any]:
    """Example i of a split; ValueError says that it is damaged."""
    try:
        return records(name, split)[i]
    # array_record raises these for bytes that do not match their hash.
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}, {split}, image {i}: {reason}; prepare {name} again") from None


def read_record(name: str, split: str, i: int, _: str) -> bytes:
    """The file of image i."""
    return example(name, split, i)["image"]


def split_photos(name: str, split: str) -> Photos:
    """The photos of a split, with their labels and, if the set has them, their names.

    The digest is over the set's version and the split's number of images, bytes and shards. The
    labels cost one pass over the records without decoding, about 70 us each from memory.
    """
    data, size = builder(name), len(records(name, split))
    labels, names = np.empty(size, np.int32), []
    for i in range(size):
        one = example(name, split, i)
        labels[i] = one["label"]
        if "file_name" in one:
            names.append(bytes(one["file_name"]).decode("utf-8", "replace"))
    if without := int((labels < 0).sum()):
        raise ValueError(
            f"{without} of the {size} images of {name}/{split} have no label; name a split that has"
            " them"
        )
    info, feature = data.info.splits[split], data.info.features["label"]
    listing = [
        data.info.full_name,
        split,
        info.num_examples,
        info.num_bytes,
        list(info.shard_lengths),
    ]
    class_names = tuple(feature.names) if getattr(feature, "num_classes", None) else ()
    return Photos(
        f"{name}/{split}",
        partial(read_record, name, split),
        tuple(names),
        labels,
        class_names,
        hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        f"--source=tfds {name}",
    )


def photos(name: str, eval_split: str) -> tuple[str, Photos, Photos]:
    """(name, pool, evaluation photos) of a prepared set. The pool is its split "train".

    By default the evaluation is "validation", or "test" if there is no "validation".

    Raises:
      ValueError: see `builder`; no such split.
    """
    if not name:
        raise ValueError("data.source=tfds needs the name of a set, data.path=imagenet2012")
    data = builder(name)
    splits = sorted(data.info.splits)
    split = eval_split or ("validation" if "validation" in splits else "test")
    for wanted in ("train", split):
        if wanted not in splits:
            raise ValueError(
                f"{name} has no split {wanted!r}, only {', '.join(splits)}; name the one to"
                " evaluate on with data.eval_path"
            )
    if split == "train":
        raise ValueError("data.eval_path is 'train', which is the pool; evaluate on another split")
    return data.info.name, split_photos(name, "train"), split_photos(name, split)
