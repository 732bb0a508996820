"""MoCo on CIFAR-10 beside the curve that its authors published: is the method the reference's?

    python benchmarks/moco_cifar10.py --pool=train.npz --evaluation=test.npz --epochs=1

The npz files hold "image" uint8[n, 32, 32, 3] and "label" int[n]. The protocol is that of
`facebookresearch/moco`, branch `colab-notebook`, `moco_cifar10_demo.ipynb`: ResNet-18 with a 3x3
stem, a linear head of 128, K 4096, m 0.99, T 0.1, 8 groups of batch statistics, batch 512, rate
0.06 on a cosine of 200 epochs held during each; weighted 200-nearest-neighbour accuracy of the
test images among the training images (T 0.1) after each epoch. Nothing is chosen by it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax

from qmx import augment, models, optim
from qmx.contract import chain
from qmx.data import batches, epoch_steps
from qmx.data.arrays import read_npz
from qmx.data.sources import in_memory
from qmx.evaluate import knn, predict
from qmx.main import set_xla_flags
from qmx.methods import moco
from qmx.sharding import put_state
from qmx.train import fit, init_state, make_step

BATCH, EPOCHS = 512, 200
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the notebook's
# The notebook's own output, asymmetric loss, 200 epochs: epoch -> (kNN %, mean loss).
REFERENCE = {1: (32.0, 6.96), 2: (33.5, 7.25), 5: (38.0, 6.86), 10: (48.0, 5.99), 20: (61.4, 4.34),
             50: (73.3, 3.20), 100: (78.1, 2.73), 150: (81.2, 2.43), 200: (82.6, 2.27)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, help="npz of the 50,000 training images")
    parser.add_argument("--evaluation", required=True, help="npz of the 10,000 test images")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="how many of the 200 to train")
    parser.add_argument("--batch", type=int, default=BATCH, help="another one is not the protocol")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON of every epoch, rewritten after each")
    given = parser.parse_args()
    set_xla_flags()

    images, labels = read_npz(given.pool)
    test_images, test_labels = read_npz(given.evaluation)
    pool = in_memory(image=images)
    view = augment.make_view(32, crop_scale=(0.08, 1.0), blur_p=0, mean=MEAN, std=STD)
    net, head = models.backbone("resnet18_small", stats_groups=8), models.classifier(128)
    method = moco.make(net, head, view, queue_size=4096, temperature=0.1, decay=0.99)
    per_epoch = int(epoch_steps(pool.size, given.batch, drop_last=True))
    steps = EPOCHS * per_epoch
    rate = optim.schedule("cosine_by_epoch", 0.06, epochs=EPOCHS, steps=steps)
    tx = optim.sgd(rate, weight_decay=5e-4)
    rng = jax.random.key(given.seed)
    ts = put_state(init_state(method, tx, rng, {"image": images[: given.batch]}))
    step = make_step(method, tx)
    encode, plain = chain(backbone=net, head=head), augment.plain_view(MEAN, STD)

    def feed(start: int):
        return batches(pool, given.batch, steps=steps, seed=given.seed, start=start, drop_last=True)

    results = []
    for epoch in range(1, given.epochs + 1):
        losses: list[float] = []
        began = time.monotonic()

        def on_metrics(done: int, metrics: dict[str, float], losses: list[float] = losses) -> None:
            losses.append(metrics["loss"])
            print(f"step {done} loss {metrics['loss']:.3f} contrast_acc1 {metrics['contrast_acc1']:.3f} "
                  f"mean {sum(losses) / len(losses):.3f}", file=sys.stderr, flush=True)

        ts = fit(step, ts, feed, rng, steps=epoch * per_epoch, on_metrics=on_metrics)
        bank, queries = (predict(encode, ts.params, ts.state.stats, plain, x) for x in (images, test_images))
        found = knn(bank, labels, queries, k=200, temperature=0.1)
        row = {"epoch": epoch, "loss": sum(losses) / len(losses), "first_loss": losses[0], "last_loss": losses[-1],
               "knn_top1": 100 * float((found == test_labels).mean()), "knn_k": 200, "knn_temperature": 0.1,
               "seconds": time.monotonic() - began}
        row["reference_knn_top1"], row["reference_loss"] = REFERENCE.get(epoch, (None, None))
        results.append(row)
        print(json.dumps(row), flush=True)
        if given.out:
            given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
