"""Where networks stand among the names of a weights file.

A file is a few dicts of tensors by name ("state_dict", "model.teacher"). In each of them a network
stands under a root, such as "module.backbone.", which is found by the names of its layers. The
tables below are the names of public code.
"""

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from qmx.models.layout import known

# Modules that wrap another one and change nothing: of DataParallel, torch.compile, FSDP, and
# activation checkpointing.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# How a layer's name is split into root, and name within the network; the leftmost match counts.
AT = r"^((?:.+?\.)??)"
TORCHVISION = re.compile(AT + r"((?:conv1|bn1|layer\d+\.\d+)\..+)$")
HUGGING_FACE = re.compile(AT + r"(embedder\.embedder\..+|encoder\.stages\.\d+\.layers\.\d+\..+)$")
# torch.nn.Sequential(*network.children()) has numbers for names.
STEM = re.compile(r"^((?:.+\.)?)(\d+)\.(\w+)$")
SEQUENTIAL = re.compile(AT + r"(\d+)\.(\d+\.(?:conv|bn|downsample\.|shortcut\.)\d\..+)$")

# Names of other code bases and torchvision's, in this order.
RENAMINGS = (
    # transformers' ResNet
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d+)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"^(layer\d+\.\d+\.)shortcut\.", r"\1downsample."),  # and kuangliu's, SupContrast's
    (r"^(layer\d+\.\d+\.)downsample\.convolution\.", r"\1downsample.0."),
    (r"^(layer\d+\.\d+\.)downsample\.normalization\.", r"\1downsample.1."),
    (r"^(layer\d+\.\d+\.)layer\.(\d+)\.convolution\.", lambda m: f"{m[1]}conv{int(m[2]) + 1}."),
    (r"^(layer\d+\.\d+\.)layer\.(\d+)\.normalization\.", lambda m: f"{m[1]}bn{int(m[2]) + 1}."),
)

# Slowly moving copies, and the networks that they are copies of, which are what is published.
MOMENTUM = {
    "encoder_k": ("encoder_q", "backbone"),  # MoCo, OpenSelfSup, mmselfsup
    "momentum_backbone": ("backbone",),  # solo-learn
    "backbone_momentum": ("backbone",),  # lightly
    "momentum_encoder": ("encoder", "backbone"),
}

# Classifiers, beside the backbone's layers or beside the backbone.
CLASSIFIERS = ("fc", "linear", "head", "cls_head", "classifier", "last_linear", "output")
# The linear layer within one: "fc.1" is Sequential(dropout, linear), "head.fc" mmpretrain's.
LINEAR = re.compile(r"^((?:\d+|fc|linear|layers\.head)\.)?(weight|bias)$")
# Parts of training without labels. A linear layer beside them is a projection or a probe.
UNLABELLED = re.compile(
    r"^(projector|projection|projection_head|prototypes|predictor|prediction_head|queue.*|neck|"
    r"encoder_k|momentum_.*|.*_momentum)$"
)

Tables = dict[str, dict[str, np.ndarray]]


class Network(NamedTuple):
    """A network's place in a file."""

    table: str  # which of the file's dicts
    root: str  # before the names in it, without wrappers; "" or "backbone."
    names: dict[str, str]  # torchvision's name of each tensor -> its name in the dict

    @property
    def label(self) -> str:
        """The name that a user gives to choose this one: "state_dict_ema", "teacher.backbone"."""
        return ".".join(filter(None, (self.table, self.root.rstrip(".")))) or "."


def clean(name: str) -> str:
    """A name without wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def renamed(name: str) -> str:
    """Torchvision's name of a tensor in a network."""
    for pattern, to in RENAMINGS:
        name = re.sub(pattern, to, name)
    return name


def networks(table: str, tensors: dict[str, np.ndarray]) -> list[Network]:
    """Everything in a dict of tensors that has the layers of a network, whole or not.

    Raises:
      ValueError: two tensors have one name.
    """
    roots: dict[str, dict[str, str]] = defaultdict(dict)
    numbered: dict[str, set[int]] = defaultdict(set)

    def add(root: str, name: str, original: str) -> None:
        if name in roots[root]:
            raise ValueError(
                f"{roots[root][name]} and {original} are both {name} of one network; save the"
                " weights of one"
            )
        roots[root][name] = original

    for original in tensors:
        if match := SEQUENTIAL.match(clean(original)):
            numbered[match[1]].add(int(match[2]))
    for original, value in tensors.items():
        name = clean(original)
        if match := SEQUENTIAL.match(name):
            layer = 1 + sorted(numbered[match[1]]).index(int(match[2]))
            add(match[1], renamed(f"layer{layer}.{match[3]}"), original)
        elif (match := STEM.match(name)) and int(match[2]) < min(numbered.get(match[1], {0})):
            add(match[1], f"{'conv1' if value.ndim == 4 else 'bn1'}.{match[3]}", original)
        elif match := HUGGING_FACE.match(name) or TORCHVISION.match(name):
            add(match[1], renamed(match[2]), original)
    return [Network(table, root, names) for root, names in roots.items()]


def find(tables: Tables, part: str, what: str) -> tuple[Network, list[Network]]:
    """(the network of a file, the others in it).

    Args:
      part: which one, if there are several: a dict's name, a root, or a part of them; "" for the
        only one. See `Network.label`.
      what: name of the file in errors.

    Raises:
      ValueError: no known network; several, and `part` does not say which.
    """
    try:
        every = [
            network
            for table, tensors in tables.items()
            for network in networks(table, tensors)
            if known({name: tensors[at].shape for name, at in network.names.items()})
        ]
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if not every:
        return nearest(tables), []
    network = chosen_one(every, part, tables, what)
    return network, [other for other in every if other != network]


def chosen_one(every: list[Network], part: str, tables: Tables, what: str) -> Network:
    """The network of several that a file is read for; see `find`.

    Raises:
      ValueError: several, and `part` does not say which; or it names none.
    """
    chosen = selected(every, part) if part else distinct(without_momentum(every), tables)
    labels = ", ".join(network.label for network in (chosen or every))
    if not chosen:
        raise ValueError(f"{what}: {part} is none of the networks in the file; they are {labels}")
    if len(chosen) > 1:
        file = what.removesuffix(f"#{part}")
        raise ValueError(
            f"{what} holds {len(chosen)} networks: {labels}; say which with"
            f" {file}#{chosen[-1].label}, for instance"
        )
    return chosen[0]


def selected(every: list[Network], part: str) -> list[Network]:
    """The networks that `part` names: exactly, or a part of their labels."""
    part = clean(part) or "."
    exactly = [network for network in every if network.label == part]
    return exactly or [network for network in every if f".{part}." in f".{network.label}."]


def without_momentum(every: list[Network]) -> list[Network]:
    """The networks that are not the momentum copy of another one."""

    def is_copy(network: Network) -> bool:
        parts = network.label.split(".")
        originals = [
            ".".join([*parts[:i], original])
            for i, part in enumerate(parts)
            for original in MOMENTUM.get(part, ())
        ]
        return any(
            f"{other.label}.".startswith(f"{original}.")
            for other in every
            for original in originals
            if other != network
        )

    return [network for network in every if not is_copy(network)]


def distinct(every: list[Network], tables: Tables) -> list[Network]:
    """The networks without those that equal an earlier one: OpenSelfSup keeps one under two
    names."""
    result: list[Network] = []
    for network in every:
        if not any(equal(network, other, tables) for other in result):
            result.append(network)
    return result


def equal(one: Network, two: Network, tables: Tables) -> bool:
    """True if two networks have the same tensors."""
    return one.names.keys() == two.names.keys() and all(
        np.array_equal(tables[one.table][at], tables[two.table][two.names[name]])
        for name, at in one.names.items()
    )


def nearest(tables: Tables) -> Network:
    """The root with the most layers, of a file without a known network; for the message."""
    every = [network for at, tensors in tables.items() for network in networks(at, tensors)]
    largest = max(tables, key=lambda at: len(tables[at]))
    return max(every, key=lambda network: len(network.names), default=Network(largest, "", {}))


def classifiers(
    network: Network, tensors: dict[str, np.ndarray], features: int
) -> list[dict[str, str]]:
    """Linear layers from `features` to classes beside a backbone: {"fc.weight": its name, ...}.

    There are none among the parts of training without labels. A layer with the name "fc" within the
    network is one whatever its shape, so that half a classifier is an error.
    """
    own = set(network.names.values())
    others = {clean(name): name for name in tensors if name not in own}
    if any(UNLABELLED.match(part) for name in others for part in name.split(".")):
        return []
    parts = network.root.split(".")[:-1]
    found = []
    for depth in range(len(parts), -1, -1):
        base = "".join(f"{part}." for part in parts[:depth])
        words = list(CLASSIFIERS)
        if depth >= len(parts) - 1:  # torch.nn.Sequential(..., linear)
            words += sorted(
                {
                    name.removeprefix(base).split(".")[0]
                    for name in others
                    if re.match(re.escape(base) + r"\d+\.", name)
                }
            )
        for word in words:
            at = f"{base}{word}."
            below = {name[len(at) :]: name for name in others if name.startswith(at)}
            matches = [match for name in below if (match := LINEAR.match(name))]
            if not below or len(matches) < len(below) or len({m[1] for m in matches}) > 1:
                continue
            layer = {f"fc.{match[2]}": others[below[match[0]]] for match in matches}
            shape = tensors[layer["fc.weight"]].shape if "fc.weight" in layer else ()
            plain = (word, depth, matches[0][1]) == ("fc", len(parts), None)
            if plain or (len(shape) == 2 and shape[1] == features):
                found.append(layer)
    return found
