"""target -> pretrain -> select -> query -> distill -> evaluate -> report.

Each stage leaves an artefact in the workdir and is skipped when the same inputs already made it:

    target/                      the target's weights
    pretrain/<method>-seed<s>/   an encoder, its nearest-neighbour accuracy
    select/<way>-seed<s>/        the pool's images in the order in which they are asked about
    ledger.sqlite                every answer of the target
    distill/<cell>/              a student
    evaluate/<cell>/             its row of the table
    results.json report.md report.html curve.png
"""

import json
import time
import zlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qmx import build, report, workdir
from qmx.checkpoint import load_weights, save_weights
from qmx.contract import Encoder, Network
from qmx.data import Dataset, subset_size
from qmx.data.sources import take
from qmx.evaluate import compare, held_out_knn, predict, top_k
from qmx.health import watch
from qmx.job import train
from qmx.methods.distill import start_from
from qmx.oracle import BudgetSpent, Ledger, network_query
from qmx.oracle.access import as_logits, one_hot_logits
from qmx.oracle.query import Query
from qmx.oracle.select import select
from qmx.progress import progress, say
from qmx.settings import Cell, cells, percent
from qmx.sharding import put_state

STAGES = ("target", "pretrain", "select", "query", "distill", "evaluate", "report")


class Run(NamedTuple):
    """One call of the program."""

    config: Any  # a frozen config, checked
    workdir: Path
    data: Dataset
    only: str  # a stage, or "all"
    stopped: Callable[[], bool]
    made: list[str]  # what this call did and did not find done

    def stage(self, kind: str, name: str, inputs: dict, work: Callable[[Path], dict]) -> dict:
        """The result of a stage, done now if it is this call's to do; see `qmx.workdir.stage`."""
        directory = self.workdir / kind / name

        def run() -> dict:
            self.made.append(f"{kind}/{name}")
            return work(directory)

        refuse = None
        if self.only not in ("all", kind):
            refuse = f"--stage={self.only} needs {directory}, which --stage={kind} makes"
        return workdir.stage(directory, {"data": self.data.digest, **inputs}, run, say, refuse)


def run(config: Any, directory: Path, data: Dataset, only: str, stopped: Callable[[], bool]) -> str:
    """All stages, or one; returns the text for standard out.

    Raises:
      BudgetSpent: before the target is asked more than the budget allows.
      Stopped, FloatingPointError: see `qmx.train.fit`.
      NotDone: one stage was asked for whose inputs are missing.
    """
    this = Run(config, directory, data, only, stopped, [])
    wanted = {stage: only in ("all", stage) for stage in STAGES}
    todo = cells(config)
    if wanted["target"]:
        target(this)
    if wanted["pretrain"]:
        for init, seed in _unique((cell.init, cell.seed) for cell in todo if cell.init != "none"):
            pretrain(this, init, seed)
    if wanted["select"]:
        for way, seed in _unique((cell.select, cell.seed) for cell in todo):
            selection(this, way, seed)
    if wanted["query"]:
        query(this, todo)
    for cell in todo:
        if wanted["distill"]:
            distill(this, cell)
        if wanted["evaluate"]:
            evaluate(this, cell)
    if not this.made:
        say(f"all of it was done before, in {directory}; nothing was trained or asked")
    if not wanted["report"]:
        return f"stage {only} is done; --stage=report shows where things stand"
    return write_report(this, todo)


def target(this: Run) -> dict:
    """Train the target on the pool's labels."""
    keys = this.config.target
    seen = build.look(this.data)

    def work(directory: Path) -> dict:
        pool = this.data.pool
        labels = pool.all()["label"]
        source = take(pool, np.arange(pool.size), scores=one_hot_logits(labels, this.data.classes))
        steps = build.distill_steps(keys, pool.size)
        trainer = build.distiller(keys, keys.arch, this.config.weak_view, seen, steps)
        rng = root_key(keys.seed, "target")
        ts = train(directory, "target", trainer.step, trainer.init(rng), rng, source, batch_size=keys.batch_size,
                   steps=steps, seed=keys.seed, drop_last=False, stopped=this.stopped)
        digest = save_weights(directory / "target.safetensors", Encoder(ts.params, ts.state))
        return {"name": f"{keys.arch} trained on {this.data.name}", "sha256": digest}

    inputs = {"target": plain(keys), "weak_view": plain(this.config.weak_view)}
    return this.stage("target", ".", inputs, work)


def target_query(this: Run) -> Query:
    """The query function around the target's weights."""
    seen = build.look(this.data)
    network = build.classifier(this.config.target.arch, seen)
    params, stats = read_weights(this, network, "target/target.safetensors")
    return network_query(network, params, stats, build.evaluation_view(seen))


def read_weights(this: Run, network: Network, path: str) -> Encoder:
    """A network's weights from the workdir onto the devices."""
    return put_state(load_weights(this.workdir / path, build.variables(network, build.look(this.data))))


def open_ledger(this: Run) -> Ledger:
    """This target's ledger, with the config's budget."""
    return Ledger(this.workdir / "ledger.sqlite", target=target(this)["sha256"], budget=this.config.budget)


def pretrain(this: Run, init: str, seed: int) -> dict:
    """Pretrain an encoder without labels, and look at its features beside a random network's."""
    keys, monitor = this.config.pretrain[init], this.config.monitor
    view = "weak_view" if init == "rotation" else "strong_view"
    arch, seen = this.config.student.arch, build.look(this.data)

    def work(directory: Path) -> dict:
        pool = this.data.pool
        steps = build.pretrain_steps(keys, pool.size)
        trainer = build.pretrainer(init, keys, arch, this.config[view], seen, steps)
        rng = root_key(seed, init)
        ts = trainer.init(rng)
        random = neighbours(this, trainer.method.encoder(ts.params, ts.state))
        began = time.monotonic()
        ts = train(directory, f"pretrain {init} seed {seed}", trainer.step, ts, rng, pool, batch_size=keys.batch_size,
                   steps=steps, seed=seed, drop_last=True, watch=watch(steps // int(keys.epochs), keys.get("features")),
                   stopped=this.stopped)
        seconds = time.monotonic() - began
        encoder = trainer.method.encoder(ts.params, ts.state)
        return {"sha256": save_weights(directory / "encoder.safetensors", encoder), "seconds": seconds,
                "knn_top1": neighbours(this, encoder), "knn_top1_random": random}

    inputs = {"seed": seed, "pretrain": {init: plain(keys)}, view: plain(this.config[view]),
              "student": plain(this.config.student), "monitor": plain(monitor)}
    return this.stage("pretrain", f"{init}-seed{seed}", inputs, work)


def neighbours(this: Run, encoder: Encoder) -> float:
    """The monitor of an encoder: `qmx.evaluate.held_out_knn` within the pool, in per cent."""
    pool, seen, monitor = this.data.pool.all(), build.look(this.data), this.config.monitor
    features = predict(build.backbone(this.config.student.arch, seen), encoder.params, encoder.stats,
                       build.evaluation_view(seen), pool["image"])
    return held_out_knn(features, pool["label"], monitor.knn_k, monitor.knn_temperature)


def selection(this: Run, way: str, seed: int) -> np.ndarray:
    """The pool's images in the order in which this way of choosing asks about them, i64[largest budget]."""
    budget = subset_size(max(this.config.fractions), this.data.pool.size)
    name = f"{way}-seed{seed}"

    def work(directory: Path) -> dict:
        np.save(directory / "ids.npy", select(way, this.data.pool.size, budget, seed))
        return {"images": budget}

    this.stage("select", name, {"select": way, "seed": seed, "budget": budget}, work)
    return np.load(this.workdir / "select" / name / "ids.npy", allow_pickle=False)


def transfer_ids(this: Run, cell: Cell) -> np.ndarray:
    """The pool's images whose answers a cell learns from."""
    return selection(this, cell.select, cell.seed)[: subset_size(cell.fraction, this.data.pool.size)]


def query(this: Run, todo: list[Cell]) -> None:
    """Ask the target about every image that some cell learns from, and about the evaluation images."""
    ids = np.unique(np.concatenate([transfer_ids(this, cell) for cell in todo]))
    asked = [("train", this.data.pool.read(ids)["image"]), ("report", this.data.evaluation.all()["image"])]
    with open_ledger(this) as ledger:
        if not any(ledger.count_missing(images) for _, images in asked):
            return
        ask = target_query(this)
        for purpose, images in asked:
            with progress(f"query for {purpose}", ledger.count_missing(images), unit="answers") as shown:
                ledger.ask(ask, images, purpose=purpose, on_progress=lambda done, _: shown.update(done))
        this.made.append("query")


def check_budget(config: Any, directory: Path, data: Dataset) -> None:
    """Raise BudgetSpent at once if the grid asks for more distinct images than the budget allows.

    The ledger would stop it too, but only after the pretraining. Nothing is written.
    """
    if config.budget is None:
        return
    orders = {(c.select, c.seed): c for c in cells(config) if c.fraction == max(config.fractions)}.values()
    size = subset_size(max(config.fractions), data.pool.size)
    ids = np.unique(np.concatenate([select(c.select, data.pool.size, size, c.seed) for c in orders]))
    if len(ids) > config.budget:
        spent = 0
        done = directory / "target" / "result.json"
        if done.exists() and (directory / "ledger.sqlite").exists():
            sha256 = json.loads(done.read_text())["sha256"]
            with Ledger(directory / "ledger.sqlite", target=sha256) as ledger:
                spent = ledger.spent()
        raise BudgetSpent(f"the grid asks about {len(ids)} distinct images and the budget is {config.budget} "
                          f"({spent} spent so far, nothing asked now); raise --config.budget, or lower "
                          "--config.fractions or the number of seeds")


def distill(this: Run, cell: Cell) -> dict:
    """Train a fresh student on the answers in the ledger. The target is not here."""
    keys, view, arch = this.config.distill, this.config.weak_view, this.config.student.arch
    seen = build.look(this.data)
    start = pretrain(this, cell.init, cell.seed)["sha256"] if cell.init != "none" else "none"
    ids = transfer_ids(this, cell)

    def work(directory: Path) -> dict:
        images = this.data.pool.read(ids)
        if keys.learn_from == "labels":
            scores = one_hot_logits(images["label"], this.data.classes)
        else:
            with open_ledger(this) as ledger:
                scores = as_logits(ledger.read(images["image"], cell.access), cell.access)
        steps = build.distill_steps(keys, len(ids))
        trainer = build.distiller(keys, arch, view, seen, steps)
        rng = root_key(cell.seed, "student")  # one key whatever it starts from: the same head, the same views
        ts = trainer.init(rng)
        if cell.init != "none":
            path = f"pretrain/{cell.init}-seed{cell.seed}/encoder.safetensors"
            params, state = start_from(ts.params, ts.state, read_weights(this, build.backbone(arch, seen), path))
            ts = ts._replace(params=params, state=state)
        name = f"distill {cell.init} {percent(cell.fraction)} {cell.select} {cell.access} seed {cell.seed}"
        began = time.monotonic()
        source = take(this.data.pool, ids, scores=scores)
        ts = train(directory, name, trainer.step, ts, rng, source, batch_size=keys.batch_size, steps=steps,
                   seed=cell.seed, drop_last=False, stopped=this.stopped)
        digest = save_weights(directory / "student.safetensors", Encoder(ts.params, ts.state))
        return {"sha256": digest, "seconds": time.monotonic() - began, "queries": len(ids)}

    inputs = {"cell": cell._asdict(), "distill": plain(keys), "weak_view": plain(view),
              "student": plain(this.config.student), "encoder": start, "target": target(this)["sha256"],
              "images": zlib.crc32(ids.tobytes())}
    return this.stage("distill", cell.name, inputs, work)


def evaluate(this: Run, cell: Cell) -> dict:
    """A cell's row of the table, from its last step (never the best one)."""
    made = distill(this, cell)
    seen = build.look(this.data)

    def work(_: Path) -> dict:
        test = this.data.evaluation.all()
        network = build.classifier(this.config.student.arch, seen)
        params, stats = read_weights(this, network, f"distill/{cell.name}/student.safetensors")
        scores = predict(network, params, stats, build.evaluation_view(seen), test["image"])
        with open_ledger(this) as ledger:
            answers = ledger.read(test["image"])
        queries = {"train": made["queries"], "select": 0, "report": len(answers)}
        return {**cell._asdict(), "queries": queries, "calls": sum(queries.values()),
                **compare(scores, answers, test["label"]), "seconds": made["seconds"]}

    return this.stage("evaluate", cell.name, {"student": made["sha256"], "target": target(this)["sha256"]}, work)


def write_report(this: Run, todo: list[Cell]) -> str:
    """The report from what the stages left, and nothing else; returns the text for standard out."""
    test, monitor, made = this.data.evaluation.all(), this.config.monitor, target(this)
    with open_ledger(this) as ledger:
        account = ledger.account()._asdict()
        accuracy: dict[str, float | None] = {"top1": None, "top5": None}  # until the evaluation images were asked about
        if not ledger.count_missing(test["image"]):
            answers = ledger.read(test["image"])
            accuracy = {f"top{k}": top_k(answers, test["label"], k) for k in (1, 5)}
    encoders = _unique((cell.init, cell.seed) for cell in todo if cell.init != "none")
    monitors = [(init, seed, _if_done(partial(pretrain, this, init, seed))) for init, seed in encoders]
    rows = [_if_done(partial(evaluate, this, cell)) for cell in todo]
    return report.write(this.workdir, {
        "schema": 1,
        "target": {**made, **accuracy},
        "pool": {"name": this.data.name, "size": this.data.pool.size, "evaluation": this.data.evaluation.size,
                 "classes": this.data.classes, "sha256": this.data.digest,
                 "queries": {str(f): subset_size(f, this.data.pool.size) for f in this.config.fractions}},
        "rows": [row for row in rows if row],
        "account": account,
        "monitors": [{"init": init, "seed": seed, "k": monitor.knn_k, "temperature": monitor.knn_temperature, **result}
                     for init, seed, result in monitors if result],
        "versions": {name: version(name) for name in ("qmx", "jax", "jaxlib", "flax", "optax", "numpy")},
        "config": plain(this.config),
    })


def _if_done(stage: Callable[[], dict]) -> dict | None:
    """A stage's result, None where it was not run: the report shows that and does not run it."""
    try:
        return stage()
    except workdir.NotDone:
        return None


def root_key(seed: int, purpose: str) -> jax.Array:
    """The root key of a run, one for each purpose."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def plain(keys: Any) -> dict:
    """A part of the config as JSON has it."""
    return json.loads(keys.to_json())


def _unique(items: Any) -> list:
    return list(dict.fromkeys(items))
