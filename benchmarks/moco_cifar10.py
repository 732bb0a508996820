"""MoCo on CIFAR-10 beside the curve that its authors published: is the method the reference's?

    python benchmarks/moco_cifar10.py --pool=train.npz --evaluation=test.npz --epochs=1
    python benchmarks/moco_cifar10.py --pool=train.npz --evaluation=test.npz --dtype=bfloat16 \\
        --evaluate-at 1 10 50 100 200 --minutes=8

The npz files hold "image" uint8[n, 32, 32, 3] and "label" int[n]. The protocol is that of
`facebookresearch/moco`, branch `colab-notebook`, `moco_cifar10_demo.ipynb`: ResNet-18 with a 3x3
stem, a linear head of 128, K 4096, m 0.99, T 0.1, 8 groups of batch statistics, batch 512, rate
0.06 on a cosine of 200 epochs held during each; weighted 200-nearest-neighbour accuracy of the
test images among the training images (T 0.1), after each epoch or some. Nothing is chosen by it.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qmx import augment, models, optim
from qmx.contract import Rows, chain
from qmx.data import epoch_steps
from qmx.data.arrays import read_npz
from qmx.data.batches import feed
from qmx.data.sources import in_memory
from qmx.inference import predict
from qmx.methods import moco
from qmx.metrics import knn
from qmx.progress import Progress, progress
from qmx.sharding import put_state
from qmx.train import fit, init_state, make_step

BATCH, EPOCHS, ARCH, QUEUE = 512, 200, "resnet18_small", 4096
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the notebook's
# The notebook's own output, asymmetric loss, 200 epochs: epoch -> (kNN %, mean loss).
REFERENCE = {
    1: (32.0, 6.96),
    2: (33.5, 7.25),
    5: (38.0, 6.86),
    10: (48.0, 5.99),
    20: (61.4, 4.34),
    50: (73.3, 3.20),
    100: (78.1, 2.73),
    150: (81.2, 2.43),
    200: (82.6, 2.27),
}


def curve(
    pool: tuple[np.ndarray, np.ndarray],
    evaluation: tuple[np.ndarray, np.ndarray],
    *,
    epochs: int = EPOCHS,
    batch: int = BATCH,
    seed: int = 0,
    arch: str = ARCH,
    dtype: str = "float32",
    evaluate_at: Iterable[int] | None = None,
) -> Iterator[dict]:
    """Train, and give a row after each epoch.

    Args:
      pool, evaluation: images uint8[n, 32, 32, 3] and labels i32[n], as `read_npz` gives them.
      epochs: how many of the 200 to train.
      batch, arch: another one is not the protocol.
      dtype: of the convolutions in training; the neighbours' features are in float32.
      evaluate_at: the epochs after which the neighbours are asked; None is all.

    Yields:
      The losses and seconds of an epoch; after some "knn_top1" in per cent, and the notebook's.
    """
    images, labels = pool
    source = in_memory(image=images)
    view = augment.make_view(32, crop_scale=(0.08, 1.0), blur_p=0, mean=MEAN, std=STD)
    net = models.backbone(arch, stats_groups=8, dtype=jnp.dtype(dtype))
    head = models.classifier(128)
    method = moco.make(net, head, view, queue_size=QUEUE, temperature=0.1, decay=0.99)
    per_epoch = int(epoch_steps(source.size, batch, drop_last=True))
    steps = EPOCHS * per_epoch
    rate = optim.schedule("cosine_by_epoch", 0.06, epochs=EPOCHS, steps=steps)
    tx = optim.sgd(rate, weight_decay=5e-4)
    rng = jax.random.key(seed)
    shapes = {"image": jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)}
    ts = put_state(jax.jit(lambda rng: init_state(method, tx, rng, shapes))(rng))
    step = make_step(method, tx)
    encode, plain = chain(backbone=models.backbone(arch), head=head), augment.plain_view(MEAN, STD)

    def from_device(start: int) -> Iterator[dict[str, jax.Array] | Rows]:
        return feed(source, batch, steps=steps, seed=seed, start=start, drop_last=True)

    for epoch in range(1, epochs + 1):
        losses: list[float] = []
        began = time.monotonic()
        with progress(f"epoch {epoch}", per_epoch, batch) as shown:

            def on_metrics(
                done: int,
                metrics: dict[str, float],
                losses: list[float] = losses,
                shown: Progress = shown,
            ) -> None:
                losses.append(metrics["loss"])
                shown.update(len(losses), f"loss {sum(losses) / len(losses):.3f}")

            ts = fit(step, ts, from_device, rng, steps=epoch * per_epoch, on_metrics=on_metrics)
        row = {
            "epoch": epoch,
            "loss": sum(losses) / len(losses),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "seconds": time.monotonic() - began,
        }
        if evaluate_at is None or epoch in evaluate_at:
            began = time.monotonic()
            bank, asking = (
                predict(encode, ts.params, ts.state.stats, plain, x)
                for x in (images, evaluation[0])
            )
            found = knn(bank, labels, asking, k=200, temperature=0.1)
            row |= {
                "knn_top1": 100 * float((found == evaluation[1]).mean()),
                "knn_k": 200,
                "knn_temperature": 0.1,
                "evaluation_seconds": time.monotonic() - began,
            }
        row["reference_knn_top1"], row["reference_loss"] = REFERENCE.get(epoch, (None, None))
        yield row


def within(rows: Iterable[dict], until: float) -> Iterator[dict]:
    """The rows of a `curve` up to the epoch after which another would end after `until`.

    An epoch is taken to last as long as the one before it did, so after the first, which compiles,
    it is taken to be longer than it is.

    Args:
      until: on the clock of time.monotonic.
    """
    evaluation = 0.0
    for row in rows:
        yield row
        evaluation = row.get("evaluation_seconds", evaluation)
        if time.monotonic() + row["seconds"] + evaluation > until:
            return


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", required=True, help="npz of the 50,000 training images")
    parser.add_argument("--evaluation", required=True, help="npz of the 10,000 test images")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="how many of the 200 to train")
    parser.add_argument("--evaluate-at", type=int, nargs="*", help="epochs; all by default")
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="stop before the epoch that would end after these",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=BATCH, help="another one is not the protocol")
    parser.add_argument("--arch", default=ARCH, help="another one is not the protocol")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON of every epoch, rewritten after each")
    given = parser.parse_args()
    from qmx.main import set_xla_flags

    set_xla_flags()
    until = time.monotonic() + 60 * given.minutes
    rows = curve(
        read_npz(given.pool),
        read_npz(given.evaluation),
        epochs=given.epochs,
        batch=given.batch,
        seed=given.seed,
        arch=given.arch,
        dtype=given.dtype,
        evaluate_at=given.evaluate_at,
    )
    results = []
    for row in within(rows, until):
        results.append(row)
        print(json.dumps(row), flush=True)
        if given.out:
            given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
