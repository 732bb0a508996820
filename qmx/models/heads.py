"""Heads on the pooled features: f32[B, D] -> f32[B, D']. Layers carry torch's indices."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qmx.contract import wide
from qmx.models.norm import BatchNorm, drawn

# torch's default for Linear: uniform in +-1/sqrt(fan_in), for the weight and for the bias.
linear_kernel = drawn(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))


class Linear(nn.Module):
    """y = x W + b with torch's initialisation.

    Attributes:
      bias: True, False, or "frozen": a bias that keeps its initial value.
      kernel_std: start from a kernel ~ N(0, kernel_std^2) and a bias of zero instead.
    """

    features: int
    bias: bool | str = True
    kernel_std: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = wide(x)
        fan_in, std = x.shape[-1], self.kernel_std
        kernel_init = linear_kernel if std is None else drawn(nn.initializers.normal(std))
        y = x @ self.param("kernel", kernel_init, (fan_in, self.features), x.dtype)
        if not self.bias:
            return y

        def init(rng: jax.Array) -> jax.Array:
            if std is not None:
                return jnp.zeros((self.features,), x.dtype)
            return (
                jax.random.uniform(rng, (self.features,), jnp.float32, -1, 1) / fan_in**0.5
            ).astype(x.dtype)

        if self.bias == "frozen":
            # It is one of the statistics, so no gradient and no weight decay reaches it.
            return (
                y
                + self.variable("batch_stats", "bias", lambda: init(self.make_rng("params"))).value
            )
        return y + self.param("bias", init)


class Classifier(nn.Module):
    """One linear layer ("fc").

    Attributes:
      standardize: bring every feature to mean 0 and variance 1 first, by a batch norm without scale
        and bias. SimSiam's loss ignores the length of its features, and its pooled features (Chen &
        He 2021) are tiny. A linear layer on them hardly moves at an ordinary rate: its authors'
        probe needs a rate of about 100 (facebookresearch/simsiam, issue 23).
      kernel_std: see `Linear`; MoCo's linear probe starts from 0.01 (`main_lincls.py`).
    """

    classes: int
    standardize: bool = False
    kernel_std: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.standardize:
            x = BatchNorm(affine=False, name="norm")(x, train)
        return Linear(self.classes, kernel_std=self.kernel_std, name="fc")(x)


class MocoHead(nn.Module):
    """MoCo v2: Linear - ReLU - Linear, biases, no batch norm. MoCo v1's is `Classifier(128)`.

    Chen et al. 2020 (MoCo v2), section 3; `moco/builder.py` of the reference.
    """

    features: int = 128
    hidden: int | None = None  # None: as wide as the pooled features

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(Linear(self.hidden or x.shape[-1], name="fc_0")(x))
        return Linear(self.features, name="fc_2")(x)


class SimsiamProjector(nn.Module):
    """SimSiam's three-layer projector; `layers=2` is its CIFAR form.

    A batch norm follows each Linear, and a ReLU each batch norm but the last. The last norm has no
    scale and no bias; the last Linear has a frozen bias. Chen & He 2021, section 3;
    `simsiam/builder.py`.
    """

    features: int = 2048
    layers: int = 3
    stats_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]  # the hidden layers keep the features' width
        norm: Any = BatchNorm
        for layer in range(self.layers - 1):
            x = Linear(width, bias=False, name=f"fc_{3 * layer}")(x)
            x = nn.relu(norm(self.stats_groups, name=f"fc_{3 * layer + 1}")(x, train))
        last = 3 * (self.layers - 1)
        x = Linear(self.features, bias="frozen", name=f"fc_{last}")(x)
        return norm(self.stats_groups, affine=False, name=f"fc_{last + 1}")(x, train)


class EmpSslProjector(nn.Module):
    """EMP-SSL's projector: Linear - batch norm - ReLU, twice, then a Linear with a bias.

    `model/model.py` of the reference. Its hidden Linears have biases, which a batch norm cancels.
    """

    features: int = 1024
    hidden: int = 4096
    stats_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for layer in (0, 3):
            x = Linear(self.hidden, bias=False, name=f"fc_{layer}")(x)
            x = nn.relu(BatchNorm(self.stats_groups, name=f"fc_{layer + 1}")(x, train))
        return Linear(self.features, name="fc_6")(x)


class SimsiamPredictor(nn.Module):
    """SimSiam's bottleneck: Linear - batch norm - ReLU - Linear with a bias, nothing after it."""

    hidden: int = 512
    stats_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        features = x.shape[-1]
        x = Linear(self.hidden, bias=False, name="fc_0")(x)
        x = nn.relu(BatchNorm(self.stats_groups, name="fc_1")(x, train))
        return Linear(features, name="fc_3")(x)
