"""An encoder's features: how good they are beside a random network's."""

from pathlib import Path

import jax
import numpy as np

from qmx import networks, trainers
from qmx.contract import Encoder
from qmx.data.sources import take
from qmx.metrics import held_out, held_out_knn, top_k
from qmx.sharding import put_state
from qmx.stages.features import Features
from qmx.stages.pretrain import Pretrained, backbone
from qmx.stages.run import Run, needed, outputs, plain, read_weights, root_key
from qmx.stages.target import Labels
from qmx.training import train
from qmx.workdir import NotDone


def monitor(
    run: Run, encoder: Pretrained | NotDone, features: Features | NotDone | None = None
) -> dict:
    """Compare an encoder's features with a random network's, on a held-out part of the pool;
    {} for a pool without labels.

    Args:
      features: of the encoder, where other stages read them; an encoder that stays as it is always
        has them, and has no random network beside it.
    """
    encoder = needed(encoder)
    if not run.data.pool.labelled:
        return {}
    keys, student, seed = run.config.monitor, run.config.student, encoder.seed
    arch, dtype = student.arch, networks.evaluated_in(student.dtype)
    size = {"size": student.size}
    neighbours = {"knn_k": keys.knn_k, "knn_temperature": keys.knn_temperature}
    if encoder.kind:
        rows = needed(features)
        told = {"pool": run.data.pool_digest, "encoder": encoder.sha256, "monitor": neighbours}
        return {
            **neighbours,
            **run.stage(
                "monitor",
                encoder.name,
                told,
                lambda _: {
                    "knn_top1": held_out_knn(
                        rows.read(), run.data.pool.labels, *neighbours.values()
                    )
                },
            ),
        }

    def look_at_random(_: Path) -> dict:
        random = networks.random_backbone(arch, dtype, networks.look(run.data), student.size)
        variables = put_state(Encoder(*random(root_key(seed, "random"))))
        return {"knn_top1": knn_top1(run, f"a random network, seed {seed}", variables)}

    def look(directory: Path) -> dict:
        variables = read_weights(run, backbone(run), encoder.path)
        rows = features.rows() if isinstance(features, Features) else None
        result = {"knn_top1": knn_top1(run, encoder.name, variables, rows)}
        if keys.linear:
            result["linear_top1"] = linear_top1(run, variables, directory, encoder)
        return result

    # The random network is the same whatever the encoder: once a seed.
    shared = {
        "pool": run.data.pool_digest,
        "arch": arch,
        "dtype": dtype,
        "monitor": neighbours,
        **size,
    }
    random = run.stage("monitor", f"random-seed{seed}", shared, look_at_random)
    inputs = {
        "pool": run.data.pool_digest,
        "encoder": encoder.sha256,
        "monitor": neighbours,
        **size,
    }
    if keys.linear:
        inputs |= {"probe": plain(keys.probe), "weak_view": plain(run.config.weak_view)}
    # A probe has the seed's key, and neighbours have none.
    name = f"{encoder.init}-seed{seed}" if keys.linear else encoder.name
    result = run.stage("monitor", name, inputs, look)
    return {**neighbours, **result, "knn_top1_random": random["knn_top1"]}


def knn_top1(run: Run, name: str, encoder: Encoder, features: np.ndarray | None = None) -> float:
    """`qmx.metrics.held_out_knn` of an encoder's features within the pool, in per cent; without
    `features` they are computed."""
    keys, pool = run.config.monitor, run.data.pool
    if features is None:
        features = outputs(run, f"features of {name}", backbone(run), encoder, pool)
    return held_out_knn(features, pool.labels, keys.knn_k, keys.knn_temperature)


def linear_top1(run: Run, variables: Encoder, directory: Path, encoder: Pretrained) -> float:
    """Accuracy in per cent of a linear classifier on frozen features, after its last step."""
    keys, pool, seen = run.config.monitor.probe, run.data.pool, networks.look(run.data)
    arch, dtype = run.config.student.arch, networks.evaluated_in(run.config.student.dtype)
    asking = held_out(pool.size)
    learn = np.flatnonzero(~asking)
    trainer, steps = trainers.of_probe(run.config, seen, len(learn))
    rng = root_key(encoder.seed, "probe")
    ts = trainer.init(rng)
    params, state = trainer.method.start(ts.params, ts.state, variables)
    ts = ts._replace(params=params, state=state)
    source = take(pool, learn, scores=Labels(pool.labels[learn], run.data.classes))
    ts, _ = train(
        directory,
        f"linear probe of {encoder.name}",
        trainer.step,
        ts,
        rng,
        source,
        batch_size=keys.batch_size,
        steps=steps,
        seed=encoder.seed,
        drop_last=False,
        save_seconds=60 * run.config.save_minutes,
        stopped=run.stopped,
        tensorboard=run.config.tensorboard,
    )
    classifier = networks.classifier(arch, dtype, seen)
    whole = trainer.method.network(ts.params, ts.state)
    held = take(pool, np.flatnonzero(asking))
    scores = outputs(
        run, f"probing {encoder.name}", classifier, jax.tree.map(jax.numpy.asarray, whole), held
    )
    return top_k(scores, held.labels, 1)
