"""Layer-wise learning rates of vision transformers, which start from somebody's weights."""

import jax
import optax

from qmx.contract import PyTree


def by_layer(decay: float) -> optax.GradientTransformation:
    """Layer-wise rates of a vision transformer: updates times decay^(L + 1 - i), to be chained
    behind an optimiser.

    i is 0 for what makes the tokens (patches, class, registers, positions), the block's number from
    1 to L, and L + 1 for the last norm and the head, whose rate stays as it is.

    Source: Bao et al. 2022 (BEiT), section 3.2 of its fine-tuning, and `util/lr_decay.py` of MAE's
    reference. The rates after the optimiser's own: for `larc`, after its limit.

    Raises:
      ValueError: at the first call, `params["backbone"]` has no blocks.
    """

    def init(params: PyTree) -> optax.EmptyState:
        if not _blocks(params):
            raise ValueError(
                f"layer_decay {decay} is of vision transformers, whose layers are blocks; set it"
                " to 1 for this network"
            )
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        depth = _blocks(updates)

        def scaled(path: tuple, update: jax.Array) -> jax.Array:
            return update * decay ** (depth + 1 - _layer(path, depth))

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(init, update)


def _blocks(params: PyTree) -> int:
    """Number of a vision transformer's blocks; 0 of another network."""
    return sum(name.startswith("block_") for name in params.get("backbone", {}))


def _layer(path: tuple, depth: int) -> int:
    """Layer of the parameter at a path, see `by_layer`."""
    part, name = path[0].key, getattr(path[1], "key", "")
    if part != "backbone" or name == "norm":
        return depth + 1
    return int(name.removeprefix("block_")) + 1 if name.startswith("block_") else 0
