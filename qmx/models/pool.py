"""Max-pooling of 3x3 windows with stride 2, with a gradient that is quick on CPUs."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """The largest value of each 3x3 window, stride 2, padded by 1; [B, H, W, C] -> [B, H', W', C].

    H' = (H + 1) // 2. Where several values of a window are the largest, the first one, by rows,
    gets the gradient, as in XLA and PyTorch.
    """
    return _windows(x)


def _windows(x: jax.Array) -> jax.Array:
    window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
    return lax.reduce_window(
        x, -jnp.inf, lax.max, window, strides, ((0, 0), (1, 1), (1, 1), (0, 0))
    )


def _forward(x: jax.Array) -> tuple:
    winner = lax.platform_dependent(x, cpu=_first_largest, default=_unknown)
    return max_pool(x), (x, winner)


def _backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    return (lax.platform_dependent(*kept, dy, cpu=_by_phases, default=_scattered),)


max_pool.defvjp(_forward, _backward)


def _unknown(x: jax.Array) -> jax.Array:
    """A `_first_largest` that nobody reads."""
    return jnp.zeros(jax.eval_shape(_windows, x).shape, jnp.int8)


def _first_largest(x: jax.Array) -> jax.Array:
    """Place 0..8 of the first largest value in each window, int8[B, H', W', C].

    It is found here and not by the values' equality with the maxima on the way back: XLA may
    compute `x` once more there, with another last bit, and no value would be equal.
    """
    high, wide = ((side + 1) // 2 for side in x.shape[1:3])
    padded = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-jnp.inf)
    largest = jnp.full((len(x), high, wide, x.shape[3]), -jnp.inf, x.dtype)
    winner = jnp.full(largest.shape, 4, jnp.int8)  # the middle, which is never padding
    for place in range(9):
        i, j = divmod(place, 3)
        seen = padded[:, i : i + 2 * high - 1 : 2, j : j + 2 * wide - 1 : 2]
        winner = jnp.where(seen > largest, jnp.int8(place), winner)
        largest = jnp.maximum(seen, largest)
    return winner


def _scattered(x: jax.Array, winner: jax.Array, dy: jax.Array) -> jax.Array:
    """XLA's gradient."""
    del winner
    return jax.vjp(_windows, x)[1](dy)[0]


def _by_phases(x: jax.Array, winner: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient for even and odd rows and columns apart.

    XLA scatters into windows one at a time. Pooling [256, 28, 28, 16] and its gradient take 92 to
    100 ms so on two cores, and 20 to 25 this way.
    """
    batch, height, width, channels = x.shape
    high, wide = dy.shape[1:3]
    taps = [jnp.where(winner == place, dy, 0) for place in range(9)]

    def before(taps: jax.Array, axis: int) -> jax.Array:
        """Share of the pixel behind a window's middle that the next one's first tap gives."""
        zeros = jnp.zeros_like(lax.slice_in_dim(taps, 0, 1, axis=axis))
        return jnp.concatenate([lax.slice_in_dim(taps, 1, None, axis=axis), zeros], axis)

    # A window's middle row is even, its last one odd; so are the columns.
    rows = [[taps[4], taps[5] + before(taps[3], 2)]]
    corners = taps[8] + before(taps[6], 2), taps[2] + before(taps[0], 2)
    rows.append([taps[7] + before(taps[1], 1), corners[0] + before(corners[1], 1)])
    dx = jnp.stack([jnp.stack(columns, 3) for columns in rows], 2)
    return dx.reshape(batch, 2 * high, 2 * wide, channels)[:, :height, :width]
