"""ResNet and ResNeXt (v1.5: the 3x3 has the stride), up to the pooled features.

He et al. 2016 and Xie et al. 2017, with the layout, padding and initialisation of torchvision's
`models/resnet.py`. The layers have its names ("layer1.0.conv1" is `layer1_0/conv1`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qmx.contract import wide
from qmx.models.conv import convolve
from qmx.models.norm import BatchNorm, drawn
from qmx.models.pool import max_pool

# Kaiming normal with fan_out, as torchvision initialises every convolution.
kaiming_normal = drawn(nn.initializers.variance_scaling(2.0, "fan_out", "normal"))


class Arch(NamedTuple):
    """Settings that tell the members of the family apart."""

    blocks: tuple[int, ...]  # residual blocks of each stage
    bottleneck: bool
    width: int = 64  # planes of the first stage, doubled at each next one
    groups: int = 1  # of the 3x3 convolutions; 32 in ResNeXt
    width_per_group: int = 64
    # "large": 7x7 stride 2 and max-pool; "small": 3x3 stride 1 (32 px and less); "small_pool":
    # that and the max-pool (64 or 96 px).
    stem: str = "large"


ARCHS = {
    # He et al. 2016, section 4.2, n = 1, with projections for shortcuts: quick on a CPU.
    "resnet8": Arch((1, 1, 1), bottleneck=False, width=16, stem="small"),
    # A quarter of the operations of resnet8.
    "resnet8_narrow": Arch((1, 1, 1), bottleneck=False, width=8, stem="small"),
    # Less than half the time of resnet8 at 28 pixels (benchmarks/README.md, "Steps").
    "resnet8_pool": Arch((1, 1, 1), bottleneck=False, width=16, stem="small_pool"),
    # Twice and four times as wide (k of Zagoruyko & Komodakis 2016): of all that was timed on a CPU
    # the most operations in a second.
    "resnet8_x2_pool": Arch((1, 1, 1), bottleneck=False, width=32, stem="small_pool"),
    "resnet8_x4_pool": Arch((1, 1, 1), bottleneck=False, width=64, stem="small_pool"),
    "resnet18": Arch((2, 2, 2, 2), bottleneck=False),
    "resnet18_small": Arch((2, 2, 2, 2), bottleneck=False, stem="small"),
    "resnet18_small_pool": Arch((2, 2, 2, 2), bottleneck=False, stem="small_pool"),
    "resnet34": Arch((3, 4, 6, 3), bottleneck=False),
    "resnet34_small": Arch((3, 4, 6, 3), bottleneck=False, stem="small"),
    "resnet34_small_pool": Arch((3, 4, 6, 3), bottleneck=False, stem="small_pool"),
    "resnet50": Arch((3, 4, 6, 3), bottleneck=True),
    "resnet50_small": Arch((3, 4, 6, 3), bottleneck=True, stem="small"),
    "resnet50_small_pool": Arch((3, 4, 6, 3), bottleneck=True, stem="small_pool"),
    "resnet101": Arch((3, 4, 23, 3), bottleneck=True),
    "resnext50_32x4d": Arch((3, 4, 6, 3), bottleneck=True, groups=32, width_per_group=4),
    "resnext101_32x4d": Arch((3, 4, 23, 3), bottleneck=True, groups=32, width_per_group=4),
    "resnext101_32x8d": Arch((3, 4, 23, 3), bottleneck=True, groups=32, width_per_group=8),
    "resnext101_32x16d": Arch((3, 4, 23, 3), bottleneck=True, groups=32, width_per_group=16),
    "resnext101_32x32d": Arch((3, 4, 23, 3), bottleneck=True, groups=32, width_per_group=32),
    "resnext101_32x48d": Arch((3, 4, 23, 3), bottleneck=True, groups=32, width_per_group=48),
}


class Conv(nn.Module):
    """A convolution, padded by kernel // 2 on both sides; a bias only if norms are folded in."""

    features: int
    kernel: int
    stride: int = 1
    groups: int = 1
    dtype: Any = jnp.float32
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1] // self.groups, self.features)
        wide_dtype = jnp.promote_types(self.dtype, jnp.float32)
        kernel = self.param("kernel", kaiming_normal, shape, wide_dtype)
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.groups)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), wide_dtype).astype(
                self.dtype
            )
        return y


def no_norm(**_: Any) -> Callable[[jax.Array, bool], jax.Array]:
    """Identity in place of a batch norm that is folded into the convolutions."""
    return lambda x, train: x


class Block(nn.Module):
    """A residual block: 3x3-3x3, or the bottleneck 1x1-3x3-1x1."""

    arch: Arch
    planes: int
    stride: int
    norm: Any
    zero_init: bool
    dtype: Any
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        arch = self.arch
        convolution = partial(Conv, dtype=self.dtype, bias=self.folded)
        last_scale = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        if arch.bottleneck:
            inner = int(self.planes * arch.width_per_group / 64) * arch.groups
            out = 4 * self.planes
            y = convolution(inner, 1, name="conv1")(x)
            y = nn.relu(self.norm(name="bn1")(y, train))
            y = convolution(inner, 3, self.stride, arch.groups, name="conv2")(y)
            y = nn.relu(self.norm(name="bn2")(y, train))
            y = convolution(out, 1, name="conv3")(y)
            y = self.norm(name="bn3", scale_init=last_scale)(y, train)
        else:
            out = self.planes
            y = convolution(out, 3, self.stride, name="conv1")(x)
            y = nn.relu(self.norm(name="bn1")(y, train))
            y = convolution(out, 3, name="conv2")(y)
            y = self.norm(name="bn2", scale_init=last_scale)(y, train)
        if self.stride != 1 or x.shape[-1] != out:
            x = convolution(out, 1, self.stride, name="downsample_0")(x)
            x = self.norm(name="downsample_1")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """f32[B, H, W, C] -> pooled features f32[B, D].

    Attributes:
      arch: one of `ARCHS`, or another.
      stats_groups: G, groups of the global batch, each with its own batch statistics.
      zero_init: start each residual branch at zero (SimSiam does, MoCo does not).
      dtype: of the convolutions; parameters, statistics and features are float32, or float64 if
        `dtype` is.
      folded: True for the network of `qmx.models.fold`: every convolution has a bias, and there is
        no batch norm.
    """

    arch: Arch
    stats_groups: int = 1
    zero_init: bool = False
    dtype: Any = jnp.float32
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = (
            no_norm
            if self.folded
            else partial(BatchNorm, groups=self.stats_groups, dtype=self.dtype)
        )
        convolution = partial(Conv, dtype=self.dtype, bias=self.folded)
        x = x.astype(self.dtype)
        if self.arch.stem == "large":
            x = convolution(self.arch.width, 7, 2, name="conv1")(x)
        else:
            x = convolution(self.arch.width, 3, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x, train))
        if self.arch.stem != "small":
            x = max_pool(x)
        for stage, blocks in enumerate(self.arch.blocks):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                x = Block(
                    self.arch,
                    self.arch.width * 2**stage,
                    stride,
                    norm,
                    self.zero_init,
                    self.dtype,
                    self.folded,
                    name=f"layer{stage + 1}_{index}",
                )(x, train)
        return wide(x).mean((1, 2))
