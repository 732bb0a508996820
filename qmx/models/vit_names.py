"""Names of the published vision transformers' tensors, by code base.

A row of `LAYOUTS` is one code base. Files of transformers hold the names of its version 4; those
that version 5 has in memory, and `state_dict()` gives, are rows of their own.
"""

from typing import Any, NamedTuple


class Layout(NamedTuple):
    """Names of one code base, for some families. Names of layers stand for weight and bias."""

    title: str
    families: tuple[str, ...]
    patch: str
    cls: str
    positions: str
    registers: str
    norm: str  # the last
    block: str  # of each block's names; {} is its number
    norms: tuple[str, str]
    qkv: tuple[str, ...]  # one packed layer, or three
    proj: str
    scales: tuple[str, str]
    fc1: tuple[str, ...]
    gated: tuple[str, ...]  # the same of a gated network: packed, or the gate and the other
    fc2: str
    gated_fc2: str
    # of DINOv3's queries and values
    biases: tuple[str, ...] = ()


OWN = Layout(
    "facebookresearch/dinov2",
    ("dinov2", "dinov2_reg"),
    patch="patch_embed.proj",
    cls="cls_token",
    positions="pos_embed",
    registers="register_tokens",
    norm="norm",
    block="blocks.{}.",
    norms=("norm1", "norm2"),
    qkv=("attn.qkv",),
    proj="attn.proj",
    scales=("ls1.gamma", "ls2.gamma"),
    fc1=("mlp.fc1",),
    gated=("mlp.w12",),
    fc2="mlp.fc2",
    gated_fc2="mlp.w3",
)
TIMM = OWN._replace(  # also DINO's, iBOT's and MAE's own names
    title="timm",
    families=("vit", "dinov2", "dinov2_reg"),
    registers="reg_token",
    gated=("mlp.fc1",),
    gated_fc2="mlp.fc2",
)
EVA = TIMM._replace(  # timm's class of DINOv3
    title="timm, Eva",
    families=("dinov3",),
    scales=("gamma_1", "gamma_2"),
    gated=("mlp.fc1_g", "mlp.fc1_x"),
    biases=("attn.q_bias", "attn.v_bias"),
)
HF = OWN._replace(
    title="transformers, DINOv2",
    patch="embeddings.patch_embeddings.projection",
    cls="embeddings.cls_token",
    positions="embeddings.position_embeddings",
    registers="embeddings.register_tokens",
    norm="layernorm",
    block="encoder.layer.{}.",
    qkv=tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    proj="attention.output.dense",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    gated=("mlp.weights_in",),
    gated_fc2="mlp.weights_out",
)
IN_MEMORY: dict[str, Any] = {
    "qkv": tuple(f"attention.{part}_proj" for part in "qkv"),
    "proj": "attention.o_proj",
    "gated": ("mlp.gate_proj", "mlp.up_proj"),
    "gated_fc2": "mlp.down_proj",
}
HF_VIT = HF._replace(
    title="transformers, ViT",
    families=("vit_hf",),
    norms=("layernorm_before", "layernorm_after"),
    fc1=("intermediate.dense",),
    fc2="output.dense",
)
HF_DINOV3 = HF._replace(
    title="transformers, DINOv3",
    families=("dinov3",),
    patch="embeddings.patch_embeddings",
    norm="norm",
    block="layer.{}.",
    fc1=("mlp.up_proj",),
    fc2="mlp.down_proj",
    biases=("attention.q_proj.bias", "attention.v_proj.bias"),
    **IN_MEMORY,
)
LAYOUTS: tuple[Layout, ...] = (
    OWN,
    OWN._replace(
        title="facebookresearch/dinov3",
        families=("dinov3",),
        registers="storage_tokens",
        gated=("mlp.w1", "mlp.w2"),
        biases=("attn.qkv.bias",),
    ),
    TIMM,
    EVA,
    HF,
    HF._replace(title="transformers 5 in memory, DINOv2", **IN_MEMORY),
    HF_VIT,
    HF_VIT._replace(
        title="transformers 5 in memory, ViT",
        block="layers.{}.",
        fc1=("mlp.fc1",),
        fc2="mlp.fc2",
        **IN_MEMORY,
    ),
    HF_DINOV3,
    HF_DINOV3._replace(title="transformers 5 in memory, DINOv3", block="model.layer.{}."),
    Layout(
        "torchvision",
        ("vit",),
        patch="conv_proj",
        cls="class_token",
        positions="encoder.pos_embedding",
        registers="",
        norm="encoder.ln",
        block="encoder.layers.encoder_layer_{}.",
        norms=("ln_1", "ln_2"),
        qkv=("self_attention.in_proj_",),
        proj="self_attention.out_proj",
        scales=("", ""),
        fc1=("mlp.0",),
        gated=(),
        fc2="mlp.3",
        gated_fc2="",
    ),
)
LAYOUTS += (
    LAYOUTS[-1]._replace(title="torchvision 0.12", fc1=("mlp.linear_1",), fc2="mlp.linear_2"),
)
