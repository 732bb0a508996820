"""The two shapes that everything in qmx is built around: a network, and a training method.

Both are plain tuples of pure functions, so that a network written with any library, and a method
written by anybody, fit the same step, the same loop, the same sharding and the same checkpoint.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Batch = dict[str, jax.Array]  # "image": uint8[B, H, W, C]; a method says what else it reads


class Rows(NamedTuple):
    """Several batches as numbers of rows, of tables that lie on the devices: what one dispatch
    trains on."""

    # By a prefix of the names in a batch, "" and "pool_": every example, [n, ...] each.
    tables: dict[str, Batch]
    ids: dict[str, jax.Array]  # of each table i32[T, B], the rows of T batches
    steps: np.int32  # how many of the T are trained on, the first ones

    def batch(self, place: jax.Array) -> Batch:
        """Batch number `place` of the T, gathered on the devices."""
        batch = {
            prefix + name: rows[self.ids[prefix][place]]
            for prefix, table in self.tables.items()
            for name, rows in table.items()
        }
        # What follows is compiled as for a batch from the host, and gives the same bits.
        return jax.lax.optimization_barrier(batch)


class Network(NamedTuple):
    """A network as two pure functions; `params` are trained, `stats` are running statistics.

    init:  (rng, x) -> (params, stats)
    apply: (params, stats, x, train, rng=None) -> (y, stats); with `train=False` the statistics are
           only read. `rng` is for dropout and stochastic depth: None in an evaluation.
    """

    init: Callable[[jax.Array, jax.Array], tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[jax.Array, PyTree]]


class Encoder(NamedTuple):
    """The variables of a backbone: what one stage hands to the next."""

    params: PyTree
    stats: PyTree


class Method(NamedTuple):
    """A way to train, as five pure functions.

    init:    (rng, batch) -> (params, state); only the shapes of the batch are read.
    loss:    (params, state, batch, rng) -> (loss f32[], (state, metrics)), differentiable in
             params; `metrics` is a flat dict of f32[] that never feeds the next step.
    encoder: (params, state) -> Encoder: the backbone, what the next stage starts from.
    start:   (params, state, encoder) -> (params, state) that begin from a given backbone; raises
             ValueError with every variable that is missing, left over or of another shape.
    network: (params, state) -> Encoder: the variables that are kept and evaluated, all parts of
             them (a student's with its head; where a teacher is averaged, the teacher's).

    `params` is a dict with one entry for each part ("backbone", "head", ...), the names by which
    `qmx.optim` gives them rates of their own.
    """

    init: Callable[[jax.Array, Batch], tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, PyTree, Batch, jax.Array], tuple[jax.Array, tuple[PyTree, dict]]]
    encoder: Callable[[PyTree, PyTree], Encoder]
    start: Callable[[PyTree, PyTree, Encoder], tuple[PyTree, PyTree]]
    network: Callable[[PyTree, PyTree], Encoder]


View = Callable[[jax.Array, Batch], jax.Array]  # (rng, batch) -> f32[B, H, W, C]


def chain(**parts: Network) -> Network:
    """One network out of several, applied in the order given.

    Its params and stats are dicts with one entry for each part, by the parts' names.
    """

    def init(rng: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        params, stats = {}, {}
        for (name, part), key in zip(parts.items(), jax.random.split(rng, len(parts)), strict=True):
            params[name], stats[name] = part.init(key, x)
            # Only the shape is needed to build the next part.
            y = jax.eval_shape(
                lambda p, s, x, f=part.apply: f(p, s, x, False)[0], params[name], stats[name], x
            )
            x = jnp.zeros(y.shape, y.dtype)
        return params, stats

    def apply(
        params: PyTree, stats: PyTree, x: jax.Array, train: bool, rng: jax.Array | None = None
    ) -> tuple[jax.Array, PyTree]:
        new_stats = {}
        for place, (name, part) in enumerate(parts.items()):
            key = None if rng is None else jax.random.fold_in(rng, place)
            x, new_stats[name] = part.apply(params[name], stats[name], x, train, key)
        return x, new_stats

    return Network(init, apply)


def network_key(rng: jax.Array, place: int = 0) -> jax.Array:
    """The key of a network in a step, apart from those that the views get.

    Args:
      rng: of the step.
      place: which of the step's passes through networks it is.
    """
    return jax.random.fold_in(rng, 0x4E455400 + place)  # "NET"


def begin_from(params: PyTree, stats: PyTree, encoder: Encoder) -> tuple[PyTree, PyTree]:
    """(params, stats) of a `chain` with the part "backbone" of `encoder`; the others stay fresh.

    Raises:
      ValueError: a variable is missing, left over, or of another shape; all of them are listed.
    """
    fresh = Encoder(params["backbone"], stats["backbone"])
    check_shapes(encoder, fresh, "the encoder")
    # Copies, because a step donates its state and the encoder may start other trainings.
    copy = jax.tree.map(lambda x, like: jnp.array(x, like.dtype), encoder, fresh)
    return {**params, "backbone": copy.params}, {**stats, "backbone": copy.stats}


def view_shape(view: View, batch: Batch) -> jax.Array:
    """Zeros of the shape and dtype that `view` makes of `batch`; nothing is computed."""
    out = jax.eval_shape(view, jax.random.key(0), batch)
    return jnp.zeros(out.shape, out.dtype)


def variable_shapes(network: Network, shape: tuple[int, int, int]) -> Encoder:
    """Shapes and dtypes of a network's variables, for images of H, W, C; nothing is computed."""
    images = jnp.zeros((2, *shape))  # two, because one has no batch statistics
    return Encoder(*jax.eval_shape(lambda: network.init(jax.random.key(0), images)))


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32, or in float64 if it is: what sums and logarithms are taken in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def by_path(tree: PyTree) -> dict[str, Any]:
    """Every leaf by its path, "/" between the names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def check_shapes(given: PyTree, wanted: PyTree, what: str) -> None:
    """Raise ValueError, with every leaf that is missing, left over or of another shape, unless
    there is none."""
    have = {name: leaf.shape for name, leaf in by_path(given).items()}
    want = {name: leaf.shape for name, leaf in by_path(wanted).items()}
    wrong = [
        f"{name} is {have.get(name, 'missing')} and should be {want.get(name, 'absent')}"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]
    if wrong:
        raise ValueError(f"{what} is of another network: {'; '.join(wrong)}")
