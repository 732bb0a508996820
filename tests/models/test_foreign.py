"""Networks of flax.nnx and equinox: what the modules themselves compute, and trained as others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qmx
from qmx.contract import by_path

X = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))


class Nnx(nnx.Module):
    """Each kind of variable, and a list of layers."""

    def __init__(self, rngs, rate=0.0):
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])

    def __call__(self, x):
        x = self.drop(self.norm(x.reshape(len(x), -1)))
        return self.layers[1](nnx.relu(self.layers[0](x)))


def of_equinox(rate=0.0, stateful=True):
    """key -> the same network of equinox, with its state; or without batch norm."""
    eqx = pytest.importorskip("equinox")

    class Module(eqx.Module):
        norm: eqx.nn.BatchNorm
        drop: eqx.nn.Dropout
        layers: eqx.nn.MLP
        calls: jax.Array

        def __init__(self, key):
            self.norm = eqx.nn.BatchNorm(16, "batch", momentum=0.9, mode="batch")
            self.drop = eqx.nn.Dropout(rate)
            self.layers = eqx.nn.MLP(16, 3, 8, 1, key=key)
            self.calls = jnp.arange(3)

        def __call__(self, x, state, key=None):
            x, state = self.norm(x.ravel(), state)
            return self.layers(self.drop(x, key=key)), state

    plain = lambda key: eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(16, 3, key=key)])  # noqa: E731
    return eqx.nn.make_with_state(Module) if stateful else plain


def test_nnx_computes_what_the_module_does():
    """To the bit, in training and in evaluation, running statistics too."""
    net, module = qmx.from_nnx(Nnx), Nnx(nnx.Rngs(jax.random.key(0)))
    params, stats = net.init(jax.random.key(0), X)
    assert by_path(params).keys() == {
        *(f"layers/{place}/{name}" for place in (0, 1) for name in ("bias", "kernel")),
        *("norm/bias", "norm/scale"),
    }
    module.train()
    y, new = net.apply(params, stats, X, True, jax.random.key(2))
    np.testing.assert_array_equal(y, module(X))
    np.testing.assert_array_equal(new["norm"]["mean"], module.norm.mean[...])
    np.testing.assert_allclose(new["norm"]["mean"], 0.1 * X.reshape(6, -1).mean(0), atol=1e-6)
    module.eval()
    y, same = net.apply(params, new, X, False)
    np.testing.assert_array_equal(y, module(X))
    assert same is new


def test_equinox_computes_what_the_module_does():
    """To the bit, in training and in evaluation, running statistics too."""
    eqx = pytest.importorskip("equinox")
    net, (module, state) = qmx.from_equinox(of_equinox()), of_equinox()(jax.random.key(0))
    params, stats = net.init(jax.random.key(0), X)
    assert "layers/layers/0/weight" in params and list(stats["arrays"]) == ["calls"]

    def every(module, state):
        call = jax.vmap(module, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        return call(X, state)

    y, new = net.apply(params, stats, X, True, jax.random.key(2))
    want, state = every(module, state)
    np.testing.assert_array_equal(y, want)
    y, same = net.apply(params, new, X, False)
    np.testing.assert_array_equal(y, every(eqx.nn.inference_mode(module), state)[0])
    assert same is new and not np.array_equal(y, want)
    alone = qmx.from_equinox(of_equinox(stateful=False))
    params, stats = alone.init(jax.random.key(0), X)
    want = jax.vmap(of_equinox(stateful=False)(jax.random.key(0)))(X)
    np.testing.assert_array_equal(alone.apply(params, stats, X, True)[0], want)


@pytest.mark.parametrize("kind", ["nnx", "equinox"])
def test_trained_as_others(kind):
    """In a method: the loss falls, another key drops others, an evaluation draws nothing, and a
    step's shapes are known without computing."""
    net = (
        qmx.from_nnx(lambda rngs: Nnx(rngs, 0.5))
        if kind == "nnx"
        else qmx.from_equinox(of_equinox(0.5))
    )
    method = qmx.distill.make(
        net, qmx.models.classifier(3), lambda rng, batch: batch["image"] / 255
    )
    image = jax.random.randint(jax.random.key(5), (6, 4, 4, 1), 0, 256).astype(jnp.uint8)
    batch = {"image": image, "scores": 9 * jax.nn.one_hot(jnp.arange(6) % 3, 3)}
    params, state = method.init(jax.random.key(0), batch)
    shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
    assert jax.tree.structure(shapes) == jax.tree.structure((params, state))
    step = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
    losses = []
    for number in range(20):
        (loss, (state, _)), grads = step(params, state, batch, jax.random.key(number))
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), losses
    one, again, other = (
        float(step(params, state, batch, jax.random.key(seed))[0][0]) for seed in (1, 1, 2)
    )
    assert one == again != other
    variables = method.encoder(params, state)
    x = image / 255
    assert (net.apply(*variables, x, False)[0] == net.apply(*variables, x, False)[0]).all()
    if kind == "nnx":
        with pytest.raises(ValueError, match="give apply a key, as rng="):
            net.apply(*variables, x, True)
