"""Time of choosing what to ask by features: each way of qmx/selection/by_features.py, and
propagation.

    python benchmarks/selection.py --images=100000 --dimension=512 --budget=1000

Features: unit rows around as many centres as there are classes. Prints a table and, as the last
  line, JSON.
"""

import argparse
import json
import os
import resource
import time

import numpy as np

from qmx.selection.by_features import BY_FEATURES, unit
from qmx.selection.propagate import propagate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--budget", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["balanced", "kcenter", "typiclust", "propagate"],
        choices=[*BY_FEATURES, "propagate"],
        help="probcover looks at all pairs and takes longest",
    )
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    centres, of = (
        rng.normal(size=(args.classes, args.dimension)),
        rng.integers(args.classes, size=args.images),
    )
    features = unit(
        (centres[of] + rng.normal(size=(args.images, args.dimension))).astype(np.float32)
    )
    seconds = {}
    print("| way | seconds |\n|---|---|")
    for way in args.ways:
        began = time.perf_counter()
        if way == "propagate":
            ids = rng.permutation(args.images)[: args.budget]
            propagate(features, ids, np.eye(args.classes, dtype=np.float32)[of[ids]])
        else:
            ids = BY_FEATURES[way](features, args.budget, np.random.default_rng(0), 100)
            assert len(np.unique(ids)) == args.budget
        seconds[way] = time.perf_counter() - began
        print(f"| {way} | {seconds[way]:.1f} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "arguments": vars(args),
                "seconds": seconds,
                "peak_bytes": peak,
                "feature_bytes": features.nbytes,
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
