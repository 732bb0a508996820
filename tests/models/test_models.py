"""The family of networks: sizes, cost, what batch norm folds into, and how the classifiers
start."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmx import models
from qmx.contract import by_path, chain
from qmx.models.conv import plain
from qmx.models.layout import features, our_path, shapes
from qmx.models.pool import max_pool
from qmx.models.resnet import ARCHS, Arch, ResNet

# Without the 10-class networks for small images: torchvision's, and the WSL authors', with 1000
# classes.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x4d": 44_177_704,
    "resnext101_32x8d": 88_791_336,
    "resnext101_32x16d": 194_026_792,
    "resnext101_32x32d": 468_530_472,
    "resnext101_32x48d": 828_411_176,
}


def variables(net, side, batch=1, channels=3):
    """Shapes of (params, stats); nothing is allocated."""
    return jax.eval_shape(
        net.init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32),
    )


def lively(net, shape, seed=0):
    """Variables whose every array is random, the variances positive."""
    params, stats = net.init(jax.random.key(seed), jnp.zeros(shape))
    rng = np.random.default_rng(seed)

    def other(path, x):
        if path[-1].key == "kernel":
            return np.asarray(x)
        low, high = (-0.3, 0.3) if path[-1].key in ("bias", "mean") else (0.5, 1.5)
        return rng.uniform(low, high, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(other, (params, stats))


@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=[pytest.mark.slow] if "101_" in arch else []) for arch in ARCHS],
)
def test_sizes(arch):
    """Every network has the published number of parameters, and the names and shapes that torch
    gives it."""
    params, stats = variables(models.backbone(arch), 64)
    table = {
        our_path(name, len(shape)): shape if len(shape) == 1 else (*shape[2:], shape[1], shape[0])
        for name, shape in shapes(ARCHS[arch]).items()
    }
    ours = {
        tuple(path.split("/")): leaf.shape
        for tree in (params, stats)
        for path, leaf in by_path(tree).items()
    }
    assert ours == table
    fc = (features(ARCHS[arch]) + 1) * 1000
    if arch in PARAMETERS:
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) + fc == PARAMETERS[arch]


@pytest.mark.parametrize(
    "arch, giga, tolerance",
    [
        ("resnet50", 7.969, 3e-3),  # 2 x 4.089 by hand, with the padded taps
        pytest.param("resnext101_32x8d", 2 * 16.41, 0.03, marks=pytest.mark.slow),
        pytest.param("resnext101_32x16d", 2 * 36.16, 0.03, marks=pytest.mark.slow),
    ],
)
def test_operations(arch, giga, tolerance, monkeypatch):
    """Floating-point operations of one image at 224, as XLA counts them, padded taps left out."""
    # Of a loop over groups XLA counts one turn.
    monkeypatch.setattr("qmx.models.resnet.convolve", plain)
    net, batch = chain(backbone=models.backbone(arch), head=models.classifier(1000)), 4
    params, stats = variables(net, 224)
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
    cost = (
        jax.jit(lambda p, s, x: net.apply(p, s, x, False)[0])
        .lower(params, stats, images)
        .cost_analysis()
    )
    assert cost["flops"] / batch == pytest.approx(giga * 1e9, rel=tolerance)


@pytest.mark.parametrize("shape", [(3, 7, 9, 2), (2, 8, 6, 3), (1, 1, 2, 1)])
def test_max_pool(shape):
    """Values and gradients of flax's: sides even and odd, and zeros that tie."""
    rng = np.random.default_rng(0)
    x = jnp.maximum(np.round(2 * rng.normal(size=shape)) / 2, 0).astype(jnp.float32)
    weights = rng.normal(size=(shape[0], -(-shape[1] // 2), -(-shape[2] // 2), shape[3]))

    def flax(x):
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def weighted(x, pool):
        y = pool(x)
        return (y * weights.astype(np.float32)).sum(), y

    (ours, y), (theirs, their_y) = (
        jax.jit(jax.grad(partial(weighted, pool=pool), has_aux=True))(x)
        for pool in (max_pool, flax)
    )
    np.testing.assert_array_equal(y, their_y)
    # A pixel of four windows has a sum of four, in another order.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert np.abs(ours).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    [
        ARCHS["resnet18"],
        ARCHS["resnet8"],
        ARCHS["resnet50"],
        Arch((1, 2), bottleneck=True, width=16, groups=4, width_per_group=32),
    ],
    ids=["resnet18", "resnet8", "resnet50", "resnext"],
)
def test_folded(arch):
    """Without its batch norms, folded in, a network gives the outputs that it gave with their
    running statistics."""
    net, folded = models.from_linen(ResNet(arch)), models.from_linen(ResNet(arch, folded=True))
    x = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    params, stats = lively(net, x.shape)
    want = np.asarray(jax.jit(lambda p, s, x: net.apply(p, s, x, False)[0])(params, stats, x))
    ours = models.fold(params, stats)
    assert jax.tree.map(jnp.shape, ours.params) == jax.tree.map(
        lambda a: a.shape, variables(folded, 32)[0]
    )
    assert ours.stats == {} and {leaf.dtype for leaf in jax.tree.leaves(ours)} == {
        np.dtype(np.float32)
    }
    got, stats = jax.jit(lambda p, x: folded.apply(p, {}, x, False))(ours.params, x)
    assert stats == {}
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    assert np.abs(want).max() > 1e-2
    with pytest.raises(ValueError, match="conv1 has no batch norm bn1 to fold"):
        models.fold(ours.params, {})


@pytest.mark.slow
def test_folded_by_name():
    """`backbone(arch, folded=True)` in half precision, near the other in half precision."""
    net = models.backbone("resnet8", dtype=jnp.bfloat16)
    x = np.random.default_rng(1).normal(size=(4, 16, 16, 3)).astype(np.float32)
    params, stats = lively(net, x.shape)
    want = np.asarray(net.apply(params, stats, x, False)[0])
    got = models.backbone("resnet8", dtype=jnp.bfloat16, folded=True).apply(
        *models.fold(params, stats), x, False
    )[0]
    assert got.dtype == jnp.float32 and np.abs(got - want).max() < 0.03 * np.abs(want).max()


def test_unknown_network():
    """A name that is none is named, with those that are."""
    with pytest.raises(ValueError, match="'resnet51' is unknown; choose one of resnet8, "):
        models.backbone("resnet51")


def test_classifier_start():
    """`kernel_std` starts from N(0, std^2) and a bias of zero; without, torch's uniform for
    both."""
    x = jnp.zeros((2, 400))
    params, _ = models.classifier(100, kernel_std=0.01).init(jax.random.key(0), x)
    kernel = np.asarray(params["fc"]["kernel"])
    assert kernel.std() == pytest.approx(0.01, rel=0.02) and np.abs(kernel).max() > 0.03
    assert not params["fc"]["bias"].any()
    params, _ = models.classifier(100).init(jax.random.key(0), x)
    for leaf in params["fc"].values():
        assert 0.045 < np.abs(leaf).max() <= 0.05


def test_standardised_classifier():
    """Features of any size reach the linear layer with mean 0 and variance 1; statistics run as
    batch norm's do."""
    net = models.classifier(3, standardize=True)
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(64, 5)).astype(np.float32)
    x = unit * 1e-2 + 7
    params, stats = net.init(jax.random.key(0), x)
    assert params.keys() == {"fc"} and jax.tree.map(jnp.shape, stats) == {
        "norm": {"mean": (5,), "var": (5,)}
    }
    y, new = net.apply(params, stats, x, True)
    z = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(y, z @ params["fc"]["kernel"] + params["fc"]["bias"], atol=1e-4)
    np.testing.assert_allclose(new["norm"]["mean"], 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["norm"]["var"], 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-5)
    y, same = net.apply(params, stats, x, False)
    assert same is stats
    np.testing.assert_allclose(
        y, x / np.sqrt(1 + 1e-5) @ params["fc"]["kernel"] + params["fc"]["bias"], rtol=1e-4
    )
