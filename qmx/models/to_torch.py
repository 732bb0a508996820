"""Our weights under torchvision's names, or under timm's for vision transformers.

python -m qmx.models.to_torch WEIGHTS.safetensors OUT.safetensors
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qmx.contract import Encoder, PyTree, by_path
from qmx.models.layout import shapes, torch_name
from qmx.models.norm import EPSILON
from qmx.models.read_torch import import_torch, read_safetensors
from qmx.models.resnet import ARCHS
from qmx.models.vit_layout import to_timm

# Names of torchvision.models; of the others its class takes the widths.
TORCHVISION = {
    name: f"torchvision.models.{name}"
    for name in (
        *("resnet18", "resnet34", "resnet50", "resnet101"),
        *("resnext50_32x4d", "resnext101_32x8d"),
    )
}
OTHERS = {
    f"resnext101_32x{width}d": (
        "functools.partial(torchvision.models.ResNet, torchvision.models.resnet.Bottleneck,"
        f" [3, 4, 23, 3], groups=32, width_per_group={width})"
    )
    for width in (4, 16, 32, 48)
}


def to_torch(params: PyTree, stats: PyTree) -> dict[str, np.ndarray]:
    """The state dict of torchvision's network, or timm's ViT, with the variables `params` and
    `stats`.

    Args:
      params, stats: those of a backbone, or of `chain(backbone=..., head=...)` with a classifier as
        the head. A classifier that standardises becomes one linear layer.

    Returns:
      C-contiguous arrays by name: kernels as OIHW and (out, in), and a `num_batches_tracked` of
      zero for every batch norm, because a strict `load_state_dict` needs it.

    Raises:
      ValueError: the variables are not those of such a network.
    """
    if "backbone" in params:
        if set(params) - {"backbone", "head"}:
            raise ValueError(
                f"variables of the parts {', '.join(sorted(params))} cannot be written as one torch"
                " network; give those of a backbone, or of a backbone and a head"
            )
        tensors = to_torch(params["backbone"], stats["backbone"])
        head, head_stats = params.get("head", {}), stats.get("head", {})
        if "norm" in head_stats and "fc" in head:
            head, head_stats = {"fc": standardised(head["fc"], head_stats["norm"])}, {}
        layer = names(head, head_stats)
        if "patch" in params["backbone"]:
            layer = {re.sub("^fc", "head", name): value for name, value in layer.items()}
        return tensors | layer
    if "patch" in params:
        return to_timm(params)
    if "conv1" not in params or "bn1" not in params:
        raise ValueError(
            f"variables of {', '.join(sorted(params)) or 'nothing'} are not those of a backbone; a "
            "network whose batch norms are folded in has no torchvision form"
        )
    return names(params, stats)


def names(params: PyTree, stats: PyTree) -> dict[str, np.ndarray]:
    """Rename and transpose variables."""
    tensors: dict[str, np.ndarray] = {}
    for tree in (params, stats):
        for path, leaf in by_path(tree).items():
            value = np.asarray(leaf)
            if path.endswith("kernel"):
                value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
            tensors[torch_name(path)] = np.ascontiguousarray(value)
            if path.endswith("/mean"):
                tensors[torch_name(path).replace("running_mean", "num_batches_tracked")] = np.zeros(
                    (), np.int64
                )
    return tensors


def standardised(fc: dict[str, Any], norm: dict[str, Any]) -> dict[str, np.ndarray]:
    """`norm` and then `fc` as one linear layer; computed in float64, rounded once."""
    kernel, bias, mean, var = (
        np.asarray(x, np.float64) for x in (fc["kernel"], fc["bias"], norm["mean"], norm["var"])
    )
    kernel = kernel / np.sqrt(var + EPSILON)[:, None]
    return {"kernel": kernel.astype(np.float32), "bias": (bias - mean @ kernel).astype(np.float32)}


def unflatten(arrays: dict[str, np.ndarray]) -> Encoder:
    """Nested dicts from arrays by their paths.

    Raises:
      ValueError: a path that starts with neither "params/" nor "stats/".
    """
    if foreign := [path for path in arrays if not path.startswith(("params/", "stats/"))]:
        raise ValueError(
            f"the tensors {', '.join(sorted(foreign)[:3])} are none that qmx wrote; give an"
            " encoder, a target or a student"
        )
    tree: dict[str, Any] = {"params": {}, "stats": {}}
    for path, leaf in arrays.items():
        *parents, name = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = leaf
    if "backbone" in tree["params"]:
        for part in tree["params"]:
            # The file has no path for a part without statistics.
            tree["stats"].setdefault(part, {})
    return Encoder(tree["params"], tree["stats"])


def loader(variables: Encoder) -> str:
    """Python that loads the state dict of these variables strictly.

    Raises:
      ValueError: no class of torchvision does.
    """
    backbone = variables.params.get("backbone", variables.params)
    if "patch" in backbone:
        head = variables.params.get("head", {}).get("fc", {}).get("kernel", np.zeros((0, 0)))
        if head.shape[0] not in (0, backbone["patch"].shape[-1]):
            raise ValueError(
                "no class of timm loads this network (its classifier reads the class token and the"
                " mean of the patches); --anyway writes timm's names for a class of your own"
            )
        return (
            f"timm's names; timm.create_model(..., num_classes={head.shape[1]}, img_size=...)"
            " loads them"
        )
    have = {name: value.shape for name, value in names(backbone, {}).items()}
    channels = backbone["conv1"]["kernel"].shape[2]
    arch = next(
        (
            name
            for name, arch in ARCHS.items()
            if have.items() <= shapes(arch, channels).items() and arch.stem == "large"
        ),
        None,
    )
    if not arch or channels != 3:
        raise ValueError(
            "no class of torchvision loads this network (its stem is 3 x 3, it has fewer stages, or"
            " it takes grey images); --anyway writes torchvision's names for a class of your own"
        )
    made = TORCHVISION.get(arch, OTHERS.get(arch))
    if "backbone" not in variables.params:
        return f"net = {made}(); net.fc = torch.nn.Identity(); net.load_state_dict(...)"
    classes = variables.params["head"]["fc"]["kernel"].shape[1]
    return f"net = {made}(num_classes={classes}); net.load_state_dict(...)"


def write(tensors: dict[str, np.ndarray], part: Path) -> None:
    """Write tensors by name in the format that the name before ".part" ends with; OSError if they
    cannot be written."""
    if part.stem.endswith(".pth"):
        torch = import_torch(part)
        try:
            torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, part)
        except RuntimeError as error:  # of a disk without room
            raise OSError(f"{part.with_suffix('')} cannot be written: {error}") from None
        return
    from safetensors.numpy import save

    part.write_bytes(save(tensors))  # whose own file nobody else could read


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        "python -m qmx.models.to_torch",
        description="Write weights of qmx under torchvision's names, for a strict load_state_dict.",
    )
    parser.add_argument(
        "weights", type=Path, help="what qmx wrote: encoder, target or student .safetensors"
    )
    parser.add_argument(
        "out", type=Path, help="to write: .safetensors, or .pth (which needs the extra qmx[torch])"
    )
    parser.add_argument(
        "--anyway", action="store_true", help="also a network that no class of torchvision loads"
    )
    args = parser.parse_args(argv)
    part = args.out.with_name(args.out.name + ".part")
    try:
        if not args.out.parent.is_dir() or args.out.suffix not in (".safetensors", ".pth"):
            raise ValueError(
                f"cannot write {args.out}; give a name that ends with .safetensors or .pth in a"
                " directory that exists"
            )
        if args.out.is_dir() or (args.out.exists() and args.out.samefile(args.weights)):
            raise ValueError(f"{args.out} is there and is no file to write; give another name")
        variables = unflatten(read_safetensors(args.weights))
        tensors = to_torch(*variables)
        how = "for a class of your own" if args.anyway else loader(variables)
        write(tensors, part)
        part.replace(args.out)
    except (ValueError, OSError) as error:
        print("to_torch:", *str(error).split(), file=sys.stderr)
        return 2
    finally:
        if part.is_file():
            part.unlink()
    print(f"wrote {len(tensors)} tensors to {args.out}: {how}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
