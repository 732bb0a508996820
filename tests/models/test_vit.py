"""Vision transformers: other packages' files give the same features, and nothing is lost."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from record_vits import images, weights
from test_advice import advice
from torch_reference import Transformer, torch

from qmx import models
from qmx.models import from_torch, vit, vit_layout
from qmx.models.from_torch import convert
from qmx.models.positions import RULES, resample
from qmx.models.to_torch import to_torch
from qmx.models.vit import FAMILIES, VITS, Arch
from qmx.models.vit_from_torch import at_size
from qmx.models.vit_names import LAYOUTS

RECORDED = {
    title: entry
    for path in sorted((ROOT / "tests/models").glob("recorded_vits_*.json"))
    for title, entry in json.loads(path.read_text()).items()
}
TOLERANCE = 1e-5  # of the features' spread over the images
TINY = {json.dumps(entry["arch"]): Arch(**entry["arch"]) for entry in RECORDED.values()}


@pytest.fixture
def tiny(monkeypatch):
    """tiny(title) -> (a recorded network's tensors, its entry); no larger one is known."""
    for module in (from_torch, models, vit_layout):
        monkeypatch.setattr(module, "VITS", TINY)

    def tensors(title):
        entry = RECORDED[title]
        return {name: weights(name, tuple(shape)) for name, shape in entry["names"].items()}, entry

    return tensors


@pytest.fixture(scope="module")
def features():
    """features(arch, params, x) -> class and mean, f32[B, 2 D]; compiled once for each network."""
    compiled = {}

    def run(arch, params, x):
        if (arch, x.shape) not in compiled:
            net = models.from_linen(vit.ViT(arch, "both"))
            compiled[arch, x.shape] = jax.jit(lambda params, x: net.apply(params, {}, x, False)[0])
        return np.asarray(compiled[arch, x.shape](params, x))

    return run


def off(ours, entry):
    """The largest difference, in deviations of the features over the images."""
    theirs = np.concatenate([np.array(entry["features"][kind]) for kind in ("class", "mean")], 1)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / theirs.std(0).mean()


@pytest.mark.parametrize("title", RECORDED)
def test_the_same_features(title, tiny, features):
    """Of every layout, with all parameters random; each tensor is used, or dropped by name."""
    tensors, entry = tiny(title)
    made = convert(tensors)
    arch = TINY[made.arch]
    assert arch == Arch(**entry["arch"])
    assert made.used + len(made.dropped) == len(tensors)
    for name in made.dropped:
        assert re.search("mask_token|pooler|head|classifier", name), name
    assert off(features(arch, made.backbone.params, images(arch.of.rope)), entry) < TOLERANCE


def test_bfloat16(tiny):
    """Its layers round to 8 bits; norms, softmax and features do not."""
    tensors, entry = tiny("timm dinov2")
    made = convert(tensors)
    net = models.from_linen(vit.ViT(TINY[made.arch], "both", jnp.bfloat16))
    ours, _ = jax.jit(lambda p, x: net.apply(p, {}, x, False))(made.backbone.params, images(False))
    assert ours.dtype == np.float32
    assert 1e-4 < off(np.asarray(ours), entry) < 0.1


def swapped(params):
    """The halves of the gated layer in the other order."""
    halves = {
        "kernel": lambda x: np.roll(x, x.shape[1] // 2, 1),
        "bias": lambda x: np.roll(x, len(x) // 2),
    }
    return {
        name: {**block, "fc1": {key: halves[key](x) for key, x in block["fc1"].items()}}
        if name.startswith("block_")
        else block
        for name, block in params.items()
    }


ROPE_TABLE, GELU = vit.rope_table, vit.nn.gelu


def rounded(*arguments):
    """The rotary table in bfloat16."""
    return tuple(x.astype(jnp.bfloat16).astype(np.float32) for x in ROPE_TABLE(*arguments))


@pytest.mark.parametrize(
    ("title", "detail"),
    [
        ("transformers dinov3", "tanh"),
        ("transformers dinov3", "rounded"),
        ("transformers dinov3", "base"),
        ("transformers dinov3", "square"),
        ("transformers dinov3 gated", "order"),
    ],
)
def test_wrong_details(title, detail, tiny, monkeypatch):
    """Each one that others got wrong shows."""
    tensors, entry = tiny(title)
    params = convert(tensors).backbone.params
    if detail == "tanh":
        monkeypatch.setattr(vit.nn, "gelu", lambda x, approximate: GELU(x, approximate=True))
    if detail == "rounded":
        monkeypatch.setattr(vit, "rope_table", rounded)
    if detail == "base":
        monkeypatch.setattr(vit, "ROPE_BASE", 10_000.0)
    if detail == "square":  # rows and columns by one number
        monkeypatch.setattr(
            vit, "rope_table", lambda h, w, d: [x[: h * w] for x in ROPE_TABLE(w, w, d)]
        )
    if detail == "order":
        params = swapped(params)
    net = models.from_linen(vit.ViT(Arch(**entry["arch"]), "both"))
    ours = jax.jit(lambda p, x: net.apply(p, {}, x, False)[0])(params, images(True))
    assert off(np.asarray(ours), entry) > 10 * TOLERANCE


# As transformers' configurations and the original repositories have them.
RULE = {"vit": "antialias", "vit_hf": "size", "dinov2": "offset", "dinov2_reg": "antialias"}
EPS = {"vit": 1e-6, "vit_hf": 1e-12, "dinov2": 1e-6, "dinov2_reg": 1e-6, "dinov3": 1e-5}


def as_timm(params, depth=1):
    """torch's tensors under timm's names, also those of its class Eva."""
    tensors = {name.replace(".gamma_", ".ls"): x for name, x in to_torch(params, {}).items()}
    tensors = {re.sub(r"(\.ls\d)$", r"\1.gamma", name): x for name, x in tensors.items()}
    for at in (f"blocks.{i}.attn." for i in range(depth)):
        if f"{at}q_bias" in tensors:
            q, v = tensors.pop(f"{at}q_bias"), tensors.pop(f"{at}v_bias")
            tensors[f"{at}qkv.bias"] = np.concatenate([q, np.zeros_like(q), v])
    return {name: torch.from_numpy(x).double() for name, x in tensors.items()}


@pytest.mark.parametrize("family", EPS)
def test_eps(family, monkeypatch):
    """Of all three norms, on tokens whose variance is about eps, so that it counts; ten times as
    much of it, or a tenth, shows. One patch, which rotary positions leave as it is."""
    registers, eps = 4 * (family in ("dinov2_reg", "dinov3")), EPS[family]
    arch = Arch(family, dim=16, depth=1, heads=2, hidden=32, patch=4, registers=registers)
    net = models.from_linen(vit.ViT(arch))
    x = np.random.default_rng(1).normal(size=(3, 4, 4, 3)).astype(np.float32)
    like = jax.eval_shape(lambda: net.init(jax.random.key(0), x))[0]
    rng = np.random.default_rng(0)

    def number(path, leaf):
        names = [key.key for key in path]
        value = rng.normal(size=leaf.shape) * (0.1 if leaf.ndim > 2 else 0.3)
        small = names[0] in ("patch", "patch_bias", "class", "registers", "positions")
        small = small or {"proj", "fc2"} & set(names)  # what is added to them
        return np.float32(value * eps**0.5 if small else value + (names[-1][:5] == "scale"))

    params = jax.tree_util.tree_map_with_path(number, like)
    their = Transformer(
        arch,
        4,
        eps,
        scale="scale1" in params["block_0"],
        channels=3,
        positions="positions" in params,
    ).double()
    their.load_state_dict(as_timm(params))
    with torch.no_grad():
        wanted = their(torch.from_numpy(x.transpose(0, 3, 1, 2)).double()).numpy()

    def largest():
        ours = net.apply(params, {}, x, False)[0]
        return np.abs(ours - wanted).max() / np.abs(wanted).max()

    assert largest() < TOLERANCE
    for factor in (10, 0.1):
        wrong = FAMILIES[family]._replace(eps=eps * factor)
        with monkeypatch.context() as patch:
            patch.setitem(FAMILIES, family, wrong)
            assert largest() > 0.01


def test_rules():
    """Each family's own: the original's where there is one, transformers' and timm's."""
    rules = {name: family.resample for name, family in FAMILIES.items() if not family.rope}
    assert rules == RULE


def theirs(table, side, rule):
    """A table of positions resampled by torch, as each code base calls it."""
    x = torch.from_numpy(table.transpose(2, 0, 1)[None])
    how = {"mode": "bicubic", "align_corners": False}
    if rule == "offset":
        scale = float(side + 0.1) / len(table)
        y = torch.nn.functional.interpolate(x, scale_factor=(scale, scale), **how)
    else:
        y = torch.nn.functional.interpolate(
            x, size=(side, side), antialias=rule == "antialias", **how
        )
    return y[0].numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", [16, 7, 40])
def test_positions(rule, side):
    """By each family's rule as by torch; another rule shows, and so does jax's own cubic."""
    table = np.random.default_rng(0).normal(size=(37, 37, 8))
    ours, std = resample(table, side, side, rule), table.std()
    assert np.abs(ours - theirs(table, side, rule)).max() < 1e-5 * std
    for other in set(RULES) - {rule}:
        if side < 37 or "antialias" not in (rule, other):
            assert np.abs(ours - resample(table, side, side, other)).max() > 0.05 * std, other
    if rule == "size" and side < 37:
        jaxs = jax.image.resize(table, ours.shape, "cubic", antialias=False)
        assert np.abs(ours - jaxs).max() > 0.05 * std
    assert resample(table, 37, 37, rule) is table


def test_size(tiny):
    """Positions are resampled once, by the family's rule; no size without whole patches."""
    made = convert(tiny("timm dinov2")[0])
    arch, before = TINY[made.arch], made.backbone.params["positions"]
    after = at_size(made.backbone, arch, 24).params["positions"]
    np.testing.assert_array_equal(after, resample(before, 6, 6, "offset"))
    assert at_size(made.backbone, arch, 16) is not None and before.shape == (4, 4, 32)
    with pytest.raises(
        ValueError, match="size 30 is no multiple of the patch of 4 pixels; 28 and 32"
    ):
        at_size(made.backbone, arch, 30)
    net = models.from_linen(vit.ViT(arch))
    with pytest.raises(ValueError, match="30 x 30 pixels have no whole patches of 4"):
        net.apply(made.backbone.params, {}, jnp.zeros((1, 30, 30, 3)), False)


# From transformers' names to those of the original repositories, written down apart from the table.
ORIGINAL = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.patch_embeddings", "patch_embed.proj"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("encoder.layer.", "blocks."),
    ("layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("attention.o_proj", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
    ("mlp.weights_in", "mlp.w12"),
    ("mlp.weights_out", "mlp.w3"),
)
VERSION_3 = {
    False: (("mlp.up_proj", "mlp.fc1"), ("mlp.down_proj", "mlp.fc2")),
    True: (("mlp.gate_proj", "mlp.w1"), ("mlp.up_proj", "mlp.w2"), ("mlp.down_proj", "mlp.w3")),
}


def original(tensors, gated):
    """The file that the original repository would have, from transformers' tensors."""
    v3 = "layer.0.attention.q_proj.weight" in tensors
    pairs = ORIGINAL + (VERSION_3[gated] if v3 else ())
    pairs += (("embeddings.register_tokens", "storage_tokens" if v3 else "register_tokens"),)
    result, parts = {}, {}
    for name, value in tensors.items():
        for theirs, its in pairs:
            name = re.sub(
                "^" + re.escape(theirs)
                if theirs[:5] in ("layer", "embed") and "lambda" not in theirs
                else re.escape(theirs),
                its,
                name,
            )
        if match := re.match(r"(blocks\.\d+\.)attention\.(?:attention\.)?([qkv])\w+\.(\w+)$", name):
            parts.setdefault(f"{match[1]}attn.qkv.{match[3]}", {})[match[2]] = value
        else:
            result[name] = value
    for name, three in parts.items():
        three.setdefault("k", np.full_like(three["q"], np.nan))  # masked in DINOv3
        result[name] = np.concatenate([three[part] for part in "qkv"])
        if v3 and name.endswith("bias"):
            result[f"{name}_mask"] = np.ones_like(result[name])
    if v3:
        result |= {"rope_embed.periods": np.ones(4, np.float32)}
        result |= {f"local_cls_norm.{kind}": np.ones(32, np.float32) for kind in ("weight", "bias")}
    return result


@pytest.mark.parametrize(
    "title",
    [f"{name}{gated}" for name in ("dinov2", "dinov2_reg", "dinov3") for gated in ("", " gated")],
)
def test_the_original_files(title, tiny):
    """facebookresearch's names are the same network as transformers'; biases of DINOv3's keys count
    for nothing."""
    tensors, entry = tiny(f"transformers {title}")
    ours = convert(original(tensors, entry["arch"].get("gated", False)))
    wanted = convert(tensors)
    assert ours.arch == wanted.arch
    jax.tree.map(np.testing.assert_array_equal, ours.backbone.params, wanted.backbone.params)


@pytest.mark.parametrize("title", [title for title in RECORDED if title.startswith("timm")])
def test_to_timm(title, tiny):
    """Back to timm's names and shapes, and the same network again."""
    tensors, entry = tiny(title)
    made = convert(tensors)
    back = to_torch({"backbone": made.backbone.params, "head": made.head or {}}, {"backbone": {}})
    kept = {name: value.shape for name, value in tensors.items() if name not in made.dropped}
    biases = {name for name in back if name.endswith(("q_bias", "v_bias"))} - kept.keys()
    assert {name: value.shape for name, value in back.items() if name not in biases} == kept
    assert all(value.flags.c_contiguous for value in back.values())
    assert not any(back[name].any() for name in biases)
    again = convert(back).backbone.params
    jax.tree.map(np.testing.assert_array_equal, again, made.backbone.params)


CLASSIFIERS = {
    "timm vit": ("head", ("class",)),
    "torchvision vit": ("heads.head", ("class",)),
    "transformers vit classifier": ("classifier", ("class",)),
    "transformers dinov2 classifier": ("classifier", ("class", "mean")),
}


@pytest.mark.parametrize("title", CLASSIFIERS)
def test_classifiers(title, tiny, features):
    """Of each package: the layer on the features that it reads there; back to timm's names, and the
    same again."""
    tensors, entry = tiny(title)
    name, read = CLASSIFIERS[title]
    made = convert(tensors)
    assert made.features == ("both" if len(read) > 1 else "class")
    theirs = np.concatenate([np.array(entry["features"][kind]) for kind in read], 1)
    wanted = theirs @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
    ours = features(TINY[made.arch], made.backbone.params, images(False))
    fc = made.head["fc"]
    ours = ours[:, : len(fc["kernel"])] @ fc["kernel"] + fc["bias"]
    assert np.abs(ours - wanted).max() < TOLERANCE * wanted.std(0).mean()
    assert not any(at.startswith(name) for at in made.dropped)
    back = to_torch({"backbone": made.backbone.params, "head": made.head}, {"backbone": {}})
    np.testing.assert_array_equal(back["head.weight"], tensors[f"{name}.weight"])
    again = convert(back)
    jax.tree.map(np.testing.assert_array_equal, again.head, made.head)


def test_no_classifier(tiny):
    """A hidden layer before it, another width, and DINOv3's, which may read either feature."""
    tensors, _ = tiny("torchvision vit")
    hidden = {f"heads.pre_logits.{kind}": np.ones(32, np.float32) for kind in ("weight", "bias")}
    made = convert(tensors | hidden)
    assert made.head is None and "heads.head.weight" in made.dropped
    assert convert(tensors | {"heads.head.weight": np.ones((5, 33), np.float32)}).head is None
    tensors, _ = tiny("timm dinov3")
    layer = {"head.weight": np.ones((5, 32), np.float32), "head.bias": np.ones(5, np.float32)}
    assert convert(tensors | layer).head is None


def test_refused(tiny):
    """A tensor that is unknown, missing or of another shape, by its name."""
    tensors, _ = tiny("transformers dinov3")
    name = "layer.1.attention.o_proj.weight"
    for changed, message in (
        ({**tensors, "layer.1.extra": np.ones(3, np.float32)}, r"unexpected: layer.1.extra \(3,\)"),
        ({key: x for key, x in tensors.items() if key != name}, f"missing: {name}"),
        ({**tensors, name: tensors[name][:5]}, rf"{name} is \(5, 32\) and should be \(32, 32\)"),
        ({**tensors, name: tensors[name].astype(int)}, f"not floating-point: {name}"),
        ({**tensors, name: tensors[name] * np.nan}, "not finite in 1 tensors: block_1/proj/kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(changed)
    other = next(name for name, arch in TINY.items() if arch.family == "vit")
    arch = advice(
        rf"and not {re.escape(other)}; set arch to (.*), or give", convert, tensors, other
    )
    assert convert(tensors, arch[1]).arch == arch[1]


def test_parts(tiny):
    """A file of teacher and student: which one is to be said; wrappers and other parts count for
    nothing."""
    tensors, _ = tiny("timm dinov2")
    student = {f"module.backbone.{name}": value + 1 for name, value in tensors.items()}
    teacher = {f"module.backbone.{name}": value for name, value in tensors.items()}
    head = {"module.head.mlp.0.weight": np.ones((3, 3), np.float32)}
    tables = {"student": student | head, "teacher": teacher | head}
    with pytest.raises(
        ValueError, match="2 networks: student.backbone, teacher.backbone; say which"
    ):
        from_torch.convert_tables(tables, what="dino.pth")
    made = from_torch.convert_tables(tables, part="teacher", what="dino.pth")
    wanted = convert(tensors).backbone.params
    jax.tree.map(np.testing.assert_array_equal, made.backbone.params, wanted)
    assert "module.head.mlp.0.weight" in made.dropped


@pytest.mark.parametrize(
    "name",
    [
        "vit_b16",
        "vit_s16_hf",
        "dinov2_vitb14_reg",
        "dinov2_vitg14",
        "dinov3_vits16plus",
        "dinov3_vith16plus",
    ],
)
def test_published_sizes(name):
    """Shapes tell the published networks apart, in each code base."""
    arch = VITS[name]
    for layout in LAYOUTS:
        if arch.family in layout.families:
            wanted = vit_layout.shapes(vit_layout.pieces(arch, layout, {}))
            found, at, _ = vit_layout.nearest(wanted)
            assert found == [name] and at.block == layout.block


def test_counts():
    """Parameters as published: DINOv2 S/14 22.06 M at 518 pixels, B/14 86.58 M; DINOv3 H+ 840 M."""
    for name, millions in {
        "dinov2_vits14": 22.06,
        "dinov2_vitb14": 86.58,
        "dinov3_vith16plus": 840.5,
    }.items():
        side = 518 if "dinov2" in name else 224
        net = models.backbone(name)
        made = jax.eval_shape(
            lambda net=net, side=side: net.init(jax.random.key(0), jnp.zeros((1, side, side, 3)))
        )
        count = sum(leaf.size for leaf in jax.tree.leaves(made[0])) / 1e6
        assert abs(count - millions) < 0.01 * millions, (name, count)
