"""Released PyTorch weights: `python -m qmx.models.from_torch FILE OUT.safetensors`.

It knows ResNets and ResNeXts with torchvision's names, alone or as MoCo, SimSiam, mmselfsup and
OpenSelfSup save them. Files are read as data alone (safetensors, or torch with
`weights_only=True`). Every tensor is used, dropped by name, or an error.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qmx.checkpoint import file_digest, save_weights
from qmx.contract import Encoder, PyTree
from qmx.models.check_torch import check, check_values
from qmx.models.layout import features, our_path, shapes
from qmx.models.read_torch import read
from qmx.models.resnet import ARCHS
from qmx.models.to_torch import to_torch, unflatten


class Converted(NamedTuple):
    """A network from a file. The arrays may be transposed views of the mapped file."""

    arch: str  # one of `ARCHS`
    backbone: Encoder
    head: PyTree | None  # {"fc": {"kernel", "bias"}}, or None if the file has no classifier
    used: int  # number of tensors in the network
    dropped: tuple[str, ...]  # names of the tensors outside the network


class Layout(NamedTuple):
    """Names under which a code base saves a backbone."""

    prefix: str  # of the backbone's names
    # The other tensors of the file: names, or prefixes that end with a dot.
    dropped: tuple[str, ...] = ()
    heads: tuple[frozenset[str], ...] = ()  # dropped heads: the names after "fc."


def head(*layers: str) -> frozenset[str]:
    """Names of a head's tensors; "1:bn" is an index and a kind of layer."""
    kinds = {
        "linear": ("weight", "bias"),
        "no bias": ("weight",),
        "stats": ("running_mean", "running_var"),
        "bn": ("weight", "bias", "running_mean", "running_var"),
    }
    pairs = [layer.rpartition(":")[::2] for layer in layers]
    return frozenset(
        f"{at}.{kind}".removeprefix(".") for at, layer in pairs for kind in kinds[layer]
    )


MOCO = (head(":linear"), head("0:linear", "2:linear"))  # v1, v2
SIMSIAM = (
    head("0:no bias", "1:bn", "3:no bias", "4:bn", "6:linear", "7:stats"),
    head("0:no bias", "1:bn", "3:linear", "4:stats"),
)  # ImageNet's, CIFAR's

# DataParallel puts "module." before all names. OpenSelfSup keeps the backbone under two names.
LAYOUTS = (
    Layout(""),
    Layout("encoder_q.", ("encoder_k.", "queue", "queue_ptr"), MOCO),  # moco/builder.py
    Layout("encoder.", ("predictor.",), SIMSIAM),  # simsiam/builder.py
    Layout(
        "backbone.",
        ("neck.", "head.", "encoder_q.", "encoder_k.", "encoder.", "queue", "queue_ptr"),
    ),
)


def load(path: Path | str, arch: str = "") -> Converted:
    """Read and convert a file.

    Raises:
      ValueError: see `read` and `convert`.
    """
    return convert(read(path), arch, what=str(path))


def convert(tensors: dict[str, np.ndarray], arch: str = "", *, what: str = "the file") -> Converted:
    """Convert torch's tensors, or tensors under qmx's own names, to a network.

    Args:
      tensors: by name, as `read` returns them.
      arch: one of `ARCHS`, which the tensors must be; "" for the one that the shapes show.
      what: name of the file in errors.

    Returns:
      f32 arrays: convolutions OIHW -> HWIO (also grouped ones, whose I counts one group), dense
      (out, in) -> (in, out), batch norm's four arrays renamed, `num_batches_tracked` dropped.

    Raises:
      ValueError: another architecture; tensors that are missing, unexpected or of the wrong shape,
        each by name; values that are not finite; a variance below zero.
    """
    if arch and arch not in ARCHS:
        raise ValueError(f"network {arch!r} is unknown; choose one of {', '.join(ARCHS)}")
    if any(name.startswith("params/") for name in tensors):
        try:
            ours = to_torch(*unflatten(tensors))
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        tensors = {
            name: value for name, value in ours.items() if not name.endswith("num_batches_tracked")
        }

    layout = layout_of(tensors)
    prefix = layout.prefix
    have = {
        name[len(prefix) :]: tuple(value.shape)
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    best, tensor_shapes = recognise(have, arch, what)
    if layout.heads:
        names = {
            name[3:]
            for name in have
            if name.startswith("fc.") and not name.endswith("num_batches_tracked")
        }
        nearest = min(
            [frozenset[str](), *layout.heads], key=lambda head_names: len(names ^ head_names)
        )
        discarded = {f"fc.{name}" for name in nearest}
    else:
        discarded = set()
        if {"fc.weight", "fc.bias"} & have.keys():
            classes = (*have.get("fc.bias", ()), *have.get("fc.weight", ()))[:1]
            tensor_shapes = tensor_shapes | {
                "fc.weight": (*classes, features(ARCHS[best])),
                "fc.bias": classes,
            }

    norms = {
        name.rpartition(".")[0]
        for name in tensor_shapes.keys() | discarded
        if name.endswith("running_mean")
    }
    prefixes = tuple(name for name in layout.dropped if name.endswith("."))
    dropped = [name for name in tensors if name in layout.dropped or name.startswith(prefixes)]
    dropped += [prefix + name for name in have if name in discarded]
    dropped += [
        name
        for name in tensors
        if name.startswith(prefix)
        and name.endswith(".num_batches_tracked")
        and name[len(prefix) :].rpartition(".")[0] in norms
    ]
    used = {prefix + name for name in tensor_shapes}
    check(
        what,
        best,
        tensors,
        {prefix + name: shape for name, shape in tensor_shapes.items()},
        missing=[prefix + name for name in sorted(discarded - have.keys())],
        dropped=set(dropped),
    )
    check_values(what, {name: tensors[name] for name in sorted(used)})

    trees: dict[str, dict[str, Any]] = {"params": {}, "stats": {}, "head": {}}
    for name in tensor_shapes:
        value = tensors[prefix + name]
        path = our_path(name, value.ndim)
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        at = trees[
            "head" if path[0] == "fc" else "stats" if path[-1] in ("mean", "var") else "params"
        ]
        for module in path[:-1]:
            at = at.setdefault(module, {})
        at[path[-1]] = value
    return Converted(
        best,
        Encoder(trees["params"], trees["stats"]),
        trees["head"] or None,
        len(used),
        tuple(dropped),
    )


def layout_of(tensors: dict[str, np.ndarray]) -> Layout:
    """Layout with the most backbone tensors under its prefix, or under "module." and its prefix."""
    layouts = [
        Layout(root + layout.prefix, tuple(root + name for name in layout.dropped), layout.heads)
        for root in ("", "module.")
        for layout in LAYOUTS
    ]
    counts = []
    for layout in layouts:
        pattern = re.compile(re.escape(layout.prefix) + r"(conv1|bn1|layer\d+\.\d+)\.")
        counts.append(sum(pattern.match(name) is not None for name in tensors))
    return layouts[counts.index(max(counts))]


def recognise(
    have: dict[str, tuple[int, ...]], arch: str, what: str
) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The one of `ARCHS` that differs from `have` in the fewest tensors, and its shapes."""
    stem = have.get("conv1.weight", ())
    every = {name: shapes(known, stem[1] if len(stem) == 4 else 3) for name, known in ARCHS.items()}
    known_names = set().union(*every.values())
    ours = {name: shape for name, shape in have.items() if name in known_names}
    differing = {
        name: len(ours.keys() ^ theirs.keys()) + sum(theirs.get(k, v) != v for k, v in ours.items())
        for name, theirs in every.items()
    }
    best = min(ARCHS, key=lambda name: (differing[name], name != arch))
    if 2 * sum(every[best].get(name) == shape for name, shape in ours.items()) < len(every[best]):
        raise ValueError(
            f"{what} holds {len(have)} tensors ({', '.join(sorted(have)[:3])}, ...), which are"
            f" not those of any network known here; known are {', '.join(ARCHS)}"
        )
    if arch and best != arch:
        raise ValueError(
            f"{what} holds {best} and not {arch}; set arch to {best}, or give another file"
        )
    return best, every[best]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        "python -m qmx.models.from_torch",
        description="Convert released PyTorch weights of a ResNet or ResNeXt, once and strictly.",
    )
    parser.add_argument(
        "file", type=Path, help=".safetensors, or .pth, .pth.tar, ... (these need qmx[torch])"
    )
    parser.add_argument("out", type=Path, help="to write, .safetensors")
    parser.add_argument(
        "--arch", default="", help="fail unless it is this network; one of " + ", ".join(ARCHS)
    )
    args = parser.parse_args(argv)
    try:
        if args.out.suffix != ".safetensors" or not args.out.absolute().parent.is_dir():
            raise ValueError(
                f"cannot write {args.out}; give a name that ends with .safetensors, in a directory"
                " that exists"
            )
        if args.out.exists() and args.file.exists() and args.out.samefile(args.file):
            raise ValueError(f"{args.out} is the file to convert; give another name to write to")
        net = load(args.file, args.arch)
        tree = net.backbone
        if net.head is not None:
            tree = Encoder(
                {"backbone": tree.params, "head": net.head}, {"backbone": tree.stats, "head": {}}
            )
        digest = save_weights(args.out, tree)
    except (ValueError, OSError) as error:
        print("from_torch:", *str(error).split(), file=sys.stderr)
        return 2
    classes = (
        f" with a classifier of {net.head['fc']['bias'].size} classes"
        if net.head
        else ", no classifier"
    )
    print(
        f"{args.file}: {net.arch}{classes}\nsource SHA-256 {file_digest(args.file)}\nused"
        f" {net.used} tensors"
    )
    for group, count in sorted(Counter(map(group_of, net.dropped)).items()):
        print(f"dropped {count} tensors: {group}")
    print(f"wrote {args.out}, digest {digest}")
    return 0


def group_of(name: str) -> str:
    """Name of the part that a dropped tensor belongs to."""
    if name.endswith("num_batches_tracked"):
        return "num_batches_tracked"
    name = name.removeprefix("module.")
    return (
        name
        if name.startswith("queue")
        else re.sub(r"^(encoder_q\.fc|encoder\.fc|[^.]+)\..*", r"\1.*", name)
    )


if __name__ == "__main__":
    sys.exit(main())
