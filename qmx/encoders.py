"""Encoders to take home: a file that says how it is used, and what it makes of images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qmx import models
from qmx.augment import plain_view
from qmx.checkpoint import load_weights, save_weights
from qmx.contract import Encoder, Network, View, chain, check_shapes, variable_shapes
from qmx.files import write_arrays
from qmx.inference import predict
from qmx.ledger import pixel_digests
from qmx.networks import evaluated_in, shown_view
from qmx.version import __version__


class Loaded(NamedTuple):
    """A backbone, or a whole classifier, with all that its use takes."""

    network: Network  # f32[B, H, W, C] -> f32[B, F] features; scores f32[B, N] of a classifier
    variables: Encoder
    view: View  # normalises uint8[B, H, W, C]
    shape: tuple[int, int, int]  # H, W, C of the images
    # What the file says of itself: qmx, method, arch, dtype, shape, mean, std, resize, size,
    # classes, class_names, standardize.
    facts: dict[str, Any]


def save_encoder(
    path: Path | str,
    arch: str,
    encoder: Encoder,
    *,
    shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    classes: int = 0,
    method: str = "",
    features: str = "class",
    standardize: bool = False,
) -> None:
    """Write an encoder, or a whole classifier, as a file for `load_encoder`.

    Args:
      path: to write, .safetensors; an older file is replaced.
      arch: the backbone's name, one of `qmx.models.NETWORKS`.
      encoder: what `Method.encoder` gives; with `classes`, what `Method.network` gives of a
        student whose head is `qmx.models.classifier(classes)`.
      shape: H, W, C of the images.
      mean, std: of each channel in 0..1, by which the images were normalised.
      classes: N of a classifier; 0 for a backbone alone.
      method: how it was trained, for people.
      features: of a vision transformer, as given to `qmx.models.backbone`.
      standardize: of the classifier, as given to `qmx.models.classifier`.

    Raises:
      ValueError: the network is unknown, the variables are another network's, or mean and std do
        not have C numbers.
      OSError: the file cannot be written.
    """
    if not len(mean) == len(std) == shape[2]:
        raise ValueError(
            f"images have {shape[2]} channels, mean {len(mean)} and std {len(std)}; give one for"
            " each"
        )
    more: dict[str, Any] = {"features": features} if features != "class" else {}
    facts = facts_of(
        method=method,
        arch=arch,
        dtype=jnp.result_type(*jax.tree.leaves(encoder)).name,
        shape=shape,
        mean=[*map(float, mean)],
        std=[*map(float, std)],
        classes=classes,
        standardize=standardize,
        **more,
    )
    check_shapes(encoder, variable_shapes(network_of(facts), shape), "the encoder")
    save_weights(Path(path), encoder, facts)


def facts_of(
    *,
    method: str,
    arch: str,
    dtype: str,
    shape: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    resize: int = 0,
    size: int = 0,
    classes: int = 0,
    class_names: Sequence[str] = (),
    standardize: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Metadata of a file of weights: all that `load_encoder` reads, and `more`."""
    return {
        "qmx": __version__,
        "method": method,
        "arch": arch,
        "dtype": dtype,
        "shape": shape,
        "mean": mean,
        "std": std,
        "resize": resize,
        "size": size,
        "classes": classes,
        "class_names": class_names,
        "standardize": standardize,
        **more,
    }


def network_of(facts: dict[str, Any]) -> Network:
    """The network that a file is of, by its `facts`; ValueError if its name is unknown."""
    dtype = jnp.dtype(evaluated_in(facts["dtype"]))
    network = models.backbone(facts["arch"], dtype=dtype, features=facts.get("features", "class"))
    if not facts["classes"]:
        return network
    head = models.classifier(facts["classes"], standardize=facts["standardize"])
    return chain(backbone=network, head=head)


def load_encoder(path: Path | str) -> Loaded:
    """An encoder, a target or a student from a file that qmx wrote; nothing in it is executed.

    Args:
      path: as WORKDIR/pretrain/<init>-seed<s>/encoder.safetensors.

    Raises:
      ValueError: it is no safetensors file, or says nothing of its network; a variable is missing,
        left over, or of another shape.
    """
    facts = read_facts(Path(path))
    if "head" in facts:
        raise ValueError(
            f"{path} is a head on features of the encoder {facts['method']}, and no network of"
            " images; qmx.heads.scores takes it"
        )
    network = network_of(facts)
    shape = tuple(facts["shape"])
    view = plain_view(facts["mean"], facts["std"], facts["size"])
    side, channels = facts["size"], shape[2]
    if "features" in facts:  # of others, who may have trained on other images
        view = shown_view(tuple(facts["mean"]), tuple(facts["std"]), facts["size"])
        channels = len(facts["mean"])
    like = (*((side, side) if side else shape[:2]), channels)
    variables = load_weights(Path(path), variable_shapes(network, like))
    return Loaded(network, variables, view, shape, facts)


def read_facts(path: Path) -> dict[str, Any]:
    """The `facts` of `qmx.checkpoint.save_weights` in a file; ValueError if it has none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {}).get("qmx", "null"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged ({error})") from None
    if not isinstance(facts, dict):
        raise ValueError(
            f"{path} does not say what network it is of; give one that qmx wrote, as"
            " WORKDIR/pretrain/moco-seed0/encoder.safetensors (of converted weights,"
            " qmx.save_encoder does)"
        )
    return facts


def encode(encoder: Loaded, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Outputs of an encoder for images, uint8[n, H, W, C] -> f32[n, F], on all devices.

    Raises:
      ValueError: the images are not uint8, or of another shape.
    """
    if images.dtype != np.uint8 or images.shape[1:] != encoder.shape:
        raise ValueError(
            f"images are {images.dtype}{list(images.shape)}; this encoder takes"
            f" uint8[n, {', '.join(map(str, encoder.shape))}]"
        )
    return predict(encoder.network, *encoder.variables, encoder.view, images, batch_size)


def save_features(path: Path | str, images: np.ndarray, features: np.ndarray) -> None:
    """Write a table of features, which `pretrain.NAME.kind=table` reads.

    Args:
      path: to write, .npz.
      images: uint8[n, H, W, C], as the pipeline shows them; of equal ones the first counts.
      features: f32[n, D].

    Raises:
      ValueError: the images are not uint8, or there are more or fewer features.
    """
    if len(images) != len(features):
        raise ValueError(f"there are {len(images)} images and {len(features)} features")
    rows = {digest: row for row, digest in reversed([*enumerate(pixel_digests(images))])}
    image = np.stack([np.frombuffer(digest, np.uint8) for digest in rows])
    write_arrays(Path(path), image=image, features=features[[*rows.values()]])


def read_features(path: Path) -> tuple[list[bytes], np.ndarray]:
    """(SHA-256 of the images, features f32[n, D]) of an .npz; nothing in it is executed.

    Raises:
      ValueError: it is not such a table.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            image, rows = file["image"], file["features"]
    except Exception as error:  # of many kinds for damaged files
        raise ValueError(
            f"{path} cannot be read as an .npz of image and features: {error}"
        ) from None
    if (
        (image.dtype, image.shape[1:]) != (np.uint8, (32,))
        or rows.dtype not in (np.float32, np.float16)
        or rows.ndim != 2
        or len(rows) != len(image)
        or not np.isfinite(rows).all()
    ):
        raise ValueError(
            f"{path} has image {image.dtype}{list(image.shape)} and features"
            f" {rows.dtype}{list(rows.shape)}; they must be uint8[n, 32], SHA-256 digests, and"
            " finite float32 or float16 [n, D]"
        )
    return [row.tobytes() for row in image], rows.astype(np.float32)
