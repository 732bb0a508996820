"""An encoder's features: how good they are beside a random network's."""

from pathlib import Path

import jax
import numpy as np

from qmx import trainers
from qmx.contract import Encoder
from qmx.data.sources import take
from qmx.methods import linear
from qmx.metrics import held_out, held_out_knn, top_k
from qmx.sharding import put_state
from qmx.stages.pretrain import backbone, pretrain, read_encoder
from qmx.stages.run import Run, outputs, plain, root_key
from qmx.stages.target import Labels
from qmx.training import train


def monitor(run: Run, init: str, seed: int) -> dict:
    """How good an encoder's features are beside a random network's, on a held-out part of the
    pool."""
    made = pretrain(run, init, seed)
    keys, student, name = run.config.monitor, run.config.student, f"{init}-seed{seed}"
    arch, dtype = student.arch, trainers.evaluated_in(student.dtype)
    neighbours = {"knn_k": keys.knn_k, "knn_temperature": keys.knn_temperature}

    def look_at_random(_: Path) -> dict:
        random = trainers.random_backbone(arch, dtype, trainers.look(run.data))(
            root_key(seed, "random")
        )
        return {
            "knn_top1": knn_top1(run, f"a random network, seed {seed}", put_state(Encoder(*random)))
        }

    def look(directory: Path) -> dict:
        encoder = read_encoder(run, init, seed)
        found = {"knn_top1": knn_top1(run, name, encoder)}
        if keys.linear:
            found["linear_top1"] = linear_top1(run, encoder, directory, name, seed)
        return found

    # The random network is the same whatever the encoder: once a seed.
    same = {"arch": arch, "dtype": dtype, "monitor": neighbours}
    random = run.stage("monitor", f"random-seed{seed}", same, look_at_random)
    probe = (
        {"probe": plain(keys.probe), "weak_view": plain(run.config.weak_view)}
        if keys.linear
        else {}
    )
    found = run.stage(
        "monitor", name, {"encoder": made["sha256"], "monitor": neighbours, **probe}, look
    )
    return {**neighbours, **found, "knn_top1_random": random["knn_top1"]}


def knn_top1(run: Run, name: str, encoder: Encoder) -> float:
    """`qmx.metrics.held_out_knn` of an encoder's features within the pool, in per cent."""
    keys, pool = run.config.monitor, run.data.pool
    features = outputs(run, f"features of {name}", backbone(run), encoder, pool)
    return held_out_knn(features, pool.labels, keys.knn_k, keys.knn_temperature)


def linear_top1(run: Run, encoder: Encoder, directory: Path, name: str, seed: int) -> float:
    """Accuracy in per cent of a linear classifier on frozen features, after its last step."""
    keys, pool, seen = run.config.monitor.probe, run.data.pool, trainers.look(run.data)
    arch, dtype = run.config.student.arch, trainers.evaluated_in(run.config.student.dtype)
    asking = held_out(pool.size)
    learn = np.flatnonzero(~asking)
    steps = trainers.distill_steps(keys, len(learn))
    trainer = trainers.prober(keys, arch, dtype, run.config.weak_view, seen, steps)
    rng = root_key(seed, "probe")
    ts = trainer.init(rng)
    ts = ts._replace(state=linear.start_from(ts.state, encoder))
    source = take(pool, learn, scores=Labels(pool.labels[learn], run.data.classes))
    ts = train(
        directory,
        f"linear probe of {name}",
        trainer.step,
        ts,
        rng,
        source,
        batch_size=keys.batch_size,
        steps=steps,
        seed=seed,
        drop_last=False,
        save_seconds=run.save_seconds,
        stopped=run.stopped,
    )
    classifier = trainers.classifier(arch, dtype, seen)
    variables = Encoder(
        {"backbone": encoder.params, "head": ts.params["head"]},
        {"backbone": encoder.stats, "head": ts.state["head"]},
    )
    held = take(pool, np.flatnonzero(asking))
    scores = outputs(
        run, f"probing {name}", classifier, jax.tree.map(jax.numpy.asarray, variables), held
    )
    return top_k(scores, held.labels, 1)
