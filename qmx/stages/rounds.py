"""Choosing by answers: some images are asked about, their answers say which ones come next, and so
on."""

from functools import cache, partial

import numpy as np
from scipy.special import softmax

from qmx.grid import Cell
from qmx.progress import say
from qmx.selection.by_answers import BY_ANSWERS, shares
from qmx.selection.orders import random_order
from qmx.sharding import from_first
from qmx.stages.answers import afford, answered, ask_about, read_scores
from qmx.stages.features import Features, propagation_inputs
from qmx.stages.run import Run
from qmx.stages.target import Target, target_query


def in_rounds(run: Run, cell: Cell, features: Features, target: Target) -> np.ndarray:
    """The images of a cell whose way is one of `BY_ANSWERS`, i64[queries], in the order of asking.

    The first share is drawn at random, as in Pal et al. 2020. It is the beginning of the selection
    "random": both columns pay for these images once, and a gain over "random" is due to answers
    alone. Then, `config.rounds` times, `propagate` spreads the answers so far over the pool, on the
    frozen features of the cell's encoder, and the way chooses the next share by them. Other than in
    Pal et al. no student is trained between rounds: a round costs as much as `propagate`. Answers
    have the cell's access level.

    All shares but the last are asked about here, for the ledger's purpose "select". Answers to the
    last choose nothing; `qmx.stages.query.query` asks for them, for "train". The student learns
    from all shares. An image that several columns want is paid for once, and keeps on the ledger's
    account the purpose it was first asked for. In the report's rows each column counts its own
    images: the last share as "train", the others as "select".

    The choice depends on nothing but the cell. A killed run makes it again, with the answers that
    are in the ledger, and asks only for the missing ones.

    Raises:
      BudgetSpent: a share is more than the ledger's budget has left; nothing of it was asked.
    """
    pool, way = run.data.pool, BY_ANSWERS[cell.select]
    ask = cache(lambda: target_query(run, target))
    first, *later = shares(cell.queries, run.config.rounds)
    ids, keys = random_order(pool.size, cell.seed)[:first], list[bytes]()
    say(
        f"{cell.select} chooses {cell.queries} of {pool.size} images in {len(later)} rounds by the"
        f" answers to those before, over the features of {features.encoder.init} seed {cell.seed}"
    )
    for number, share in enumerate(later):
        new = ids[len(keys) :]
        afford(run, target, pool, new)
        keys += ask_about(
            run,
            target,
            ask,
            pool,
            new,
            "select",
            f"query to select, {cell.init} {cell.select} {cell.access} "
            f"{cell.queries} seed {cell.seed}, round {number}",
        )
        has = answered(run, target.identity, keys)
        some = [keys[place] for place in np.flatnonzero(has)]
        known = softmax(read_scores(run, target.identity, some, cell.access), axis=1)
        spread = features.propagate(ids[has], known, run.config.propagation)
        # In one process, since another machine's sums may round another way, and choose others.
        ids = np.concatenate([ids, from_first(partial(way, spread, ids, share))])
    return ids


def inputs_of(run: Run, cell: Cell, target: Target) -> dict:
    """Inputs of the choice of `in_rounds`, beside the encoder, the seed and the budget."""
    return {
        **target.identity,
        "access": cell.access,
        "rounds": run.config.rounds,
        **propagation_inputs(run),
    }
