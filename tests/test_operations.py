"""Floating-point operations: by hand, beside PyTorch's counter, and in a training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from torch.utils.flop_counter import FlopCounterMode
from torch_reference import ResNet

from qmx import augment, distill, init_state, make_step, models, optim
from qmx.contract import Rows
from qmx.models.conv import plain
from qmx.operations import of_call


def counted(function, *shapes):
    return of_call(jax.jit(function), *(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes))


def test_products():
    """Two operations for each of the products; batches and loops multiply."""
    assert counted(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 840
    assert counted(lambda a, b: a + b, (3,), (3,)) == 0

    def within(a):
        one = jax.checkpoint(jax.jit(lambda x: jnp.tanh(x @ a)))  # a trace within traces
        y, _ = lax.scan(lambda x, _: (one(x), None), a, None, length=6)
        y = lax.cond(y[0, 0] > 0, lambda y: y @ y, lambda y: y @ y @ y, y)
        return lax.fori_loop(0, y[0, 0].astype(int), lambda _, y: y @ y, y)

    assert counted(within, (4, 4)) == 2 * 4**3 * (6 + 2 + 1)  # the last as it depends on the data


def test_no_trace_of_its_own():
    """The call finds the trace, which is what takes time."""
    traced = []

    def function(x, y):
        traced.append(0)
        return x @ y["y"]

    jitted, x, y = jax.jit(function), jnp.ones((2, 3)), {"y": np.ones((3, 4))}
    assert of_call(jitted, x, y) == 2 * 2 * 3 * 4
    jitted(x, y).block_until_ready()
    assert len(traced) == 1


CONVOLUTIONS = {  # side, channels, kernel, features, stride, groups
    "3x3": (9, 4, 3, 6, 1, 1),
    "strided": (8, 4, 3, 6, 2, 1),
    "strided, odd": (9, 4, 3, 6, 2, 1),
    "pointwise, strided": (8, 4, 1, 6, 2, 1),
    "in groups": (8, 4, 3, 6, 1, 2),
    "stem": (16, 3, 7, 8, 2, 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    """By hand, and PyTorch's count, of a convolution and of its two gradients."""
    side, channels, kernel, features, stride, groups = CONVOLUTIONS[name]
    shapes = (2, side, side, channels), (kernel, kernel, channels // groups, features)
    forward = counted(lambda x, w: plain(x, w, stride, groups), *shapes)
    out = -(-side // stride)
    assert forward == 2 * 2 * out**2 * features * kernel**2 * channels // groups
    back = counted(
        lambda x, w: jax.grad(lambda *a: plain(*a, stride, groups).sum(), (0, 1))(x, w), *shapes
    )
    x = torch.zeros(2, channels, side, side, requires_grad=True)
    layer = torch.nn.Conv2d(
        channels, features, kernel, stride, kernel // 2, groups=groups, bias=False
    )
    with FlopCounterMode(display=False) as torchs:
        y = layer(x)
        assert torchs.get_total_flops() == forward
        y.sum().backward()
    assert back == 2 * forward
    if groups == 1:  # of a kernel's gradient PyTorch 2.13 counts the products of all groups
        assert torchs.get_total_flops() == 3 * forward


def small(groups=1):
    net = models.from_linen(
        models.resnet.ResNet(models.resnet.Arch((1, 1), bottleneck=False, width=8, stem="small"))
    )
    return distill.make(net, models.classifier(10), augment.plain_view((0.5,), (0.25,)))


def hand_count(batch, side):
    """Multiply-adds of a forward pass of `small`: a stem, two blocks of two 3 x 3 convolutions, of
    which the second halves the side and has a shortcut, and the classifier."""
    half = side // 2
    first = side**2 * (9 * 1 * 8 + 2 * 9 * 8 * 8)
    second = half**2 * (9 * 8 * 16 + 9 * 16 * 16 + 8 * 16)
    return batch * (first + second + 16 * 10), batch * side**2 * 9 * 8


def test_a_step():
    """A training step of a small network by hand: the forward pass three times, less the gradient
    of the images. The same from the host's batches, and for each of a dispatch of several."""
    method, tx, batch, side = small(), optim.sgd(lambda step: 0.1), 4, 8
    rows = {
        "image": np.zeros((batch, side, side, 1), np.uint8),
        "scores": np.zeros((batch, 10), np.float32),
    }
    key = jax.random.key(0)
    ts = jax.eval_shape(lambda rng: init_state(method, tx, rng, rows), key)
    step = make_step(method, tx)
    forward, images = hand_count(batch, side)
    found = of_call(step, ts, rows, key)
    assert found == 2 * (3 * forward - images)
    for most in (1, 3):
        tables = {"": rows}
        several = Rows(tables, {"": np.zeros((most, batch), np.int32)}, np.int32(most))
        assert of_call(step, ts, several, key) == found


def test_resnet_beside_pytorch():
    """A ResNet-18 at 64 pixels, forward: to the last operation."""
    with FlopCounterMode(display=False) as torchs:
        ResNet((2, 2, 2, 2))(torch.randn(2, 3, 64, 64))
    net = models.backbone("resnet18")
    shape = jax.ShapeDtypeStruct((2, 64, 64, 3), "float32")
    variables = jax.eval_shape(net.init, jax.random.key(0), shape)
    forward = jax.jit(lambda p, s, x: net.apply(p, s, x, False, None)[0])
    assert of_call(forward, *variables, shape) == torchs.get_total_flops()
