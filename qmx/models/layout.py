"""Names and shapes of torchvision's `models/resnet.py`, and our names for them."""

import re
from functools import cache

from qmx.models.resnet import ARCHS, Arch

KINDS = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def torch_name(path: str) -> str:
    """Torch's name: "layer1_0/conv1/kernel" -> "layer1.0.conv1.weight"; ValueError if none."""
    *modules, kind = path.split("/")
    if kind not in KINDS:
        raise ValueError(
            f"{path} has no place in a torchvision network; its last part should be one of "
            f"{', '.join(KINDS)}"
        )
    return ".".join([re.sub(r"_(\d+)$", r".\1", module) for module in modules] + [KINDS[kind]])


def our_path(name: str, ndim: int) -> tuple[str, ...]:
    """Our path: "layer1.0.conv1.weight", 4 -> ("layer1_0", "conv1", "kernel").

    The rank `ndim` tells a kernel from a scale.
    """
    *modules, kind = re.sub(r"\.(\d+)", r"_\1", name).split(".")
    kinds = {theirs: ours for ours, theirs in KINDS.items()} | {
        "weight": "scale" if ndim == 1 else "kernel"
    }
    return *modules, kinds[kind]


def shapes(arch: Arch, channels: int = 3) -> dict[str, tuple[int, ...]]:
    """Torch's shapes (OIHW) of a backbone by torchvision's names, without `num_batches_tracked`.

    They are written out, not read off a network, because a file is compared with each of `ARCHS`.
    """
    result: dict[str, tuple[int, ...]] = {}

    def conv(name: str, norm: str, out: int, entering: int, kernel: int) -> None:
        result[f"{name}.weight"] = (out, entering, kernel, kernel)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            result[f"{norm}.{kind}"] = (out,)

    conv("conv1", "bn1", arch.width, channels, 7 if arch.stem == "large" else 3)
    entering = arch.width
    for stage, blocks in enumerate(arch.blocks):
        planes = arch.width * 2**stage
        for index in range(blocks):
            at = f"layer{stage + 1}.{index}"
            if arch.bottleneck:
                inner, out = int(planes * arch.width_per_group / 64) * arch.groups, 4 * planes
                layers = [(inner, entering, 1), (inner, inner // arch.groups, 3), (out, inner, 1)]
            else:
                out = planes
                layers = [(out, entering, 3), (out, out, 3)]
            for i, (into, of, kernel) in enumerate(layers, 1):
                conv(f"{at}.conv{i}", f"{at}.bn{i}", into, of, kernel)
            if (stage > 0 and index == 0) or entering != out:
                conv(f"{at}.downsample.0", f"{at}.downsample.1", out, entering, 1)
            entering = out
    return result


@cache
def every_shapes(channels: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of each of `ARCHS`, for images of so many channels."""
    return {name: shapes(arch, channels) for name, arch in ARCHS.items()}


def nearest(have: dict[str, tuple[int, ...]]) -> tuple[list[str], int]:
    """(those of `ARCHS` that differ from `have` in the fewest tensors, how many are as they say).

    Several are the nearest if shapes cannot tell them apart.
    """
    stem = have.get("conv1.weight", ())
    every = every_shapes(stem[1] if len(stem) == 4 else 3)
    ours = {name: shape for name, shape in have.items() if not name.endswith("num_batches_tracked")}

    def differing(name: str) -> int:
        return len(ours.keys() ^ every[name].keys()) + sum(
            every[name].get(k, v) != v for k, v in ours.items()
        )

    best = min(every, key=differing)
    return (
        [name for name in every if every[name] == every[best]],
        sum(every[best].get(name) == shape for name, shape in ours.items()),
    )


def known(have: dict[str, tuple[int, ...]]) -> bool:
    """True if half of the tensors of one of `ARCHS` are among `have`."""
    stem = have.get("conv1.weight", ())
    (best, *_), right = nearest(have)
    return 2 * right >= len(every_shapes(stem[1] if len(stem) == 4 else 3)[best])


def features(arch: Arch) -> int:
    """D, the width of the pooled features."""
    return arch.width * 2 ** (len(arch.blocks) - 1) * (4 if arch.bottleneck else 1)
