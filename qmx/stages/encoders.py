"""Encoders: pretrained here without labels, or brought along; and what their features are good for."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qmx import build
from qmx.checkpoint import file_digest, save_weights
from qmx.contract import Encoder, Network
from qmx.data import Dataset
from qmx.data.sources import take
from qmx.evaluate import held_out, held_out_knn, top_k
from qmx.health import watch
from qmx.job import train
from qmx.methods import linear
from qmx.models import from_torch
from qmx.oracle.by_features import unit
from qmx.sharding import first, put_state
from qmx.stages.run import Run, outputs, plain, read_weights, root_key
from qmx.stages.target import Labels, check_channels
from qmx.workdir import write_arrays


def pretrain(this: Run, init: str, seed: int) -> dict:
    """An encoder: trained without labels, or converted from the weights that the config names."""
    keys, student = this.config.pretrain[init], this.config.student
    if keys.path:
        inputs = {"arch": student.arch, "file": file_digest(keys.path)}
        return this.stage("pretrain", f"{init}-seed{seed}", inputs, lambda directory: _convert(this, init, directory))
    view = view_of(init)
    inputs = {"seed": seed, "pretrain": {init: plain(keys)}, view: plain(this.config[view]), "student": plain(student)}
    return this.stage("pretrain", f"{init}-seed{seed}", inputs,
                      lambda directory: _pretrain(this, init, seed, directory))


def view_of(init: str) -> str:
    """The config's view that a pretraining sees."""
    return "weak_view" if init == "rotation" else "strong_view"


def _pretrain(this: Run, init: str, seed: int, directory: Path) -> dict:
    keys, pool, seen = this.config.pretrain[init], this.data.pool, build.look(this.data)
    steps = build.pretrain_steps(keys, pool.size)
    trainer = build.pretrainer(init, keys, this.config.student, this.config[view_of(init)], seen, steps)
    rng = root_key(seed, init)
    began = time.monotonic()
    ts = train(directory, f"pretrain {init} seed {seed}", trainer.step, trainer.init(rng), rng, pool,
               batch_size=keys.batch_size, steps=steps, seed=seed, drop_last=True,
               save_seconds=this.save_seconds, stopped=this.stopped,
               watch=watch(steps // int(keys.epochs), keys.get("features"), keys.get("queue_size")))
    seconds = time.monotonic() - began
    digest = save_weights(directory / "encoder.safetensors", trainer.method.encoder(ts.params, ts.state))
    return {"sha256": digest, "seconds": seconds, "epochs": int(keys.epochs)}


def _convert(this: Run, init: str, directory: Path) -> dict:
    began = time.monotonic()
    encoder = converted(this.config, init, this.data).backbone
    digest = save_weights(directory / "encoder.safetensors", encoder)
    return {"sha256": digest, "seconds": time.monotonic() - began, "source": Path(this.config.pretrain[init].path).name}


def converted(config: Any, init: str, data: Dataset) -> from_torch.Converted:
    """The weights that the config names for an init; ValueError unless a student can start from them."""
    path = config.pretrain[init].path
    made = from_torch.load(path, config.student.arch)
    check_channels(made, path, data)
    return made


def features(this: Run, init: str, seed: int) -> np.ndarray:
    """An encoder's features of the whole pool, with unit rows, f32[n, D]; by them it is chosen what to ask."""
    name = f"{init}-seed{seed}"
    inputs = {"encoder": pretrain(this, init, seed)["sha256"], "dtype": build.evaluated_in(this.config.student.dtype)}

    def work(directory: Path) -> dict:
        encoder = read_encoder(this, init, seed)
        rows = unit(outputs(this, f"features of {name}", backbone(this), encoder, this.data.pool))
        if first():
            write_arrays(directory / "features.npz", features=rows.astype(np.float32))
        return {"images": len(rows), "dimension": rows.shape[1]}

    this.stage("select", f"features-{name}", inputs, work)
    with np.load(this.workdir / "select" / f"features-{name}" / "features.npz", allow_pickle=False) as file:
        return file["features"]


def backbone(this: Run) -> Network:
    """The encoders' network, as it is evaluated."""
    student = this.config.student
    return build.backbone(student.arch, build.evaluated_in(student.dtype), build.look(this.data))


def read_encoder(this: Run, init: str, seed: int) -> Encoder:
    """The encoder that `pretrain` left."""
    return read_weights(this, backbone(this), f"pretrain/{init}-seed{seed}/encoder.safetensors")


def monitor(this: Run, init: str, seed: int) -> dict:
    """How good an encoder's features are beside a random network's, on a held-out part of the pool."""
    made = pretrain(this, init, seed)
    keys, student, name = this.config.monitor, this.config.student, f"{init}-seed{seed}"
    arch, dtype = student.arch, build.evaluated_in(student.dtype)
    neighbours = {"knn_k": keys.knn_k, "knn_temperature": keys.knn_temperature}

    def look_at_random(_: Path) -> dict:
        random = build.random_backbone(arch, dtype, build.look(this.data))(root_key(seed, "random"))
        return {"knn_top1": knn_top1(this, f"a random network, seed {seed}", put_state(Encoder(*random)))}

    def look(directory: Path) -> dict:
        encoder = read_encoder(this, init, seed)
        found = {"knn_top1": knn_top1(this, name, encoder)}
        if keys.linear:
            found["linear_top1"] = linear_top1(this, encoder, directory, name, seed)
        return found

    # The random network is the same whatever the encoder: once a seed.
    same = {"arch": arch, "dtype": dtype, "monitor": neighbours}
    random = this.stage("monitor", f"random-seed{seed}", same, look_at_random)
    probe = {"probe": plain(keys.probe), "weak_view": plain(this.config.weak_view)} if keys.linear else {}
    found = this.stage("monitor", name, {"encoder": made["sha256"], "monitor": neighbours, **probe}, look)
    return {**neighbours, **found, "knn_top1_random": random["knn_top1"]}


def knn_top1(this: Run, name: str, encoder: Encoder) -> float:
    """`qmx.evaluate.held_out_knn` of an encoder's features within the pool, in per cent."""
    keys, pool = this.config.monitor, this.data.pool
    features = outputs(this, f"features of {name}", backbone(this), encoder, pool)
    return held_out_knn(features, pool.labels, keys.knn_k, keys.knn_temperature)


def linear_top1(this: Run, encoder: Encoder, directory: Path, name: str, seed: int) -> float:
    """Accuracy in per cent of a linear classifier on frozen features, after its last step."""
    keys, pool, seen = this.config.monitor.probe, this.data.pool, build.look(this.data)
    arch, dtype = this.config.student.arch, build.evaluated_in(this.config.student.dtype)
    asking = held_out(pool.size)
    learn = np.flatnonzero(~asking)
    steps = build.distill_steps(keys, len(learn))
    trainer = build.prober(keys, arch, dtype, this.config.weak_view, seen, steps)
    rng = root_key(seed, "probe")
    ts = trainer.init(rng)
    ts = ts._replace(state=linear.start_from(ts.state, encoder))
    source = take(pool, learn, scores=Labels(pool.labels[learn], this.data.classes))
    ts = train(directory, f"linear probe of {name}", trainer.step, ts, rng, source, batch_size=keys.batch_size,
               steps=steps, seed=seed, drop_last=False, save_seconds=this.save_seconds,
               stopped=this.stopped)
    classifier = build.classifier(arch, dtype, seen)
    variables = Encoder({"backbone": encoder.params, "head": ts.params["head"]},
                        {"backbone": encoder.stats, "head": ts.state["head"]})
    held = take(pool, np.flatnonzero(asking))
    scores = outputs(this, f"probing {name}", classifier, jax.tree.map(jax.numpy.asarray, variables), held)
    return top_k(scores, held.labels, 1)
