"""Encoders that stay as they are: weights of a network, a Python function, a table of features."""

import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qmx import models, networks
from qmx.checkpoint import file_digest, load_weights, save_weights
from qmx.contract import Encoder, Network, View, variable_shapes
from qmx.data import Dataset, Source
from qmx.data.batches import ahead
from qmx.data.sources import take
from qmx.encoders import read_features
from qmx.files import check_file
from qmx.ledger import pixel_digests
from qmx.models import from_torch
from qmx.models.vit_from_torch import resized
from qmx.progress import say
from qmx.sharding import from_first, put_state
from qmx.stages.run import Run, facts, outputs, plain
from qmx.targets import function

BATCH = 256  # images that a function gets at a time
Rows = Callable[[np.ndarray, Callable[[int], None]], np.ndarray]


def inputs_of(config: Any, init: str, data: Dataset) -> dict:
    """Inputs of the stage that makes an encoder of this kind."""
    keys = config.pretrain[init]
    if keys.kind == "weights":
        file, part = from_torch.split_part(keys.path)
        said = {name: value for name, value in plain(keys).items() if name not in ("path", "watch")}
        made = {"file": file_digest(file), "part": part, "keys": said, "shape": data.shape}
        # What `seen_by` reads of a ResNet, where its own keys say nothing.
        seen = (
            {"mean": data.mean, "std": data.std}
            if not (keys.get("mean") and keys.get("std"))
            else {}
        )
        side = {"size": config.student.size} if config.student.size and not keys.get("size") else {}
        return {**made, **seen, **side}
    return {"kind": keys.kind, "sha256": sha256(config, init), "licence": keys.licence}


def sha256(config: Any, init: str) -> str:
    """Digest of a function or a table; ValueError if there is none."""
    keys, key = config.pretrain[init], f"pretrain.{init}.path"
    if keys.kind == "callable":
        return function.digest(keys.path, keys.watch, key)
    return file_digest(keys.path)


def make(run: Run, init: str, directory: Path) -> dict:
    """Convert weights, or look at a function or a table; returns facts for the report."""
    keys, began = run.config.pretrain[init], time.monotonic()
    result = {"kind": keys.kind, "source": Path(keys.path.rpartition("#")[0] or keys.path).name}
    if keys.kind == "weights":
        made = from_torch.load(keys.path, keys.arch)
        for line in from_torch.dropped_lines(made):
            say(f"{result['source']}: {line}")
        look = seen_by(run.config, init, run.data, made)
        encoder, rule = made.backbone, ""
        if made.arch in models.VITS:
            encoder, rule = resized(made.backbone, models.VITS[made.arch], look["size"])
        said = facts(run, init, arch=made.arch, dtype=keys.dtype, standardize=False, **look)
        digest = save_weights(directory / "encoder.safetensors", encoder, said)
        # The same weights have other features of images that are shown in another way.
        shown = {name: look[name] for name in ("features", "mean", "std", "size")}
        identity = _digest({"weights": digest, "dtype": keys.dtype, **shown})
        result |= {"arch": made.arch, "positions": rule, **look}
        result |= {"sha256": digest, "identity": identity}
    else:
        result |= {"sha256": sha256(run.config, init), "licence": keys.licence}
    say_licence(init, result)
    return {**result, "seconds": time.monotonic() - began}


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def say_licence(init: str, found: dict) -> None:
    """Say under which licence the weights, function or table of an encoder is, by its facts."""
    if found["licence"]:
        say(f"{init}: the licence of {found['source']} is {found['licence']}")
    else:
        say(f"{init}: {found['source']} does not tell its licence; see where it came from")


def seen_by(config: Any, init: str, data: Dataset, made: from_torch.Converted) -> dict[str, Any]:
    """Preparation of a network's images, and its licence: its family's, or as the keys say.

    Raises:
      ValueError: it is not known; or the network was made for other channels.
    """
    keys, is_vit = config.pretrain[init], made.arch in models.VITS
    mean, std = normalisation(config, init, data, made)
    return {
        "features": keys.features if is_vit else "class",
        "mean": mean,
        "std": std,
        "size": keys.size or (224 if is_vit else config.student.size),
        "licence": keys.licence or (models.VITS[made.arch].of.licence if is_vit else ""),
    }


def normalisation(
    config: Any, init: str, data: Dataset, made: from_torch.Converted
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the images that a network was made for: its family's, or as the keys say.

    Raises:
      ValueError: they are not known; or the network was made for other channels.
    """
    keys, key, channels = config.pretrain[init], f"pretrain.{init}", made.channels
    if made.arch in models.VITS:
        family = models.VITS[made.arch].of
        mean, std = family.mean, family.std
    elif channels == data.shape[-1]:
        mean, std = data.mean, data.std
    else:
        mean = std = ()
    mean, std = tuple(keys.get("mean") or mean), tuple(keys.get("std") or std)
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"{key}.mean and .std must be {channels} numbers each for {made.arch}, and are"
            f" {mean} and {std}; of ImageNet they are (0.485,0.456,0.406) and (0.229,0.224,0.225),"
            " as of DINO, iBOT, MAE and torchvision; of timm's own ViTs (0.5,0.5,0.5) and"
            " (0.5,0.5,0.5)"
        )
    if channels != data.shape[-1] and data.shape[-1] != 1:
        raise ValueError(
            f"{key}.path was made for images of {channels} channels, and {data.name} has"
            f" {data.shape[-1]}"
        )
    return mean, std


def check(config: Any, init: str, data: Dataset) -> None:
    """Raise ValueError, with the key, unless an encoder of this kind can be used with `data`."""
    keys = config.pretrain[init]
    if keys.kind == "callable":
        function.load(keys.path, f"pretrain.{init}.path", keys.watch)
        sha256(config, init)
    elif keys.kind == "table":
        read_features(Path(keys.path))
    else:
        made = from_torch.load(keys.path, keys.arch)
        look = seen_by(config, init, data, made)
        if made.arch in models.VITS:
            try:
                resized(made.backbone, models.VITS[made.arch], look["size"])
            except ValueError as error:
                raise ValueError(f"pretrain.{init}: {error}") from None


def network_of(run: Run, path: Path, said: dict[str, Any]) -> tuple[Network, Encoder, View]:
    """The network of a converted encoder, its variables on the devices, and its view."""
    dtype = said["dtype"]
    network = models.backbone(said["arch"], dtype=jnp.dtype(dtype), features=said["features"])
    view = networks.shown_view(tuple(said["mean"]), tuple(said["std"]), said["size"])
    side = said["size"]
    shape = (side, side) if side else tuple(run.data.shape[:2])
    check_file(path)
    like = variable_shapes(network, (*shape, len(said["mean"])))
    return network, put_state(load_weights(path, like)), view


def told_by(
    run: Run,
    made: Callable[[np.ndarray], np.ndarray],
    source: Source,
    ids: np.ndarray,
    name: str,
    shown: Callable[[int], None],
) -> np.ndarray:
    """Rows f32[n, D] that a user's function makes of some images of a source, in the first process;
    `shown` is called with the number done, and `name` is that of the work."""
    parts = []
    for done, images in ahead(source.shown, ids, BATCH):
        run.go_on(name, done - len(images), len(ids))
        parts.append(from_first(partial(made, images)))
        shown(done)
    return np.concatenate(parts)


def rows_of(run: Run, encoder: Any, source: Source, name: str) -> Rows:
    """(ids, progress) -> features of these images of a source by an encoder of any kind."""
    keys, said, key = run.config.pretrain[encoder.init], encoder.facts, encoder.init
    if said["kind"] == "callable":
        made = function.encoder(keys.path, key=f"pretrain.{key}.path", watch=keys.watch)

        return lambda ids, shown: told_by(run, made, source, ids, name, shown)
    if said["kind"] == "table":
        digests, features = read_features(Path(keys.path))
        place = {digest: row for row, digest in enumerate(digests)}

        def by_content(ids: np.ndarray, shown: Callable[[int], None]) -> np.ndarray:
            wanted = pixel_digests(source.shown(ids))
            if missing := [i for i, one in zip(ids, wanted, strict=True) if one not in place]:
                first = source.names[missing[0]] if source.names else f"image {missing[0]}"
                raise ValueError(
                    f"pretrain.{key}.path {keys.path} has no features of {first} and of"
                    f" {len(missing) - 1} of the next {len(ids)} images ({name}); add them"
                )
            return features[[place[one] for one in wanted]]

        return by_content
    network, variables, view = network_of(run, encoder.path, {**said, "dtype": keys.dtype})

    def by_network(ids: np.ndarray, shown: Callable[[int], None]) -> np.ndarray:
        some = take(source, ids)
        return np.asarray(outputs(run, name, network, variables, some, view, shown), np.float32)

    return by_network
