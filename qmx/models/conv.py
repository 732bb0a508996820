"""Convolutions in the form that is quickest on CPUs; on other devices XLA's own.

On CPUs XLA hands a plain convolution and its gradients to Eigen, which is good at most shapes. This
file holds the exceptions. Each computes the same sums in another order. Times are on one core
unless stated, with jax 0.10.2.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

NHWC = ("NHWC", "HWIO", "NHWC")


def plain(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """XLA's convolution, padded by kernel // 2 on both sides as torch pads it."""
    pad = kernel.shape[0] // 2  # "SAME" would pad (0, 1) at stride 2 on even sizes
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad)] * 2,
        dimension_numbers=NHWC,
        feature_group_count=groups,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """A convolution with a square kernel, padded by kernel // 2 on both sides.

    Args:
      x: [B, H, W, C].
      kernel: [K, K, C / groups, D], the dtype of `x`.
      stride: in both directions.

    Returns:
      [B, H', W', D].
    """
    return lax.platform_dependent(
        x,
        kernel,
        cpu=partial(forward, stride=stride, groups=groups),
        default=partial(plain, stride=stride, groups=groups),
    )


def _forward(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> tuple:
    return convolve(x, kernel, stride, groups), (x, kernel)


def _backward(stride: int, groups: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple:
    return lax.platform_dependent(
        *kept,
        dy,
        cpu=partial(backward, stride=stride, groups=groups),
        default=lambda x, kernel, dy: (
            _of_input(x, kernel, dy, stride, groups),
            _of_kernel(x, kernel, dy, stride, groups),
        ),
    )


convolve.defvjp(_forward, _backward)


def _of_input(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, groups: int
) -> jax.Array:
    """XLA's gradient of the input. A `vjp` would add the forward pass; a transpose does not."""
    return jax.linear_transpose(lambda x: plain(x, kernel, stride, groups), x)(dy)[0]


def _of_kernel(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, groups: int
) -> jax.Array:
    """XLA's gradient of the kernel."""
    return jax.linear_transpose(lambda kernel: plain(x, kernel, stride, groups), kernel)(dy)[0]


def forward(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """`convolve` for CPUs."""
    if groups > 1:
        return _by_groups(x, kernel, stride, groups)
    if kernel.shape[0] == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    return _by_patches(x, kernel, stride) if x.dtype == jnp.float64 else plain(x, kernel, stride, 1)


def backward(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, groups: int
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `convolve` for CPUs, of the input and of the kernel."""
    if groups > 1:
        return _backward_by_groups(x, kernel, dy, stride, groups)
    if kernel.shape[0] == 1:
        return _pointwise_backward(x, kernel, dy, stride)
    if x.dtype == jnp.float64:
        return _backward_by_patches(x, kernel, dy, stride)
    phases = kernel.shape[0] == 3 and stride == 2 and x.shape[1] % 2 == x.shape[2] % 2 == 0
    dx = _by_phases(kernel, dy) if phases else _of_input(x, kernel, dy, stride, 1)
    return dx, _of_kernel(x, kernel, dy, stride, 1)


def _pointwise_backward(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Matrix products: the kernel's gradient of 64 -> 256 at 56 pixels takes 2 ms, not 16."""
    inputs = x[:, ::stride, ::stride]
    entering, leaving = kernel.shape[2:]
    if entering <= leaving:  # products are twice as quick with the wider side last
        dkernel = jnp.einsum("bhwc,bhwd->cd", inputs, dy)
    else:
        dkernel = jnp.einsum("bhwd,bhwc->dc", dy, inputs).T
    dx = dy @ kernel[0, 0].T
    if stride > 1:
        rest = [
            (0, size - 1 - stride * (small - 1), stride - 1)
            for size, small in zip(x.shape[1:3], dx.shape[1:3], strict=True)
        ]
        dx = lax.pad(dx, jnp.zeros((), dx.dtype), [(0, 0, 0), *rest, (0, 0, 0)])
    return dx, dkernel[None, None]


def _by_phases(kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """Input's gradient of a 3x3 convolution with stride 2.

    It takes four dense convolutions, for even and odd rows and columns. XLA would put zeros between
    the pixels of `dy`, which is four times the work: 41 ms, not 16, for 64 -> 128 at 32 pixels,
    batch 64.
    """
    kernel = kernel.transpose(0, 1, 3, 2)
    taps = {0: [1], 1: [2, 0]}  # the kernel's taps that meet a pixel at an even or odd place
    rows = []
    for i in (0, 1):
        columns = []
        for j in (0, 1):
            part = jnp.stack([jnp.stack([kernel[a, b] for b in taps[j]]) for a in taps[i]])
            columns.append(
                lax.conv_general_dilated(dy, part, (1, 1), [(0, i), (0, j)], dimension_numbers=NHWC)
            )
        rows.append(jnp.stack(columns, 3))
    dx = jnp.stack(rows, 2)
    b, h, _, w, _, c = dx.shape
    return dx.reshape(b, 2 * h, 2 * w, c)


def _by_patches(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A matrix product of some images at a time, for float64, which Eigen's convolution lacks.

    For 16 channels at 8 pixels, batch 512, on two cores, this takes 3 ms and its gradients 10.
    XLA's own loops take 20 and 51. Patches of the whole batch at once leave the cache: 25 and 35.
    """
    y = lax.map(lambda part: _products(part, kernel, stride), _parts(x)).swapaxes(0, 1)
    return y.reshape(len(x), *y.shape[2:])


def _backward_by_patches(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `_by_patches`, of the input and of the kernel."""

    def one(dkernel: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx, more = jax.vjp(partial(_products, stride=stride), part[0], kernel)[1](part[1])
        return dkernel + more, dx

    dkernel, dx = lax.scan(one, jnp.zeros_like(kernel), (_parts(x), _parts(dy)))
    return dx.swapaxes(0, 1).reshape(x.shape), dkernel


def _parts(x: jax.Array) -> jax.Array:
    """[B, ...] -> [parts, images, ...], every n-th image, so that each part is on all devices."""
    few = math.gcd(len(x), 32)
    return x.reshape(few, len(x) // few, *x.shape[1:]).swapaxes(0, 1)


def _products(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _patches(x, kernel.shape[0], stride) @ kernel.reshape(-1, kernel.shape[-1])


def _patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Patches that a kernel meets at each place: [B, H', W', size * size * C]."""
    pad = size // 2
    high, wide = ((side - 1) // stride + 1 for side in x.shape[1:3])
    padded = jnp.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    taps = [
        padded[
            :, i : i + stride * (high - 1) + 1 : stride, j : j + stride * (wide - 1) + 1 : stride
        ]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(taps, -1)


def _by_groups(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """One convolution for each group, in a loop.

    512 channels at 56 pixels in 32 groups, batch 8, take 61 ms; XLA's own takes 163. Block-diagonal
    kernels for several groups cost more than they save, and so does im2col.
    """
    side = [(size - 1) // stride + 1 for size in x.shape[1:3]]

    def one(group: jax.Array, y: jax.Array) -> jax.Array:
        part = plain(_group(x, group, groups), _group(kernel, group, groups), stride, 1)
        return _put(y, part, group)

    return lax.fori_loop(0, groups, one, jnp.zeros((len(x), *side, kernel.shape[-1]), x.dtype))


def _backward_by_groups(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, stride: int, groups: int
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `_by_groups`, of the input and of the kernel.

    XLA's own gradient of the kernel is a dilated convolution in three dimensions, which takes
    seconds. Its gradients of one group in a loop are slow too. So the kernel's gradient is a matrix
    product of patches (14 ms instead of 279 for 512 channels at 28 pixels, batch 8, two cores). The
    input's gradient at stride 1 is a convolution with the turned kernel.
    """

    def one(group: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        channels, weights, gradient = (_group(whole, group, groups) for whole in (x, kernel, dy))
        patches = _patches(channels, kernel.shape[0], stride)
        dkernel = jnp.einsum("bhwd,bhwc->dc", gradient, patches).T.reshape(weights.shape)
        if stride == 1:
            dx = plain(gradient, weights[::-1, ::-1].transpose(0, 1, 3, 2), 1, 1)
        else:
            dx = _of_input(channels, weights, gradient, stride, 1)
        return _put(sums[0], dx, group), _put(sums[1], dkernel, group)

    return lax.fori_loop(0, groups, one, (jnp.zeros_like(x), jnp.zeros_like(kernel)))


def _group(x: jax.Array, group: jax.Array, groups: int) -> jax.Array:
    width = x.shape[-1] // groups
    return lax.dynamic_slice_in_dim(x, group * width, width, 3)


def _put(whole: jax.Array, part: jax.Array, group: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, part, group * part.shape[-1], 3)
