"""Choice of images by the name of an order."""

import numpy as np

from qmx.data import Source
from qmx.selection.by_answers import BY_ANSWERS
from qmx.selection.by_features import BY_FEATURES
from qmx.selection.orders import class_balanced_order, from_list, predecessor_order, random_order

NEED_FEATURES = (*BY_FEATURES, *BY_ANSWERS)  # of an encoder
SELECTS = ("random", "class_balanced", "list", "predecessor", *NEED_FEATURES)


def select(
    name: str, pool: Source, budget: int, seed: int, lists: tuple[str, ...] = ()
) -> np.ndarray:
    """`budget` ids of the pool, i64[budget], without looking at the images.

    Args:
      name: "random"; "class_balanced", as many images of each true class, up to one; "list", the
        images that one of `lists` names; "predecessor", the same shuffle for every seed, with
        numpy's seed 1234, as in the code of the ImageNet table
        (alright-code/model-extraction-self-supervision, src/dataset.py). Except for lists, a larger
        budget's choice holds a smaller one's for the same seed.
      lists: text files of image names, one for each budget; their lengths tell them apart.

    Raises:
      ValueError: an unknown name; no list, or several, of `budget` images.
    """
    if name == "random":
        return random_order(pool.size, seed)[:budget]
    if name == "class_balanced":
        return class_balanced_order(pool.labels, seed)[:budget]
    if name == "predecessor":
        return predecessor_order(pool.size)[:budget]
    if name == "list":
        read = {path: from_list(path, pool.names) for path in lists}
        fitting = [ids for ids in read.values() if len(ids) == budget]
        if len(fitting) != 1:
            lengths = ", ".join(f"{path} {len(ids)}" for path, ids in read.items())
            raise ValueError(
                f"{len(fitting)} of the lists have {budget} images ({lengths}); there must be one"
                " list of as many images as each budget has"
            )
        return fitting[0]
    known = [one for one in SELECTS if one not in NEED_FEATURES]
    raise ValueError(
        f"selection {name!r} is unknown, or needs features; choose among {', '.join(known)}"
    )
