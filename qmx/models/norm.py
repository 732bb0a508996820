"""Batch normalisation over equal groups of the global batch, with PyTorch's conventions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

MOMENTUM = 0.9  # torch calls it 0.1
EPSILON = 1e-5


class BatchNorm(nn.Module):
    """Batch norm whose statistics are those of `groups` equal, consecutive groups of the batch.

    The groups are a reshape of the global batch and no device axis, so the result does not depend
    on the number of devices. One group is batch norm over the whole batch ("SyncBN"); MoCo's
    per-GPU statistics are batch / 32 groups. The running statistics take the mean over the groups
    of their means and of their unbiased variances, as torch does for one group; they are read
    when `train` is false. All arithmetic is float32.

    Attributes:
      groups: G >= 1; the batch must be a multiple.
      affine: whether there are a scale and a bias.
      scale_init: initialiser of the scale (zeros for the last one of a residual branch).
      dtype: of the output.

    Raises:
      ValueError: the batch is not a multiple of `groups`, or a group holds a single value.
    """

    groups: int = 1
    affine: bool = True
    scale_init: Any = nn.initializers.ones
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        mean_ema = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        var_ema = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        x = x.astype(jnp.float32)

        if train:
            if x.shape[0] % self.groups:
                raise ValueError(f"a batch of {x.shape[0]} does not divide into {self.groups} groups "
                                 "of batch statistics; make the batch a multiple of it")
            grouped = x.reshape(self.groups, -1, *x.shape[1:])
            axes = tuple(range(1, grouped.ndim - 1))
            n = grouped.size // (self.groups * channels)
            if n < 2:
                raise ValueError("a group of batch statistics holds a single value for each channel; "
                                 "use fewer groups or a larger batch")
            mean = grouped.mean(axes, keepdims=True)
            # Two passes: E[x^2] - E[x]^2 loses the variance where |mean| >> std.
            var = jnp.square(grouped - mean).mean(axes, keepdims=True)
            if not self.is_initializing():
                mean_ema.value = MOMENTUM * mean_ema.value + (1 - MOMENTUM) * mean.reshape(-1, channels).mean(0)
                unbiased = var.reshape(-1, channels).mean(0) * n / (n - 1)
                var_ema.value = MOMENTUM * var_ema.value + (1 - MOMENTUM) * unbiased
            y = ((grouped - mean) * jax.lax.rsqrt(var + EPSILON)).reshape(x.shape)
        else:
            y = (x - mean_ema.value) * jax.lax.rsqrt(var_ema.value + EPSILON)

        if self.affine:
            y = y * self.param("scale", self.scale_init, (channels,), jnp.float32)
            y = y + self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        return y.astype(self.dtype)
