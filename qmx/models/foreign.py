"""Networks that are written with flax.nnx or equinox, as `Network`s."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qmx.contract import Network, PyTree, by_path


def from_nnx(make: Callable[[Any], Any]) -> Network:
    """A `Network` around a flax.nnx module.

    Its `nnx.Param`s are trained. All other variables, as batch statistics, are running statistics,
    but for the keys of `nnx.Rngs`: these come from the step's key, and none is kept.

    Args:
      make: nnx.Rngs -> the module, called as `module(x)`. Its `train()` and `eval()` tell dropout
        and batch norm which of the two it is.

    Raises:
      ValueError: by `apply`, the module draws in training and gets no key.
    """
    from flax import nnx

    def parts(module: Any) -> tuple[Any, ...]:
        """(graph, params, keys, stats)"""
        return nnx.split(module, nnx.Param, nnx.RngState, ...)

    # Without values: its graph, and the places of the variables in it.
    graph, *places = parts(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def filled(place: Any, values: PyTree) -> Any:
        state = jax.tree.map(lambda leaf: leaf, place)  # a copy
        nnx.replace_by_pure_dict(state, values)
        return state

    def drawn(place: Any, rng: jax.Array) -> Any:
        """The streams of keys, each with one of its own, at its beginning."""
        leaves, structure = jax.tree.flatten(place)
        new = [
            jax.random.split(jax.random.fold_in(rng, number), leaf.shape)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for number, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, new)

    def init(rng: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        del x  # an nnx module knows its sizes
        _, params, _, stats = parts(make(nnx.Rngs(rng)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def apply(
        params: PyTree, stats: PyTree, x: jax.Array, train: bool, rng: jax.Array | None = None
    ) -> tuple[jax.Array, PyTree]:
        if train and rng is None and jax.tree.leaves(places[1]):
            raise ValueError("this module draws in training; give apply a key, as rng=")
        keys = drawn(places[1], jax.random.key(0) if rng is None else rng)
        module = nnx.merge(graph, filled(places[0], params), keys, filled(places[2], stats))
        module.train() if train else module.eval()
        y = module(x)
        return y, nnx.to_pure_dict(parts(module)[3]) if train else stats

    return Network(init, apply)


def from_equinox(make: Callable[[jax.Array], Any]) -> Network:
    """A `Network` around an equinox module.

    Its arrays of floating numbers are trained; the others, and its state, are running statistics.

    Args:
      make: key -> the module, called for one image as `module(x, key=key)`; or, as
        `equinox.nn.make_with_state` gives them, (module, state), called as
        `module(x, state, key=key)` -> (y, state). x is f32[H, W, C]; the axis over the images is
        called "batch", for `equinox.nn.BatchNorm`. `key` is None in an evaluation.
    """
    import equinox as eqx

    def by_number(tree: PyTree) -> dict[str, Any]:
        return {str(place): leaf for place, leaf in enumerate(jax.tree.leaves(tree))}

    # Without values. Of two calls of `make` the states have other markers, so that only this one's
    # structure is used.
    like = eqx.filter_eval_shape(make, jax.random.key(0))
    stateful = isinstance(like, tuple)
    module_like, state_like = like if stateful else (like, None)

    def init(rng: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        del x  # an equinox module knows its sizes
        made = make(rng)
        module, state = made if stateful else (made, None)
        params, rest = eqx.partition(module, eqx.is_inexact_array)
        arrays = by_path(eqx.filter(rest, eqx.is_array))
        return by_path(params), {"arrays": arrays, "state": by_number(state)}

    def apply(
        params: PyTree, stats: PyTree, x: jax.Array, train: bool, rng: jax.Array | None = None
    ) -> tuple[jax.Array, PyTree]:
        values = {**params, **stats["arrays"]}
        paths, structure = jax.tree_util.tree_flatten_with_path(module_like)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
        leaves = [values.get(name, leaf) for name, (_, leaf) in zip(names, paths, strict=True)]
        module = eqx.nn.inference_mode(jax.tree.unflatten(structure, leaves), not train)
        keys = None if rng is None or not train else jax.random.split(rng, len(x))
        of_keys = None if keys is None else 0
        if not stateful:
            call = jax.vmap(lambda x, key: module(x, key=key), (0, of_keys), axis_name="batch")
            return call(x, keys), stats
        old = [stats["state"][str(place)] for place in range(len(stats["state"]))]
        state = jax.tree.unflatten(jax.tree.structure(state_like), old)
        y, new = jax.vmap(
            lambda x, state, key: module(x, state, key=key),
            (0, None, of_keys),
            (0, None),
            axis_name="batch",
        )(x, state, keys)
        return y, {**stats, "state": by_number(new)} if train else stats

    return Network(init, apply)
