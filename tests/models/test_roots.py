"""Networks under the names of public code: found, told apart, and what is beside them dropped by
name."""

import json

import jax
import numpy as np
import pytest
import torch_reference as reference
from conftest import ROOT
from test_from_torch import bn, body, linear, prefixed, same_backbone
from torch_reference import torch

from qmx.models import from_torch
from qmx.models.resnet import ARCHS

WIDTH = 64


def network(seed):
    """A ResNet-8 of 10 classes."""
    return reference.released(ARCHS["resnet8"], 10, seed=seed, side=32).state_dict()


STATE, OTHER = network(0), network(1)
FC = {name: value for name, value in STATE.items() if name.startswith("fc.")}


def load(content, tmp_path, part="", **more):
    torch.save(content, tmp_path / "net.pth")
    return from_torch.load(f"{tmp_path / 'net.pth'}{part}", **more)


def named(state, *pairs):
    """A state with parts of its names replaced."""
    for old, new in pairs:
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


def hugging_face(state):
    """transformers' names."""
    kinds, result = {"conv": "convolution", "bn": "normalization"}, {}
    for name, value in body(state).items():
        first, *rest = name.split(".")
        if not first.startswith("layer"):
            result[f"embedder.embedder.{kinds[first[:-1]]}.{rest[0]}"] = value
            continue
        block, part, *leaf = rest
        at = f"encoder.stages.{int(first[5:]) - 1}.layers.{block}"
        if part == "downsample":
            kind = ("convolution", "normalization")[int(leaf[0])]
            result[f"{at}.shortcut.{kind}.{leaf[1]}"] = value
        else:
            result[f"{at}.layer.{int(part[-1]) - 1}.{kinds[part[:-1]]}.{leaf[0]}"] = value
    return result


def numbered(state, layers):
    """Names of torch.nn.Sequential(*network.children())."""
    numbers = {"conv1": 0, "bn1": 1} | {f"layer{k + 1}": at for k, at in enumerate(layers)}
    return {
        ".".join([str(numbers[name.split(".")[0]]), *name.split(".")[1:]]): value
        for name, value in body(state).items()
    }


# Whole networks with a classifier, in the names of public code.
TARGETS = {
    "torchvision": STATE,
    "compiled, in DataParallel": prefixed("module._orig_mod.", STATE),
    "DataParallel, compiled": prefixed("_orig_mod.module.", STATE),
    "each layer compiled": named(STATE, ("layer1.0.", "layer1.0._orig_mod.")),
    "FSDP": prefixed("_fsdp_wrapped_module.", named(STATE, (".0.", ".0._fsdp_wrapped_module."))),
    "Lightning": {"state_dict": prefixed("model.", STATE), "epoch": 1, "hyper_parameters": {}},
    "deeper": {"model_state_dict": prefixed("model.module.net.", STATE)},
    "net": {"net": STATE, "acc": 95.0},
    "only a teacher": {"teacher": prefixed("module.", STATE)},
    "two deep": {"checkpoint": {"model": {"weights": STATE}}},
    "mmpretrain": {
        "meta": {},
        "state_dict": prefixed("backbone.", body(STATE)) | prefixed("head.", FC),
    },
    "kuangliu": prefixed("module.", named(STATE, ("downsample", "shortcut"), ("fc.", "linear."))),
    "dropout": named(STATE, ("fc.", "fc.1.")),
    "timm's head": named(STATE, ("fc.", "head.fc.")),
    "last_linear": named(STATE, ("fc.", "last_linear.")),
    "trunk": prefixed("trunk.resnet.", body(STATE))
    | prefixed("classifier.", {"weight": FC["fc.weight"], "bias": FC["fc.bias"]}),
    "transformers": prefixed("resnet.", hugging_face(STATE))
    | prefixed("classifier.1.", {"weight": FC["fc.weight"], "bias": FC["fc.bias"]}),
    "Sequential of two": prefixed("0.", body(STATE)) | named(FC, ("fc.", "1.")),
    "Sequential of children": prefixed("features.", numbered(STATE, (4, 5, 6))) | FC,
    "one Sequential": numbered(STATE, (3, 4, 5)) | named(FC, ("fc.", "8.")),
}


@pytest.mark.parametrize("content", TARGETS.values(), ids=TARGETS)
def test_targets(tmp_path, content):
    """W1, W2: the encoder and the classifier, to the bit, and only counters are dropped."""
    found = load(content, tmp_path)
    assert found.arch == "resnet8" and found.used == 47
    same_backbone(found, STATE)
    np.testing.assert_array_equal(found.head["fc"]["kernel"], FC["fc.weight"].numpy().T)
    np.testing.assert_array_equal(found.head["fc"]["bias"], FC["fc.bias"].numpy())
    assert len(found.dropped) == 9 and all("num_batches" in name for name in found.dropped)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_names_of_packages(arch):
    """torchvision 0.29.1's and timm 1.0.31's own networks have the names and shapes of the ones
    that the tests compare with. Both were compared by hand too, in plain files, under Lightning's
    and torch.compile's names and as an average: the scores differ by 3e-6 of their spread."""
    recorded = json.loads((ROOT / "tests/models/recorded_resnets.json").read_text())[arch]
    state = reference.released(ARCHS[arch], 10, side=32).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == recorded


HEAD = linear("projector.0", 32, WIDTH, bias=False) | bn("projector.1", 32)
ENCODERS = {
    "swav": (
        prefixed("module.", body(STATE) | linear("prototypes", 30, 16, bias=False))
        | prefixed("module.projection_head.", linear("0", 64, WIDTH) | bn("1", 64)),
        {"prototypes.*", "projection_head.*"},
    ),
    "barlow twins": (
        {"model": prefixed("module.", prefixed("backbone.", body(STATE)) | HEAD)},
        {"projector.*"},
    ),
    "solo-learn": (
        {
            "state_dict": prefixed("backbone.", body(STATE))
            | prefixed("momentum_backbone.", body(OTHER))
            | HEAD
            | linear("classifier", 10, WIDTH)
            | {"queue": torch.randn(2, 8, 64), "queue_ptr": torch.zeros(1)}
        },
        {"momentum_backbone.*", "projector.*", "classifier.*", "queue", "queue_ptr"},
    ),
    "lightly": (
        {
            "state_dict": prefixed("backbone.", numbered(STATE, (4, 5, 6)))
            | prefixed("backbone_momentum.", numbered(OTHER, (4, 5, 6)))
            | prefixed("projection_head.layers.", linear("0", 64, WIDTH))
        },
        {"backbone_momentum.*", "projection_head.*"},
    ),
    "moco v1": (
        prefixed("module.encoder_q.", body(STATE) | linear("fc", 128, WIDTH))
        | prefixed("module.encoder_k.", body(OTHER) | linear("fc", 128, WIDTH))
        | {"module.queue": torch.randn(128, 8)},
        {"encoder_q.fc.*", "encoder_k.*", "queue"},
    ),
    "supcon": (
        {
            "model": prefixed("encoder.", named(body(STATE), ("downsample", "shortcut")))
            | prefixed("head.", linear("0", WIDTH, WIDTH) | linear("2", 128, WIDTH)),
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
        },
        {"head.*"},
    ),
    "vissl": (
        {
            "classy_state_dict": {
                "base_model": {
                    "model": {
                        "trunk": prefixed("_feature_blocks.", body(STATE)),
                        "heads": linear("0.clf.0", 128, WIDTH),
                    }
                }
            }
        },
        set(),
    ),
}


@pytest.mark.parametrize("content, dropped", ENCODERS.values(), ids=ENCODERS)
def test_encoders(tmp_path, content, dropped):
    """W1: heads, queues, probes and momentum copies stand beside the network and are named."""
    found = load(content, tmp_path)
    same_backbone(found, STATE)
    assert (found.arch, found.head, found.used) == ("resnet8", None, 45)
    groups = {from_torch.group_of(name, found.root) for name in found.dropped}
    assert groups == dropped | {"num_batches_tracked"}


SEVERAL = {  # content, the names in the message, one of them, the same shorter
    "average": (
        {"state_dict": STATE, "state_dict_ema": OTHER},
        "state_dict, state_dict_ema",
        ("state_dict_ema",),
    ),
    "dino": (
        {
            "student": prefixed("module.backbone.", body(STATE)),
            "teacher": prefixed("backbone.", body(OTHER)),
        },
        "student.backbone, teacher.backbone",
        ("teacher.backbone", "teacher"),
    ),
    "one dict": (
        {"state_dict": prefixed("model.", STATE) | prefixed("ema.module.", OTHER)},
        "state_dict.model, state_dict.ema",
        ("state_dict.ema", "ema", "ema.module"),
    ),
    "byol": (
        prefixed("online_encoder.net.", body(STATE)) | prefixed("target_encoder.net.", body(OTHER)),
        "online_encoder.net, target_encoder.net",
        ("target_encoder",),
    ),
    "beside": ({**STATE, "averaged": OTHER}, "., averaged", ("averaged",)),
}


@pytest.mark.parametrize("content, labels, parts", SEVERAL.values(), ids=SEVERAL)
def test_two_networks_in_a_file(tmp_path, content, labels, parts):
    """W3: one is never guessed; FILE#PART says which, and the other is dropped by name."""
    with pytest.raises(ValueError) as error:
        load(content, tmp_path)
    text = str(error.value)
    assert f"net.pth holds 2 networks: {labels}; say which with {tmp_path}/net.pth#" in text
    proposed = text.rpartition("#")[2].removesuffix(", for instance")
    for part in (proposed, *parts):
        same_backbone(load(content, tmp_path, f"#{part}"), OTHER)
    first = labels.split(", ")[0]
    found = load(content, tmp_path, f"#{first}")
    same_backbone(found, STATE)
    assert len(found.dropped) >= 45 + 9
    with pytest.raises(ValueError, match="net.pth#none: none is none of the networks in the file"):
        load(content, tmp_path, "#none")


def test_a_momentum_copy_can_be_chosen(tmp_path):
    content = ENCODERS["solo-learn"][0]
    same_backbone(load(content, tmp_path, "#momentum_backbone"), OTHER)


def test_equal_networks_are_one(tmp_path):
    """robustness keeps the model under two names."""
    content = prefixed("module.model.", STATE) | prefixed("module.attacker.model.", STATE)
    found = load({"model": content}, tmp_path)
    same_backbone(found, STATE)
    assert found.used == 47


def test_a_damaged_network_is_not_replaced_by_another(tmp_path):
    content = dict(ENCODERS["moco v1"][0])
    del content["module.encoder_q.layer1.0.conv1.weight"]
    with pytest.raises(ValueError, match="missing: module.encoder_q.layer1.0.conv1.weight$"):
        load(content, tmp_path)


def test_a_name_with_a_number_sign_is_a_file(tmp_path):
    torch.save(STATE, tmp_path / "net#1.pth")
    same_backbone(from_torch.load(tmp_path / "net#1.pth"), STATE)
    with pytest.raises(ValueError, match="there is no file .*none.pth"):
        from_torch.load(tmp_path / "none.pth#ema")


def test_two_classifiers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 classifiers: fc.weight, head.weight; save"):
        load(STATE | named(FC, ("fc.", "head.")), tmp_path)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="conv1.weight and module.conv1.weight are both conv1.w"):
        load(STATE | {"module.conv1.weight": STATE["conv1.weight"]}, tmp_path)


@pytest.mark.slow
def test_a_stem_that_shapes_do_not_tell(tmp_path):
    """W5: a 3x3 stem with and without max-pool; the architecture must be said, and is kept."""
    scores = {}
    for arch in ("resnet18_small", "resnet18_small_pool"):
        net = reference.released(ARCHS[arch], 10, side=32)
        with pytest.raises(
            ValueError, match="shapes of resnet18_small and of resnet18_small_pool, .*--arch="
        ):
            load(net.state_dict(), tmp_path)
        found = load(net.state_dict(), tmp_path, arch=arch)
        assert found.arch == arch
        scores[arch] = jax.tree.map(np.shape, found.backbone)
    assert scores["resnet18_small"] == scores["resnet18_small_pool"]
    with pytest.raises(ValueError, match="holds resnet18_small or resnet18_small_pool and not res"):
        load(net.state_dict(), tmp_path, arch="resnet18")
