"""Encoders to take home: a file that says how it is used, and what it makes of images."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qmx import models
from qmx.augment import plain_view
from qmx.checkpoint import load_weights
from qmx.contract import Encoder, Network, View, chain, variable_shapes
from qmx.inference import predict
from qmx.networks import evaluated_in


class Loaded(NamedTuple):
    """A backbone, or a whole classifier, with all that its use takes."""

    network: Network  # f32[B, H, W, C] -> f32[B, F] features; scores f32[B, N] of a classifier
    variables: Encoder
    view: View  # normalises uint8[B, H, W, C]
    shape: tuple[int, int, int]  # H, W, C of the images
    # What the file says of itself: qmx, method, arch, dtype, shape, mean, std, resize, size,
    # classes, class_names, standardize.
    facts: dict[str, Any]


def load_encoder(path: Path | str) -> Loaded:
    """An encoder, a target or a student from a file that qmx wrote; nothing in it is executed.

    Args:
      path: as WORKDIR/pretrain/<init>-seed<s>/encoder.safetensors.

    Raises:
      ValueError: it is no safetensors file, or says nothing of its network; a variable is missing,
        left over, or of another shape.
    """
    facts = read_facts(Path(path))
    dtype = jnp.dtype(evaluated_in(facts["dtype"]))
    network = models.backbone(facts["arch"], dtype=dtype)
    if facts["classes"]:
        head = models.classifier(facts["classes"], standardize=facts["standardize"])
        network = chain(backbone=network, head=head)
    shape = tuple(facts["shape"])
    variables = load_weights(Path(path), variable_shapes(network, shape))
    view = plain_view(facts["mean"], facts["std"], facts["size"])
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
            " WORKDIR/pretrain/moco-seed0/encoder.safetensors"
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
