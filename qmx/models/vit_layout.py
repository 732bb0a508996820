"""Shapes of the published vision transformers' tensors, and what they are here."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qmx.models.vit import VITS, Arch
from qmx.models.vit_names import EVA, LAYOUTS, TIMM, Layout

Shape = tuple[int, ...]

# Tensors within a network that its features do not depend on.
DROPPED = re.compile(
    r"(embeddings\.)?mask_token$"
    r"|rope(_embed|_embeddings)?\.|(model\.)?rope_embeddings\.|blocks\.\d+\.attn\.qkv\.bias_mask$"
    r"|local_cls_norm\.|pooler\.|(head|classifier|heads)\.|decoder_(?!norm)|decoder_norm\."
)


class Piece(NamedTuple):
    """A variable of ours, and how it is made of a file's tensors."""

    path: tuple[str, ...]
    names: dict[str, Shape]  # of the file's tensors, in the order that `make` takes them in
    make: Callable[..., np.ndarray]


def rows(*arrays: np.ndarray) -> np.ndarray:
    """Stacked outputs of layers: a matrix, transposed, or a vector."""
    return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).T


def flat(array: np.ndarray) -> np.ndarray:
    """Without the leading axes of one: [1, n, D] -> [n, D]."""
    return array.reshape(array.shape[-2:])


def pieces(arch: Arch, layout: Layout, have: dict[str, Shape]) -> list[Piece]:
    """Every variable of a network with its tensors' names and shapes in one code base.

    Args:
      have: shapes of a file's tensors, which tell the number of positions and of channels, and if
        timm left out biases of zero.
    """
    dim, family, found = arch.dim, arch.of, list[Piece]()
    channels = (have.get(f"{layout.patch}.weight", ()) + (3,) * 4)[1]

    def add(path: str, make: Callable[..., np.ndarray], names: Mapping[str, Shape]) -> None:
        found.append(Piece(tuple(path.split("/")), dict(names), make))

    def layer(
        path: str, names: tuple[str, ...], out: int, entering: int, bias: bool = True
    ) -> None:
        # torchvision's packed layer is "in_proj_weight".
        at = [name if name.endswith("_") else f"{name}." for name in names]
        size = out // len(names)
        add(f"{path}/kernel", rows, {f"{name}weight": (size, entering) for name in at})
        if bias:
            add(f"{path}/bias", rows, {f"{name}bias": (size,) for name in at})

    def norm(path: str, name: str) -> None:
        add(f"{path}/scale", rows, {f"{name}.weight": (dim,)})
        add(f"{path}/bias", rows, {f"{name}.bias": (dim,)})

    patch = {f"{layout.patch}.weight": (dim, channels, arch.patch, arch.patch)}
    add("patch", lambda x: x.transpose(2, 3, 1, 0), patch)
    add("patch_bias", rows, {f"{layout.patch}.bias": (dim,)})
    own = {layout.cls: (1, 1, dim)}
    if family.rope:
        add("class", flat, own)
    else:
        # timm adds the class token's position to it where there are registers.
        first = 0 if layout is TIMM and arch.registers else 1
        shape = have.get(layout.positions, ())
        side = (
            math.isqrt(max(shape[1] - first, 1)) if len(shape) == 3 else family.size // arch.patch
        )
        table = {layout.positions: (1, first + side * side, dim)}
        if first:
            add("class", lambda token, at: flat(token + at[:, :1]), own | table)
        else:
            add("class", flat, own)
        add("positions", lambda at: at[0, first:].reshape(side, side, dim), table)
    if arch.registers:
        add("registers", flat, {layout.registers: (1, arch.registers, dim)})
    for number in range(arch.depth):
        at = layout.block.format(number)
        to = f"block_{number}"
        for i, name in enumerate(layout.norms, 1):
            norm(f"{to}/norm{i}", at + name)
        packed = tuple(at + name for name in layout.qkv)
        layer(f"{to}/qkv", packed, 3 * dim, dim, bias=not family.rope)
        if family.rope:
            biases = {at + name: (dim,) for name in layout.biases}
            if len(biases) == 1:  # of keys too, where it is multiplied by zero
                add(
                    f"{to}/qv_bias",
                    lambda b: b.reshape(3, -1)[::2],
                    dict.fromkeys(biases, (3 * dim,)),
                )
            elif layout is EVA and not any(name.endswith(layout.biases) for name in have):
                add(f"{to}/qv_bias", lambda: np.zeros((2, dim), np.float32), {})
            else:
                add(f"{to}/qv_bias", lambda q, v: np.stack([q, v]), biases)
        layer(f"{to}/proj", (at + layout.proj,), dim, dim)
        if family.scale:
            for i, name in enumerate(layout.scales, 1):
                add(f"{to}/scale{i}", rows, {at + name: (dim,)})
        fc1, fc2 = (layout.gated, layout.gated_fc2) if arch.gated else (layout.fc1, layout.fc2)
        width = 2 * arch.hidden if arch.gated else arch.hidden
        layer(f"{to}/fc1", tuple(at + name for name in fc1), width, dim)
        layer(f"{to}/fc2", (at + fc2,), dim, arch.hidden)
    norm("norm", layout.norm)
    return found


def shapes(found: list[Piece]) -> dict[str, Shape]:
    """Shapes of all tensors of some pieces, by name."""
    return {name: shape for piece in found for name, shape in piece.names.items()}


def nearest(have: dict[str, Shape]) -> tuple[list[str], Layout, list[Piece]]:
    """(those of `VITS` that differ from `have` in the fewest tensors, the layout, its pieces)."""

    def differing(wanted: dict[str, Shape]) -> int:
        extra = [name for name in have if name not in wanted and not DROPPED.match(name)]
        return len(extra) + sum(have.get(name) != shape for name, shape in wanted.items())

    every: list[tuple[int, str, Layout, list[Piece]]] = []
    for layout in LAYOUTS:
        dim = have.get(f"{layout.patch}.weight", (0,))[0]
        for name, arch in VITS.items():
            if dim and arch.family in layout.families:
                found = pieces(arch, layout, have)
                # Of networks of another width, only where there is none of this.
                every.append(
                    (differing(shapes(found)) + 10**6 * (dim != arch.dim), name, layout, found)
                )
    best = min(every, key=lambda one: one[0])
    return (
        [name for off, name, layout, _ in every if off == best[0] and layout is best[2]],
        *best[2:],
    )


def to_timm(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """A network of ours under timm's names, C-contiguous; see `qmx.models.to_torch.to_torch`."""
    first = params["block_0"]
    hidden, width = first["fc2"]["kernel"].shape[0], first["fc1"]["kernel"].shape[1]
    registers = len(params.get("registers", ()))
    family = "dinov3" if "positions" not in params else "dinov2" if "scale1" in first else "vit"
    arch = Arch(
        f"{family}_reg" if family == "dinov2" and registers else family,
        dim=params["patch"].shape[-1],
        depth=sum(name.startswith("block_") for name in params),
        heads=0,  # no variable tells
        hidden=hidden,
        patch=params["patch"].shape[0],
        registers=registers,
        gated=width == 2 * hidden,
    )
    layout = EVA if family == "dinov3" else TIMM
    positions = params.get("positions", np.zeros((0, 0, arch.dim), np.float32))
    count = positions.shape[0] * positions.shape[1] + (not registers)
    have = {
        f"{layout.patch}.weight": (arch.dim, params["patch"].shape[2]),
        layout.positions: (1, count, arch.dim),
        layout.block.format(0) + "attn.q_bias": (arch.dim,),
    }
    tensors: dict[str, np.ndarray] = {}
    for piece in pieces(arch, layout, have):
        value: Any = params
        for name in piece.path:
            value = value[name]
        value, names = np.asarray(value), list(piece.names)
        if piece.path == ("patch",):
            parts = [value.transpose(3, 2, 0, 1)]
        elif piece.path in (("class",), ("registers",)):
            parts, names = [value], names[:1]
        elif piece.path == ("positions",):  # the class token holds its own
            parts = [np.pad(value.reshape(-1, arch.dim), ((count - value[..., 0].size, 0), (0, 0)))]
        elif piece.path[-1] == "qv_bias":
            parts = list(value)
        else:
            parts = np.split(value.T, len(names))
        for name, part in zip(names, parts, strict=True):
            tensors[name] = np.ascontiguousarray(part.reshape(piece.names[name]))
    return tensors
