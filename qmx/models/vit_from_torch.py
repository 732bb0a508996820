"""Vision transformers in weights files, found and converted as strictly as ResNets are."""

import re
from typing import Any, NamedTuple

import numpy as np

from qmx.contract import Encoder
from qmx.models.check_torch import check, check_values
from qmx.models.positions import resample
from qmx.models.roots import AT, Network, Tables, chosen_one, clean
from qmx.models.vit import FAMILIES, Arch
from qmx.models.vit_layout import DROPPED, nearest, shapes
from qmx.models.vit_names import LAYOUTS

PATCHES = re.compile(
    AT
    + "(?:"
    + "|".join(re.escape(name) for name in {one.patch for one in LAYOUTS})
    + r")\.weight$"
)


# Linear classifiers: timm's, torchvision's, transformers', and those of DINOv2's own repository.
HEADS = ("head", "heads", "classifier", "linear_head")


class Found(NamedTuple):
    """A converted network."""

    arch: str  # one of `VITS`
    params: dict[str, Any]
    head: dict[str, Any] | None  # {"fc": {"kernel", "bias"}}
    features: str  # that the head reads, one of `qmx.models.vit.FEATURES`
    used: int  # number of the file's tensors in it
    dropped: list[str]
    root: str


def transformers(tables: Tables) -> list[Network]:
    """Every vision transformer in a file: the networks whose first layer cuts patches."""
    found = []
    for table, tensors in tables.items():
        cleaned = {clean(name): name for name in tensors}
        for name, at in cleaned.items():
            if (match := PATCHES.match(name)) and tensors[at].ndim == 4:
                root = match[1]
                names = {
                    name.removeprefix(root): at
                    for name, at in cleaned.items()
                    if name.startswith(root)
                }
                found.append(Network(table, root, names))
    return found


def classifier(network: Network, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """{"weight": name, "bias": name} of a network's linear classifier, beside it or its parents; {}
    if there is none that is one layer."""
    cleaned = {clean(name): name for name in tensors}
    parts = network.root.split(".")[:-1]
    for depth in range(len(parts), -1, -1):
        for word in HEADS:
            base = ".".join([*parts[:depth], word]) + "."
            below = {name[len(base) :]: at for name, at in cleaned.items() if name.startswith(base)}
            layer = {name.removeprefix("head."): at for name, at in below.items()}
            if layer.keys() == {"weight", "bias"}:
                return layer
    return {}


def convert(
    tables: Tables,
    networks: list[Network],
    arch: str = "",
    part: str = "",
    *,
    what: str,
    ours: bool = False,
) -> Found:
    """Convert a vision transformer; as `qmx.models.from_torch.convert_tables`, with its errors.

    A classifier as wide as the network reads the class token, and one of twice the width that and
    the mean of the patches, as all do that are known; but for DINOv3, which timm pools.

    Args:
      networks: `transformers(tables)`.
      ours: the file is one of qmx's own.
    """
    network = chosen_one(networks, part, tables, what)
    tensors = tables[network.table]
    have = {name: tuple(tensors[at].shape) for name, at in network.names.items()}
    matches, layout, found = nearest(have)
    if arch and arch not in matches:
        raise ValueError(
            f"{what} holds {' or '.join(matches)} and not {arch}; set arch to {matches[0]}, or give"
            " another file"
        )
    wanted = shapes(found)
    used = {name: network.names.get(name, network.root + name) for name in wanted}
    inside = set(network.names.values())
    dropped = [
        at for name, at in network.names.items() if name not in wanted and DROPPED.match(name)
    ] + [at for at in tensors if at not in inside]
    layer, features = classifier(network, tensors), ""
    if layer and tensors[layer["weight"]].ndim == 2:
        dim = have[f"{layout.patch}.weight"][0]
        entering = tensors[layer["weight"]].shape[1]
        features = {dim: "class", 2 * dim: "both"}.get(entering, "")
        if features == "class" and "dinov3" in matches[0] and not ours:
            features = ""
    layer = layer if features else {}
    check(
        what,
        f"{arch or matches[0]} ({layout.title})",
        {at: value for at, value in tensors.items() if at in inside},
        {used[name]: shape for name, shape in wanted.items()},
        missing=[],
        dropped=set(dropped),  # a classifier too
    )
    dropped = [at for at in dropped if at not in layer.values()]
    params: dict[str, Any] = {}
    for piece in found:
        # DINOv3's file may have anything as the bias of keys, which is multiplied by zero.
        value = piece.make(*(tensors[used[name]] for name in piece.names))
        at = params
        for name in piece.path[:-1]:
            at = at.setdefault(name, {})
        at[piece.path[-1]] = value
    check_values(what, {name: value for name, value in _flat(params).items()})
    head = None
    if layer:
        kernel, bias = tensors[layer["weight"]].T, tensors[layer["bias"]]
        head = {"fc": {"kernel": kernel, "bias": bias}}
        check_values(what, {layer["weight"]: kernel, layer["bias"]: bias})
    others = [other for other in networks if other.table != network.table]
    dropped += [f"{other.table}.{at}" for other in others for at in other.names.values()]
    count = len(wanted) + len(layer)
    return Found(
        arch or matches[0], params, head, features or "class", count, dropped, network.root
    )


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, np.ndarray]:
    result: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        result |= (
            _flat(value, f"{above}{name}/") if isinstance(value, dict) else {above + name: value}
        )
    return result


def seen_through(
    encoder: Encoder, theirs: tuple[tuple, tuple], ours: tuple[tuple, tuple], channels: int
) -> Encoder:
    """The same network for images of another normalisation: its patches' kernel takes it in.

    Args:
      theirs: (mean, std) of each of the channels that the network was made for.
      ours: (mean, std) of each of the images' channels. Grey images are for a network of colours
        what three equal channels would be.
      channels: of the images.
    """
    kernel = np.asarray(encoder.params["patch"], np.float64)
    (mean, std), (our_mean, our_std) = (np.array(pair, np.float64) for pair in (theirs, ours))
    kernel = kernel / std[:, None]
    bias = encoder.params["patch_bias"] + np.einsum("ijcd,c->d", kernel, our_mean - mean)
    kernel = kernel * our_std[:, None]
    if channels == 1:
        kernel = kernel.sum(2, keepdims=True)
    made = {"patch": kernel.astype(np.float32), "patch_bias": bias.astype(np.float32)}
    return Encoder({**encoder.params, **made}, encoder.stats)


def resized(encoder: Encoder, arch: Arch, side: int) -> tuple[Encoder, str]:
    """`at_size`, and how the positions became so, in words."""
    result = at_size(encoder, arch, side)
    if arch.of.rope:
        return result, "rotary"
    same = np.shape(result.params["positions"]) == np.shape(encoder.params["positions"])
    return result, "as in the file" if same else f"resampled by the rule {arch.of.resample!r}"


def at_size(encoder: Encoder, arch: Arch, side: int) -> Encoder:
    """A network for square images of `side` pixels: its positions resampled by its family's rule.

    Raises:
      ValueError: the side is no multiple of the patch.
    """
    if side % arch.patch or side < arch.patch:
        near = max(side // arch.patch, 1) * arch.patch
        raise ValueError(
            f"size {side} is no multiple of the patch of {arch.patch} pixels; {near} and"
            f" {near + arch.patch} are"
        )
    if "positions" not in encoder.params:
        return encoder
    count, rule = side // arch.patch, FAMILIES[arch.family].resample
    table = resample(np.asarray(encoder.params["positions"]), count, count, rule)
    return Encoder({**encoder.params, "positions": table}, encoder.stats)
