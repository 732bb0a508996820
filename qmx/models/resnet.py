"""ResNet and ResNeXt (v1.5: the stride stands on the 3x3), up to the pooled features.

He et al. 2016 and Xie et al. 2017, laid out, padded and initialised as torchvision's
`models/resnet.py`; the layers carry its names ("layer1.0.conv1" is `layer1_0/conv1`).
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qmx.models.norm import BatchNorm

# Kaiming normal with fan_out, as torchvision initialises every convolution.
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Arch(NamedTuple):
    """What distinguishes one member of the family from another."""

    blocks: tuple[int, ...]  # residual blocks of each stage
    bottleneck: bool
    width: int = 64  # planes of the first stage, doubled at each next one
    groups: int = 1  # of the 3x3 convolutions; 32 in ResNeXt
    width_per_group: int = 64
    stem: str = "large"  # "large": 7x7 stride 2 and max-pool; "small": 3x3 stride 1 (32 px and less)


ARCHS = {
    # He et al. 2016, section 4.2, n = 1, with projections for shortcuts: quick on a CPU.
    "resnet8": Arch((1, 1, 1), bottleneck=False, width=16, stem="small"),
    "resnet18": Arch((2, 2, 2, 2), bottleneck=False),
    "resnet18_small": Arch((2, 2, 2, 2), bottleneck=False, stem="small"),
    "resnet50": Arch((3, 4, 6, 3), bottleneck=True),
    "resnext101_32x16d": Arch((3, 4, 23, 3), bottleneck=True, groups=32, width_per_group=16),
}


def conv(features: int, kernel: int, stride: int = 1, groups: int = 1, *, dtype: Any, name: str) -> nn.Conv:
    """A convolution without bias, padded by kernel // 2 on both sides as torch pads it."""
    pad = kernel // 2  # "SAME" would pad (0, 1) at stride 2 on even sizes
    return nn.Conv(features, (kernel, kernel), stride, [(pad, pad)] * 2, feature_group_count=groups,
                   use_bias=False, kernel_init=kaiming_normal, dtype=dtype, name=name)


class Block(nn.Module):
    """A residual block: 3x3-3x3, or the bottleneck 1x1-3x3-1x1."""

    arch: Arch
    planes: int
    stride: int
    norm: Any
    zero_init: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        arch, dtype = self.arch, self.dtype
        last_scale = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        if arch.bottleneck:
            inner = int(self.planes * arch.width_per_group / 64) * arch.groups
            out = 4 * self.planes
            y = conv(inner, 1, dtype=dtype, name="conv1")(x)
            y = nn.relu(self.norm(name="bn1")(y, train))
            y = conv(inner, 3, self.stride, arch.groups, dtype=dtype, name="conv2")(y)
            y = nn.relu(self.norm(name="bn2")(y, train))
            y = conv(out, 1, dtype=dtype, name="conv3")(y)
            y = self.norm(name="bn3", scale_init=last_scale)(y, train)
        else:
            out = self.planes
            y = conv(out, 3, self.stride, dtype=dtype, name="conv1")(x)
            y = nn.relu(self.norm(name="bn1")(y, train))
            y = conv(out, 3, dtype=dtype, name="conv2")(y)
            y = self.norm(name="bn2", scale_init=last_scale)(y, train)
        if self.stride != 1 or x.shape[-1] != out:
            x = conv(out, 1, self.stride, dtype=dtype, name="downsample_0")(x)
            x = self.norm(name="downsample_1")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """f32[B, H, W, C] -> pooled features f32[B, D].

    Attributes:
      arch: one of `ARCHS`, or another.
      stats_groups: G, groups of the global batch whose batch statistics are their own.
      zero_init: start each residual branch at zero (SimSiam does, MoCo does not).
      dtype: of the convolutions; parameters, statistics and features stay float32.
    """

    arch: Arch
    stats_groups: int = 1
    zero_init: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(BatchNorm, groups=self.stats_groups, dtype=self.dtype)
        x = x.astype(self.dtype)
        if self.arch.stem == "large":
            x = conv(self.arch.width, 7, 2, dtype=self.dtype, name="conv1")(x)
        else:
            x = conv(self.arch.width, 3, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x, train))
        if self.arch.stem == "large":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.arch.blocks):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                x = Block(self.arch, self.arch.width * 2**stage, stride, norm, self.zero_init, self.dtype,
                          name=f"layer{stage + 1}_{index}")(x, train)
        return x.astype(jnp.float32).mean((1, 2))
