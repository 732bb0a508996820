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


class Found(NamedTuple):
    """A converted network."""

    arch: str  # one of `VITS`
    params: dict[str, Any]
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


def convert(
    tables: Tables, networks: list[Network], arch: str = "", part: str = "", *, what: str
) -> Found:
    """Convert a vision transformer; as `qmx.models.from_torch.convert_tables`, with its errors.

    Args:
      networks: `transformers(tables)`.
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
    check(
        what,
        f"{arch or matches[0]} ({layout.title})",
        {at: value for at, value in tensors.items() if at in inside},
        {used[name]: shape for name, shape in wanted.items()},
        missing=[],
        dropped=set(dropped),
    )
    params: dict[str, Any] = {}
    for piece in found:
        # DINOv3's file may have anything as the bias of keys, which is multiplied by zero.
        value = piece.make(*(tensors[used[name]] for name in piece.names))
        at = params
        for name in piece.path[:-1]:
            at = at.setdefault(name, {})
        at[piece.path[-1]] = value
    check_values(what, {name: value for name, value in _flat(params).items()})
    others = [other for other in networks if other.table != network.table]
    dropped += [f"{other.table}.{at}" for other in others for at in other.names.values()]
    return Found(arch or matches[0], params, len(wanted), dropped, network.root)


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, np.ndarray]:
    result: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        result |= (
            _flat(value, f"{above}{name}/") if isinstance(value, dict) else {above + name: value}
        )
    return result


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
