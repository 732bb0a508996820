"""Backbones that compile in a moment."""

import flax.linen as nn

from qmx import models
from qmx.models.heads import Linear
from qmx.models.norm import BatchNorm
from qmx.models.resnet import Arch, ResNet


class Layers(nn.Module):
    """Linear - batch norm - ReLU on the pixels.

    Attributes:
      stats_groups: see `qmx.models.norm.BatchNorm`.
    """

    width: int = 16
    stats_groups: int = 1

    @nn.compact
    def __call__(self, x, train):
        x = Linear(self.width, bias=False, name="fc_0")(x.reshape(len(x), -1))
        return nn.relu(BatchNorm(self.stats_groups, name="fc_1")(x, train))


def layers(width=16, **keys):
    return models.from_linen(Layers(width, **keys))


def residual(width=4, **keys):
    """One residual block, for what has convolutions."""
    return models.from_linen(
        ResNet(Arch((1,), bottleneck=False, width=width, stem="small"), **keys)
    )
