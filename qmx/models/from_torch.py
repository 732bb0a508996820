"""Released PyTorch weights: `python -m qmx.models.from_torch FILE OUT.safetensors`.

It knows ResNets and ResNeXts with torchvision's, transformers' and kuangliu's names, wherever they
stand in a file (`qmx/models/roots.py`), and ViT, DINOv2 and DINOv3 with their own, transformers',
timm's and torchvision's (`qmx/models/vit_layout.py`). Files are read as data alone (safetensors,
or torch with `weights_only=True`). Every tensor is used, dropped by name, or an error. FILE#PART is
one of several networks in a file, as in net.pth.tar#state_dict_ema.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qmx.checkpoint import file_digest, save_weights
from qmx.contract import Encoder, PyTree
from qmx.models.check_torch import check, check_values
from qmx.models.layout import features, known, nearest, our_path, shapes
from qmx.models.read_torch import read
from qmx.models.resnet import ARCHS
from qmx.models.roots import Tables, classifiers, clean, find
from qmx.models.to_torch import to_torch, unflatten
from qmx.models.vit import VITS
from qmx.models.vit_from_torch import convert as convert_transformer
from qmx.models.vit_from_torch import transformers


class Converted(NamedTuple):
    """A network from a file. The arrays may be transposed views of the mapped file."""

    arch: str  # one of `ARCHS`, or of `VITS`
    backbone: Encoder
    head: PyTree | None  # {"fc": {"kernel", "bias"}}, or None if the file has no classifier
    used: int  # number of tensors in the network
    dropped: tuple[str, ...]  # names of the tensors outside the network
    root: str = ""  # of the network's names in the file, without wrappers, such as "backbone."
    features: str = "class"  # of a vision transformer, that the head reads

    @property
    def channels(self) -> int:
        """Number of channels of the images that it was made for."""
        params = self.backbone.params
        return (params["patch"] if "patch" in params else params["conv1"]["kernel"]).shape[2]


def split_part(path: Path | str) -> tuple[Path, str]:
    """(file, part) of FILE#PART, which chooses one of the networks in a file; ("" if no part)."""
    file, _, part = str(path).rpartition("#")
    return (Path(path), "") if Path(path).is_file() or not file else (Path(file), part)


def load(path: Path | str, arch: str = "") -> Converted:
    """Read and convert a file, or a part of it: "net.pth#state_dict_ema".

    Raises:
      ValueError: see `read` and `convert`.
    """
    file, part = split_part(path)
    return convert_tables(read(file), arch, part, what=str(path))


def convert(tensors: dict[str, np.ndarray], arch: str = "", *, what: str = "the file") -> Converted:
    """Convert torch's tensors, or tensors under qmx's own names; see `convert_tables`."""
    return convert_tables({"": tensors}, arch, what=what)


def convert_tables(
    tables: Tables, arch: str = "", part: str = "", *, what: str = "the file"
) -> Converted:
    """Convert the network of a file.

    Args:
      tables: tensors by name, in dicts by name, as `read` returns them.
      arch: one of `ARCHS`, which the network must be; "" for the one that the shapes show.
      part: which one, if the file holds several networks; see `qmx.models.roots.find`.
      what: name of the file in errors.

    Returns:
      f32 arrays: convolutions OIHW -> HWIO (also grouped ones, whose I counts one group), dense
      (out, in) -> (in, out), batch norm's four arrays renamed, `num_batches_tracked` dropped.
      Tensors beside the network are dropped, and named.

    Raises:
      ValueError: another architecture, or two that the shapes do not tell apart; several networks,
        or classifiers; tensors of the network that are missing, unexpected or of the wrong shape,
        each by name; values that are not finite; a variance below zero.
    """
    if arch and arch not in ARCHS and arch not in VITS:
        every = ", ".join([*ARCHS, *VITS])
        raise ValueError(f"network {arch!r} is unknown; choose one of {every}")
    ours = any(name.startswith("params/") for name in tables.get("", {}))
    if ours:
        try:
            tables = {"": to_torch(*unflatten(tables[""]))}
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None

    if patches := transformers(tables):
        made = convert_transformer(tables, patches, arch, part, what=what, ours=ours)
        left, encoder = () if ours else tuple(made.dropped), Encoder(made.params, {})
        return Converted(made.arch, encoder, made.head, made.used, left, made.root, made.features)
    network, others = find(tables, part, what)
    tensors = tables[network.table]
    have = {name: tuple(tensors[at].shape) for name, at in network.names.items()}
    best = recognise(have, arch, what, len(tensors), sorted(tensors))
    stem = have.get("conv1.weight", ())
    wanted = shapes(ARCHS[best], stem[1] if len(stem) == 4 else 3)
    names = dict(network.names)

    layers = classifiers(network, tensors, features(ARCHS[best]))
    if len(layers) > 1:
        several = ", ".join(next(iter(layer.values())) for layer in layers)
        raise ValueError(
            f"{what} holds {len(layers)} classifiers: {several}; save the network with one of them"
        )
    if layers:
        names |= layers[0]
        sizes = [size for at in layers[0].values() for size in tensors[at].shape[:1]]
        # The larger one, so that half a layer shows by its name.
        wanted |= {"fc.weight": (*sizes[:1], features(ARCHS[best])), "fc.bias": (*sizes[:1],)}

    # Names that the file would have for tensors that it lacks.
    before = {at.removesuffix(name) for name, at in network.names.items() if at.endswith(name)}
    prefix = min(before, key=len, default=network.root)
    names = {name: prefix + name for name in wanted} | names
    norms = {name.rpartition(".")[0] for name in wanted if name.endswith("running_mean")}
    counters = {
        at
        for name, at in names.items()
        if name.endswith(".num_batches_tracked") and name.rpartition(".")[0] in norms
    }
    used = {names[name]: name for name in wanted}
    kept = {at for name, at in names.items() if at in tensors} - counters
    # What qmx wrote has nothing beside the network.
    dropped = [at for at in tensors if at not in kept and (not ours or at in counters)]
    # A kernel beside the network with the shape of one that is missing may be that one, renamed.
    lacking = {wanted[name] for at, name in used.items() if at not in tensors}
    elsewhere = {at for other in others for at in other.names.values()}
    strays = {
        at
        for at in dropped
        if at not in elsewhere and tensors[at].ndim > 1 and tensors[at].shape in lacking
    }
    check(
        what,
        best,
        tensors,
        {at: wanted[name] for at, name in used.items()},
        missing=[],
        dropped=set(dropped) - strays,
    )
    check_values(what, {at: tensors[at] for at in sorted(used)})
    dropped += [
        f"{other.table}.{at}"
        for other in others
        if other.table != network.table
        for at in other.names.values()
    ]

    trees: dict[str, dict[str, Any]] = {"params": {}, "stats": {}, "head": {}}
    for at_file, name in used.items():
        value = tensors[at_file]
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
        () if ours else tuple(dropped),  # to_torch adds counters, which no file of ours has
        network.root,
    )


def recognise(
    have: dict[str, tuple[int, ...]], arch: str, what: str, count: int, names: list[str]
) -> str:
    """The one of `ARCHS` with the shapes `have`, which must be `arch` if one is given.

    Args:
      have: by torchvision's names.
      what, count, names: the file, and its tensors, in errors.
    """
    if not known(have):
        raise ValueError(
            f"{what} holds {count} tensors ({', '.join(names[:3])}, ...), which are"
            f" not those of any network known here; known are {', '.join(ARCHS)}"
        )
    matches, _ = nearest(have)
    if not arch and "resnet8" in matches:
        return "resnet8"  # nobody publishes weights of resnet8_pool
    if arch and arch not in matches:
        raise ValueError(
            f"{what} holds {' or '.join(matches)} and not {arch}; set arch to {matches[0]}, or give"
            " another file"
        )
    if not arch and len(matches) > 1:
        raise ValueError(
            f"{what} has the shapes of {' and of '.join(matches)}, which differ in a max-pool"
            f" behind the first layer; say which, as in arch={matches[0]} (--arch={matches[0]})"
        )
    return arch or matches[0]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        "python -m qmx.models.from_torch",
        description="Convert released PyTorch weights of a ResNet or a ViT, once and strictly.",
    )
    parser.add_argument(
        "file",
        type=Path,
        help=".safetensors, or .pth, .pth.tar, ... (these need qmx[torch]); FILE#PART for one of"
        " several networks in it",
    )
    parser.add_argument("out", type=Path, help="to write, .safetensors")
    parser.add_argument(
        "--arch",
        default="",
        help="fail unless it is this network; one of " + ", ".join([*ARCHS, *VITS]),
    )
    args = parser.parse_args(argv)
    try:
        if args.out.suffix != ".safetensors" or not args.out.absolute().parent.is_dir():
            raise ValueError(
                f"cannot write {args.out}; give a name that ends with .safetensors, in a directory"
                " that exists"
            )
        file, _ = split_part(args.file)
        if args.out.exists() and file.exists() and args.out.samefile(file):
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
        f"{args.file}: {net.arch}{classes}\nsource SHA-256 {file_digest(file)}\nused"
        f" {net.used} tensors"
    )
    print(*dropped_lines(net), sep="\n", end="\n" * bool(net.dropped))
    print(f"wrote {args.out}, digest {digest}")
    return 0


def dropped_lines(net: Converted) -> list[str]:
    """A line for each part of a file that is dropped, "dropped 4 tensors: projector.*"."""
    groups = Counter(group_of(name, net.root) for name in net.dropped)
    return [f"dropped {count} tensors: {group}" for group, count in sorted(groups.items())]


def group_of(name: str, root: str) -> str:
    """Name of the part that a dropped tensor belongs to, "encoder_q.fc.*" under that root."""
    if name.endswith("num_batches_tracked"):
        return "num_batches_tracked"
    parts, own = clean(name).split("."), root.split(".")[:-1]
    shared = 0
    while shared < min(len(own), len(parts) - 1) and parts[shared] == own[shared]:
        shared += 1
    return ".".join(parts[: shared + 1]) + (".*" if len(parts) > shared + 1 else "")


if __name__ == "__main__":
    sys.exit(main())
