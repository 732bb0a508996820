"""Record tiny vision transformers of other packages: names, shapes and features.

    python tests/models/record_vits.py transformers    (pip install torch transformers)
    python tests/models/record_vits.py timm            (pip install torch timm)
    python tests/models/record_vits.py torchvision     (pip install torch torchvision)

Writes tests/models/recorded_vits_PACKAGE.json, which test_vit.py reads, so that it needs none of
the packages; test_transformers.py uses transformers itself. Files of transformers are those that
`save_pretrained` writes. The weights are those of `weights` below, and all of them count. Features
are computed in float64.
"""

import json
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np

TINY = {"dim": 32, "depth": 2, "heads": 2, "patch": 4}
SHAPES = {False: (4, 16, 16, 3), True: (4, 16, 24, 3)}  # True: with rotary positions


def weights(name, shape):
    """Numbers for a tensor, by its name alone."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if len(shape) == 1:
        factor = name.endswith(("weight", "gamma", "lambda1", "gamma_1", "gamma_2"))
        return (factor + 0.3 * drawn).astype(np.float32)
    if len(shape) == 3 or "token" in name:
        return (0.5 * drawn).astype(np.float32)
    return (drawn / np.prod(shape[1:]) ** 0.5).astype(np.float32)


def images(rope):
    """The images, f32[4, H, W, 3]."""
    return np.random.default_rng(0).normal(size=SHAPES[rope]).astype(np.float32)


def filled(net):
    """A module with the numbers of `weights` under its own names, in float64."""
    import torch

    for name, value in net.named_parameters():
        value.data = torch.from_numpy(weights(name, tuple(value.shape)))
    return net.eval().double()


def tensors(rope):
    import torch

    return torch.from_numpy(images(rope).transpose(0, 3, 1, 2)).double()


def entry(arch, shapes, tokens):
    """What is kept of a network; `tokens` f64[4, T, D] after the last norm."""
    first = 1 + arch.get("registers", 0)
    tokens = tokens.detach().numpy()
    features = {"class": tokens[:, 0], "mean": tokens[:, first:].mean(1)}
    return {
        "arch": {**TINY, **arch},
        "names": {name: list(shape) for name, shape in sorted(shapes.items())},
        "features": {key: value.round(9).tolist() for key, value in features.items()},
    }


def networks_of_transformers():
    """(title, class, configuration, arch) of each."""
    import transformers as hf

    common = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    wide, four = {"intermediate_size": 128}, {"num_register_tokens": 4}
    v2 = {"family": "dinov2", "hidden": 128}
    reg = {"family": "dinov2_reg", "hidden": 128, "registers": 4}
    v3 = {"family": "dinov3", "hidden": 128, "registers": 4}
    gated = {"gated": True, "hidden": 88}
    vit = {"family": "vit_hf", "hidden": 128}
    silu = {"hidden_act": "silu"}  # as the published files of S+ and H+ say
    return (
        ("dinov2", hf.Dinov2Model, hf.Dinov2Config(**common), v2),
        (
            "dinov2 gated",
            hf.Dinov2Model,
            hf.Dinov2Config(**common, use_swiglu_ffn=True),
            {**v2, **gated},
        ),
        (
            "dinov2 classifier",
            hf.Dinov2ForImageClassification,
            hf.Dinov2Config(**common),
            v2,
        ),
        (
            "dinov2_reg",
            hf.Dinov2WithRegistersModel,
            hf.Dinov2WithRegistersConfig(**common, **four),
            reg,
        ),
        (
            "dinov2_reg gated",
            hf.Dinov2WithRegistersModel,
            hf.Dinov2WithRegistersConfig(**common, **four, use_swiglu_ffn=True),
            {**reg, **gated},
        ),
        ("dinov3", hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**common, **wide, **four), v3),
        (
            "dinov3 gated",
            hf.DINOv3ViTModel,
            hf.DINOv3ViTConfig(**common, **four, intermediate_size=64, use_gated_mlp=True, **silu),
            {**v3, "gated": True, "hidden": 64},
        ),
        ("vit", hf.ViTModel, hf.ViTConfig(**common, **wide), vit),
        ("vit classifier", hf.ViTForImageClassification, hf.ViTConfig(**common, **wide), vit),
    )


def body(net):
    """The network below a classifier of transformers, or the network itself."""
    return getattr(net, "vit", getattr(net, "dinov2", net))


def of_transformers():
    import torch
    from safetensors.numpy import load_file, save_file

    for title, model, config, arch in networks_of_transformers():
        net = model(config)
        with tempfile.TemporaryDirectory() as folder:
            net.save_pretrained(folder)
            path = Path(folder) / "model.safetensors"
            shapes = {name: value.shape for name, value in load_file(path).items()}
            numbers = {name: weights(name, shape) for name, shape in shapes.items()}
            save_file(numbers, path, {"format": "pt"})
            net = model.from_pretrained(folder, dtype=torch.float64).eval()
        with torch.no_grad():
            tokens = body(net)(tensors("dinov3" in title)).last_hidden_state
        yield title, entry(arch, shapes, tokens)
        memory = {name: tuple(value.shape) for name, value in model(config).state_dict().items()}
        with torch.no_grad():
            net = filled(model(config))
            tokens = body(net)(tensors("dinov3" in title)).last_hidden_state
        yield f"{title} in memory", entry(arch, memory, tokens)


def of_timm():
    import torch
    from timm.layers import SwiGLUPacked
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    common = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    v2 = {"family": "dinov2", "hidden": 128}
    reg = {"family": "dinov2_reg", "hidden": 128, "registers": 4}
    v3 = {"family": "dinov3", "hidden": 128, "registers": 4}
    gated = {"gated": True, "hidden": 88}
    ls, regs = {"init_values": 1e-5}, {"reg_tokens": 4, "no_embed_class": True}
    packed = {"mlp_ratio": 5.5, "mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    # As `vit_small_patch16_dinov3` and `_qkvb` give them to Eva.
    eva = {
        **{"dynamic_img_size": True, "init_values": 1e-5, "rope_type": "dinov3"},
        **{"rope_temperature": 100, "use_rot_pos_emb": True, "use_abs_pos_emb": False},
        **{"rope_rotate_half": True, "use_fc_norm": False, "num_reg_tokens": 4},
        "norm_layer": partial(torch.nn.LayerNorm, eps=1e-5),
    }
    for title, model, more, arch in (
        ("vit", VisionTransformer, {"num_classes": 5}, {"family": "vit", "hidden": 128}),
        ("dinov2", VisionTransformer, ls, v2),
        ("dinov2 gated", VisionTransformer, ls | packed, {**v2, **gated}),
        ("dinov2_reg", VisionTransformer, ls | regs, reg),
        (
            "dinov2_reg gated",
            VisionTransformer,
            ls | regs | packed,
            {**reg, **gated},
        ),
        ("dinov3", Eva, {**eva, "qkv_bias": False}, v3),
        ("dinov3 qkvb", Eva, {**eva, "qkv_bias": True}, v3),
        (
            "dinov3 gated",
            Eva,
            {**eva, "qkv_bias": False, "swiglu_mlp": True, "swiglu_align_to": 8},
            {**v3, "gated": True, "hidden": 128},
        ),
    ):
        net = filled(model(**{**common, "num_classes": 0, **more}))
        with torch.no_grad():
            tokens = net.forward_features(tensors("dinov3" in title))
        shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
        yield title, entry(arch, shapes, tokens)


def of_torchvision():
    import torch
    from torchvision.models.vision_transformer import VisionTransformer

    net = filled(VisionTransformer(16, 4, 2, 2, 32, 128, num_classes=5))
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    with torch.no_grad():
        x = net._process_input(tensors(False))
        x = torch.cat([net.class_token.expand(len(x), -1, -1), x], 1)
        tokens = net.encoder(x)
    yield "vit", entry({"family": "vit", "hidden": 128}, shapes, tokens)


if __name__ == "__main__":
    package = sys.argv[1]
    recorded = {f"{package} {title}": kept for title, kept in globals()[f"of_{package}"]()}
    out = Path(__file__).parent / f"recorded_vits_{package}.json"
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(kept)}" for key, kept in recorded.items())
    out.write_text(f"{{\n{lines}\n}}\n")
