"""Ways of pretraining without labels, each given the same processor time: what their features tell.

    python benchmarks/equal_compute.py --pool=train.npz --evaluation=test.npz --minutes=10
    python benchmarks/equal_compute.py --pool=train.npz --evaluation=test.npz --minutes=25 \\
        --methods moco emp_ssl

The npz files hold "image" uint8[n, H, W, C] and "label" int[n]. Network, views and recipes are
those of `--config`. `minutes` are of `--cores` cores, as processor time, so that other work on the
machine changes little: some steps are timed, and the schedule has as many as fit; compilation does
not count. Features are those of whole images.

Each method has a row: epochs and FLOPs of its training; accuracy on the evaluation images, in per
cent, of a linear classifier on all labels of the pool, of neighbours (k 20, T 0.1), and of heads on
the labels of a few images drawn at random; and how many of these, by a line through the measured
budgets, tell as much as `--reach`. Nothing is chosen by these figures. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from choices import accuracy
from ml_collections import FrozenConfigDict

from qmx import networks, trainers
from qmx.contract import Encoder
from qmx.data import Dataset, Source, load
from qmx.data.batches import feed
from qmx.inference import predict
from qmx.main import set_xla_flags
from qmx.metrics import knn
from qmx.operations import of_call
from qmx.report.reach import first_reached
from qmx.selection.orders import random_order
from qmx.sharding import put_state
from qmx.shipped import load_file
from qmx.train import TrainState, fit

METHODS = ("moco", "simsiam", "fastsiam", "emp_ssl", "rotation")
BUDGETS = (50, 100, 250, 500, 1000)
TIMED = 5  # steps from which the number that fits is told


def pretrain(name: str, config: Any, data: Dataset, seconds: float) -> tuple[Encoder, dict]:
    """The encoder that a method makes in `seconds` of processor time, and facts of the training."""
    keys, view_keys = config.pretrain[name], config[trainers.PRETRAINING[name].view]
    seen, rng = networks.look(data), jax.random.key(0)

    def train(steps: int, until: int) -> tuple[trainers.Trainer, TrainState, float]:
        trainer = trainers.pretrainer(name, keys, config.student, view_keys, seen, steps)

        def batches(start: int) -> Iterator[Any]:
            return feed(
                data.pool, keys.batch_size, steps=until, seed=0, start=start, drop_last=True
            )

        ts = put_state(trainer.init(rng))
        began = np.inf

        def compiled(done: int, metrics: dict[str, float]) -> None:
            nonlocal began
            if done == 1:
                began = time.process_time()

        ts = jax.block_until_ready(
            fit(trainer.step, ts, batches, rng, steps=until, on_metrics=compiled)
        )
        return trainer, ts, (time.process_time() - began) / (until - 1)

    steps = max(2, int(seconds / train(10_000, 1 + TIMED)[2]))
    trainer, ts, cost = train(steps, steps)
    batch = {"image": jax.ShapeDtypeStruct((keys.batch_size, *data.shape), np.uint8)}
    facts = {
        "epochs": steps * keys.batch_size / data.pool.size,
        "petaflops": steps * of_call(trainer.step, ts, batch, rng) / 1e15,
        "minutes": steps * cost / 60,
    }
    return trainer.method.encoder(ts.params, ts.state), facts


def linear(pool: np.ndarray, labels: np.ndarray, asking: np.ndarray) -> np.ndarray:
    """Classes that a linear classifier on all labels tells."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(pool)
    fitted = LogisticRegression(C=0.1, max_iter=300).fit(scale.transform(pool), labels)
    return fitted.predict(scale.transform(asking))


def images_and_labels(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of a source in memory."""
    arrays, rows = source.held
    return arrays["image"][rows], arrays["label"][rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--config", default="cifar10:laptop")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="of the few labels")
    parser.add_argument("--draws", type=int, default=3, help="of each budget")
    parser.add_argument("--reach", type=float, default=45.0, help="accuracy in per cent")
    parser.add_argument("--features", help="npz files to write, a % for the method's name")
    args = parser.parse_args()
    set_xla_flags()
    config = load_file(args.config)
    config.data.update(source="arrays", path=args.pool, eval_path=args.evaluation)
    config = FrozenConfigDict(config)
    data = load(**config.data)
    (images, labels), (asking, truth) = map(images_and_labels, (data.pool, data.evaluation))
    seen = networks.look(data)
    view, net = (
        networks.evaluation_view(seen),
        networks.backbone(config.student.arch, config.student.dtype, seen),
    )
    heads = "".join(f" {n:,} labels |" for n in args.budgets)
    print(
        f"| method | minutes | epochs | petaFLOP | linear | neighbours |{heads}"
        f" labels to {args.reach:g} % |"
    )
    print("|" + "---|" * (7 + len(args.budgets)), flush=True)
    rows = []
    for name in args.methods:
        encoder, row = pretrain(name, config, data, 60 * args.minutes * args.cores)
        row["minutes"] /= args.cores
        pool, evaluation = (predict(net, *encoder, view, x) for x in (images, asking))
        if args.features:
            np.savez(args.features.replace("%", f"{name}-pool"), features=pool, labels=labels)
            np.savez(args.features.replace("%", f"{name}-test"), features=evaluation, labels=truth)
        row["linear"] = 100 * float((linear(pool, labels, evaluation) == truth).mean())
        told = knn(pool, labels, evaluation, k=20, temperature=0.1)
        row["neighbours"] = 100 * float((told == truth).mean())
        few = [
            [
                accuracy(
                    (pool, labels), (evaluation, truth), random_order(len(pool), draw)[:n], draw
                )
                for draw in range(args.draws)
            ]
            for n in args.budgets
        ]
        means = [float(np.mean(draws)) for draws in few]
        row |= {
            "method": name,
            "few": few,
            "labels": first_reached(args.budgets, means, args.reach),
        }
        rows.append(row)
        shown = "".join(f" {mean:.1f} |" for mean in means)
        number = f"{row['labels']:,.0f}" if row["labels"] else "not reached"
        print(
            f"| {name} | {row['minutes']:.1f} | {row['epochs']:.2f} | {row['petaflops']:.3f} |"
            f" {row['linear']:.1f} | {row['neighbours']:.1f} |{shown} {number} |",
            flush=True,
        )
    print(json.dumps({"arguments": vars(args), "rows": rows}))


if __name__ == "__main__":
    main()
