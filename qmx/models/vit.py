"""Vision transformers up to their features: ViT, DINOv2 and DINOv3.

Dosovitskiy et al. 2021, Oquab et al. 2024 and Darcet et al. 2024 (registers), Siméoni et al. 2025.
The families differ in few places, which `Family` and `Arch` name. Two things are the same function
of other numbers than in the published files (`qmx.models.vit_layout`): the class token's own
position is added to it, and keys of DINOv3 have no bias, because theirs is multiplied by zero.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qmx.augment import IMAGENET_MEAN, IMAGENET_STD
from qmx.contract import wide
from qmx.models.norm import drawn

FEATURES = ("class", "mean", "both")
ROPE_BASE = 100.0  # of DINOv3's periods; RoFormer has 10,000
# Truncated normal of 0.02, of all weights (DINOv2, DINOv3, timm).
normal = drawn(nn.initializers.truncated_normal(0.02))


class Family(NamedTuple):
    """Settings that the members of a family share."""

    eps: float = 1e-6  # of the layer norms
    scale: bool = False  # a factor for each channel of each branch's result
    rope: bool = False  # rotary positions, and no table of them
    # How its own code resamples positions to another size; see `qmx.models.positions`.
    resample: str = "antialias"
    # The images that it is shown; () where several schools train networks of one form.
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: int = 224  # side of the table of positions' images
    licence: str = ""  # of the published weights; "" where the file does not tell


APACHE = "Apache-2.0"
DINOV3 = (
    "DINOv3 License of 2025-08-19 (the weights, and what derives from them, may be passed on under"
    " the same agreement alone, with a copy of it)"
)
FAMILIES = {
    # ViTs with timm's, torchvision's or the original names: timm's see 0.5 and 0.5, torchvision's,
    # DINO's, iBOT's and MAE's ImageNet's mean and std.
    "vit": Family(mean=(), std=()),
    "vit_hf": Family(1e-12, resample="size", mean=(0.5,) * 3, std=(0.5,) * 3),
    "dinov2": Family(scale=True, resample="offset", size=518, licence=APACHE),
    "dinov2_reg": Family(scale=True, size=518, licence=APACHE),
    "dinov3": Family(1e-5, scale=True, rope=True, licence=DINOV3),
}


class Arch(NamedTuple):
    """Settings that tell the members of a family apart."""

    family: str  # one of `FAMILIES`
    dim: int  # D
    depth: int
    heads: int
    hidden: int  # of the two layers after the attention
    patch: int
    registers: int = 0
    gated: bool = False  # silu(x W) * (x V) for gelu(x W)

    @property
    def of(self) -> Family:
        return FAMILIES[self.family]


SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}
VITS = {
    **{
        f"vit_{size}16{mark}": Arch(f"vit{mark}", *shape, 4 * shape[0], 16)
        for mark in ("", "_hf")
        for size, shape in SIZES.items()
    },
    **{
        f"dinov2_vit{size}14{mark}": Arch(f"dinov2{mark}", *shape, hidden, 14, registers, gated)
        for mark, registers in {"": 0, "_reg": 4}.items()
        for size, shape, hidden, gated in (
            *((size, shape, 4 * shape[0], False) for size, shape in SIZES.items()),
            ("g", (1536, 40, 24), 4096, True),
        )
    },
    **{
        f"dinov3_vit{size}16": Arch("dinov3", *shape, 4 * shape[0], 16, 4)
        for size, shape in SIZES.items()
    },
    "dinov3_vits16plus": Arch("dinov3", 384, 12, 6, 1536, 16, 4, gated=True),
    "dinov3_vith16plus": Arch("dinov3", 1280, 32, 20, 5120, 16, 4, gated=True),
}


def rope_table(height: int, width: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """DINOv3's (cosines, sines) of each patch, f32[height * width, dim].

    The first quarter of the angles is the row's, the second the column's, and the other half
    repeats them. Rows and columns lie in -1..1, each by their own number.

    Args:
      dim: of one head.
    """
    rows, columns = ((np.arange(n) + 0.5) / n * 2 - 1 for n in (height, width))
    places = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    periods = ROPE_BASE ** (np.arange(dim // 4) / (dim / 4))
    angles = (2 * math.pi * places[:, :, None] / periods).reshape(len(places), -1)
    angles = np.tile(angles, 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: jax.Array, table: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """Turn the patches of [B, heads, T, d] by their angles; tokens before them stay."""
    cosines, sines = table
    first = x.shape[2] - len(cosines)
    patches = wide(x[:, :, first:])
    one, two = jnp.split(patches, 2, -1)
    turned = patches * cosines + jnp.concatenate([-two, one], -1) * sines
    return jnp.concatenate([x[:, :, :first], turned.astype(x.dtype)], 2)


class Block(nn.Module):
    """Attention, and two layers with a nonlinearity between them, each beside a shortcut.

    Each image skips each of the two branches as often as `skipped` says, and a branch that is not
    skipped counts 1 / (1 - skipped) times: stochastic depth, Huang et al. 2016. It draws from
    "dropout". None draws nothing.
    """

    arch: Arch
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        table: tuple[np.ndarray, np.ndarray] | None,
        skipped: jax.Array | float | None = None,
    ) -> jax.Array:
        arch, family = self.arch, self.arch.of
        exact = jnp.promote_types(self.dtype, jnp.float32)

        def norm(name: str, x: jax.Array) -> jax.Array:
            made = nn.LayerNorm(
                family.eps, exact, exact, use_fast_variance=False, name=name
            )  # in one pass, variances of large values lose their digits
            return made(x).astype(self.dtype)

        def dense(name: str, features: int, x: jax.Array, bias: bool = True) -> jax.Array:
            return nn.Dense(features, bias, self.dtype, exact, kernel_init=normal, name=name)(x)

        def scaled(name: str, x: jax.Array) -> jax.Array:
            if not family.scale:
                return x
            ones = nn.initializers.ones
            return x * self.param(name, ones, (arch.dim,), exact).astype(self.dtype)

        def branch(x: jax.Array) -> jax.Array:
            if skipped is None:
                return x
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - skipped, (len(x), 1, 1))
            return jnp.where(kept, x / (1 - skipped), 0).astype(x.dtype)

        y = norm("norm1", x)
        y = dense("qkv", 3 * arch.dim, y, bias=not family.rope)
        if family.rope:
            bias = self.param("qv_bias", nn.initializers.zeros, (2, arch.dim), exact)
            bias = jnp.stack([bias[0], jnp.zeros_like(bias[0]), bias[1]]).ravel()
            y = y + bias.astype(self.dtype)
        # Each head's tokens beside each other: products of them are quicker so.
        q, k, v = y.reshape(*y.shape[:2], 3, arch.heads, -1).transpose(2, 0, 3, 1, 4)
        if table:
            q, k = rotate(q, table), rotate(k, table)
        y = attention(q, k, v).swapaxes(1, 2).reshape(x.shape)
        x = x + branch(scaled("scale1", dense("proj", arch.dim, y)))

        y = norm("norm2", x)
        if arch.gated:
            gate, y = jnp.split(dense("fc1", 2 * arch.hidden, y), 2, -1)
            y = nn.silu(gate) * y
        else:
            y = nn.gelu(dense("fc1", arch.hidden, y), approximate=False)
        return x + branch(scaled("scale2", dense("fc2", arch.dim, y)))


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention, each [B, heads, T, d].

    The softmax is in float32, or in float64 if q is; jax.nn.dot_product_attention's is in float32.
    """
    exact = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=exact)
    weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1]))
    return jnp.einsum("bhts,bhsd->bhtd", weights.astype(v.dtype), v)


class ViT(nn.Module):
    """f32[B, H, W, 3] -> features f32[B, F]; H and W are multiples of the patch.

    Attributes:
      arch: one of `VITS`, or another.
      features: "class", the class token (F = D); "mean" of the patches (F = D); "both", one after
        the other (F = 2 D). All after the last norm.
      dtype: of the layers; parameters, norms, softmax and features are float32, or float64 if
        `dtype` is.
      drop_path: how often an image skips a branch of the last block in training; see `Block`. From
        the first block, which skips nothing, to the last it rises linearly, as in timm.
    """

    arch: Arch
    features: str = "class"
    dtype: Any = jnp.float32
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        arch, patch, dim = self.arch, self.arch.patch, self.arch.dim
        exact = jnp.promote_types(self.dtype, jnp.float32)
        batch, height, width, channels = x.shape
        if height % patch or width % patch:
            raise ValueError(
                f"images of {height} x {width} pixels have no whole patches of {patch}; show them"
                f" at {max(height // patch, 1) * patch} x {max(width // patch, 1) * patch}"
            )
        rows, columns = height // patch, width // patch
        # Each patch is one matrix product's row: its own convolution is slower on CPUs.
        kernel = self.param("patch", normal, (patch, patch, channels, dim), exact)
        bias = self.param("patch_bias", nn.initializers.zeros, (dim,), exact)
        x = x.astype(self.dtype).reshape(batch, rows, patch, columns, patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        x = x @ kernel.reshape(-1, dim).astype(self.dtype) + bias.astype(self.dtype)

        table = None
        if arch.of.rope:
            table = rope_table(rows, columns, dim // arch.heads)
        else:
            positions = self.param("positions", normal, (rows, columns, dim), exact)
            x = x + positions.reshape(-1, dim).astype(self.dtype)
        tokens = self.param("class", normal, (1, dim), exact)
        if arch.registers:
            registers = self.param("registers", normal, (arch.registers, dim), exact)
            tokens = jnp.concatenate([tokens, registers])
        tokens = jnp.broadcast_to(tokens.astype(self.dtype), (batch, *tokens.shape))
        x = jnp.concatenate([tokens, x], 1)
        if self.is_initializing():
            for number in range(arch.depth):
                x = Block(arch, self.dtype, name=f"block_{number}")(x, table)
        else:
            x = self.through_blocks(x, table, train)
        x = nn.LayerNorm(arch.of.eps, exact, exact, use_fast_variance=False, name="norm")(x)
        parts = {"class": x[:, 0], "mean": x[:, 1 + arch.registers :].mean(1)}
        return jnp.concatenate(
            [*parts.values()] if self.features == "both" else [parts[self.features]], -1
        )

    def through_blocks(
        self, x: jax.Array, table: tuple[np.ndarray, np.ndarray] | None, train: bool
    ) -> jax.Array:
        """[B, T, D] through all blocks, by a loop over their parameters.

        Without a loop XLA computes each block's shortcut anew in every later one, and in the
        gradient in every earlier one: on CPUs a train step took 1.7 times as long. For the gradient
        products are kept, and the rest is computed anew: a tenth quicker than to keep all.
        """
        depth, params = self.arch.depth, self.variables["params"]
        block = Block(self.arch, self.dtype, parent=None)
        each = [params[f"block_{number}"] for number in range(depth)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        skipped = keys = None
        if train and self.drop_path:
            skipped = self.drop_path * jnp.arange(depth) / max(depth - 1, 1)
            keys = jax.random.split(self.make_rng("dropout"), depth)

        def through(x: jax.Array, one: tuple) -> tuple[jax.Array, None]:
            params, skipped, key = one
            rngs = None if key is None else {"dropout": key}
            return block.apply({"params": params}, x, table, skipped, rngs=rngs), None  # type: ignore[return-value]

        through = jax.checkpoint(
            through, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
        )
        return jax.lax.scan(through, x, (stacked, skipped, keys))[0]
