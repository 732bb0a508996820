"""Worth of the ways of choosing images: accuracy of a head on the labels of the chosen ones.

    python benchmarks/choices.py POOL.npz EVALUATION.npz --images=20000 --seeds=5

The files hold "features" f32[n, D] of an encoder and "labels" int[n]. Each seed draws `images` of
the pool anew. A head is chosen and fitted as a student's (qmx/heads.py), here on labels. Prints a
table, accuracy in per cent, mean and standard deviation over the seeds, and, as the last line,
JSON.
"""

import argparse
import json
import time

import numpy as np

from qmx import heads
from qmx.selection.by_features import BY_FEATURES, unit
from qmx.selection.orders import random_order

WAYS = ("random", "probcover", "typiclust", "maxherding")
BUDGETS = (10, 20, 50, 100, 250, 500, 1000)
SURE = 20.0  # the logit of a label


def accuracy(pool: tuple, evaluation: tuple, ids: np.ndarray, seed: int) -> float:
    """Of a head on the labels of `ids`, in per cent; pairs of features and labels."""
    (features, labels), classes = pool, int(pool[1].max()) + 1
    mean, scale = heads.spread(features)
    told = SURE * np.eye(classes, dtype=np.float32)[labels[ids]]
    head = heads.fit(features[ids], told, mean=mean, scale=scale, temperatures=(1.0,), seed=seed)
    guesses = heads.scores(head.params, evaluation[0]).argmax(1)
    return 100 * float((guesses == evaluation[1]).mean())


def read(path: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as file:
        return file["features"].astype(np.float32), file["labels"].astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pool")
    parser.add_argument("evaluation")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=["random", *BY_FEATURES])
    args = parser.parse_args()
    pool, evaluation = read(args.pool), read(args.evaluation)
    classes = int(pool[1].max()) + 1
    found: dict[str, dict[int, list[float]]] = {way: {} for way in args.ways}
    seconds = dict.fromkeys(args.ways, 0.0)
    draws = []
    for seed in range(args.seeds):
        drawn = np.random.default_rng(seed).permutation(len(pool[0]))[: args.images]
        draws.append((pool[0][drawn], pool[1][drawn]))
    print("| images |" + "".join(f" {way} |" for way in args.ways))
    print("|---|" + "---|" * len(args.ways), flush=True)
    for budget in args.budgets:
        for seed, some in enumerate(draws):
            rows = unit(some[0])
            for way in args.ways:
                began, rng = time.perf_counter(), np.random.default_rng(seed)
                if way == "random":
                    ids = random_order(len(rows), seed)[:budget]
                else:
                    ids = BY_FEATURES[way](rows, budget, rng, classes)
                seconds[way] += time.perf_counter() - began
                found[way].setdefault(budget, []).append(accuracy(some, evaluation, ids, seed))
        cells = [found[way][budget] for way in args.ways]
        shown = "".join(f" {np.mean(cell):.1f} ± {np.std(cell):.1f} |" for cell in cells)
        print(f"| {budget:,} |{shown}", flush=True)
    print(json.dumps({"arguments": vars(args), "accuracy": found, "seconds_choosing": seconds}))


if __name__ == "__main__":
    main()
