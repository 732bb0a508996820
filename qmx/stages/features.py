"""Features of an encoder for the pool, by which is chosen what to ask and on which heads learn, and
for the evaluation images."""

import os
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qmx import heads, networks
from qmx.data import Source
from qmx.data.sources import take
from qmx.files import Unreadable, check_file, read_json, write_json
from qmx.grid import columns, propagates
from qmx.ledger.access import as_logits
from qmx.progress import Progress, progress
from qmx.selection.by_features import BY_FEATURES, unit
from qmx.selection.patches import beside, patch_features
from qmx.selection.propagate import graph_of, spread, with_head
from qmx.sharding import first, from_first
from qmx.stages import frozen
from qmx.stages.pretrain import Pretrained, Taught, backbone
from qmx.stages.run import Run, needed, outputs, plain, read_weights
from qmx.workdir import NotDone

LEAST, MOST = 1024, 65536  # images between two writes: as many as take about SECONDS
SECONDS = 10.0  # of work that a kill may cost


class Centred:
    """Features less their mean, made for the rows read: those of 1.3 M images are 4 GB."""

    def __init__(self, rows: np.ndarray, mean: np.ndarray):
        self.given, self.mean, self.shape = rows, mean, rows.shape

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.given[rows] - self.mean


class Features(NamedTuple):
    """Features of a source in a file."""

    encoder: Pretrained
    path: Path
    patches: Path | None = None  # features of patches, where something looks at them too

    def rows(self) -> np.ndarray:
        """f32[n, D] as the encoder makes them, mapped from the file."""
        return _mapped(self.path)

    def centred(self) -> "Centred":
        """f32[n, D] about their mean, for what learns them."""
        rows = self.rows()
        # In one process: another machine's sums may round another way.
        return Centred(rows, from_first(lambda: heads.spread(rows)[0].astype(rows.dtype)))

    def read(self, patches: float = 0.0) -> np.ndarray:
        """Unit rows, f32[n, D]; with features of patches of this weight beside them, if any."""
        return read_rows(self.path, self.patches, patches)

    def propagate(self, ids: np.ndarray, probabilities: np.ndarray, keys: Any) -> np.ndarray:
        """Answers f32[m, N] for some images, spread over all: `qmx.selection.propagate.propagate`
        with the config's keys."""
        made_of = self.path, self.encoder.sha256, self.patches
        graph = _graph(*made_of, keys.patches, keys.neighbours, keys.power)
        scores = spread(graph, ids, probabilities, keys.alpha, keys.temperature)
        if not keys.head_power:
            return scores
        rows = self.read(keys.patches)

        def told() -> np.ndarray:
            mean, scale = heads.spread(rows)
            answers = as_logits(probabilities, "probs")
            head = heads.fit(rows[ids], answers, mean=mean, scale=scale)
            return heads.scores(head.params, rows)

        # In one process: another machine's sums may round another way.
        return with_head(scores, ids, from_first(told), keys.head_power / keys.temperature)


@lru_cache(maxsize=4)  # one graph serves all budgets; for 60,000 images it takes 0.2 GB
def _graph(
    path: Path, sha256: str, patches: Path | None, weight: float, neighbours: int, power: float
) -> Any:
    del sha256  # other features of the same name have another graph
    return graph_of(read_rows(path, patches, weight), neighbours, power)


def mirrored(run: Run) -> dict[str, bool]:
    """{"mirrored": True} if patches of mirror images are looked at too."""
    return {"mirrored": True} if run.config.selection.mirrored else {}


def choice_inputs(run: Run) -> dict:
    """Inputs of a stage that chooses images by features."""
    weight = run.config.selection.patches
    return {"patches": weight, **mirrored(run)} if weight else {}


def propagation_inputs(run: Run) -> dict:
    """Inputs of a stage that spreads answers by features."""
    keys = run.config.propagation
    return {"propagation": {**plain(keys), **(mirrored(run) if keys.patches else {})}}


def _patches(run: Run) -> Path:
    """The file of the features of the pool's patches, see `qmx.selection.patches`."""

    def work(directory: Path) -> dict:
        pool = run.data.pool

        def make() -> dict:
            np.save(
                directory / "patches.npy", patch_features(pool.shown, pool.size, **mirrored(run))
            )
            return {"images": pool.size}

        return from_first(make)

    run.stage("select", "patches", {"pool": run.data.images_digest, **mirrored(run)}, work)
    return run.workdir / "select" / "patches" / "patches.npy"


def _mapped(path: Path) -> np.ndarray:
    check_file(path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def read_rows(path: Path, patches: Path | None, weight: float) -> np.ndarray:
    """`Features.read` of a file of features."""
    rows = np.asarray(_mapped(path))
    if patches and weight:
        return beside(rows, _mapped(patches), weight)
    return unit(rows).astype(np.float32)


def shown_at(run: Run, encoder: Pretrained) -> dict[str, int]:
    """{"size": side} of the images that an encoder sees, where it is not their own; one that stays
    as it is has its side in its digest."""
    size = run.config.student.size
    return {"size": size} if size and not encoder.kind else {}


def features(run: Run, encoder: Pretrained | NotDone) -> Features:
    """An encoder's features of every image of the pool."""
    made = _of(run, needed(encoder), "select", run.data.pool, {"pool": run.data.images_digest})
    config = run.config
    seen = any(
        (config.propagation.patches and propagates(column))
        or (config.selection.patches and column.select in BY_FEATURES)
        for column in columns(config)
    )
    return made._replace(patches=_patches(run)) if seen else made


def taught(run: Run, encoder: Pretrained | NotDone) -> Taught:
    """`features` for an encoder that learns them, which the stage pretrain alone makes too."""
    made = features(run._replace(only="select") if run.only == "pretrain" else run, encoder)
    return Taught(made.encoder.sha256, made.centred)


def evaluation_features(run: Run, encoder: Pretrained | NotDone) -> Features:
    """An encoder's features of every evaluation image."""
    encoder, inputs = needed(encoder), {"evaluation": run.data.evaluation_digest}
    return _of(run, encoder, "evaluate", run.data.evaluation, inputs)


def trigger_features(run: Run, encoder: Pretrained, source: Source, digest: str) -> Features:
    """An encoder's features of a watermark's trigger images."""
    return _of(run, encoder, "evaluate", source, {"triggers": digest}, "trigger-features")


def _of(
    run: Run,
    encoder: Pretrained,
    kind: str,
    source: Source,
    inputs: dict,
    prefix: str = "features",
) -> Features:
    inputs = {**inputs, "encoder": encoder.sha256, "rows": "as they are"}
    if not encoder.kind:
        inputs["dtype"] = networks.evaluated_in(run.config.student.dtype)
        inputs["size"] = run.config.student.size

    def work(directory: Path) -> dict:
        return compute(run, encoder, source, directory)

    name = f"{prefix}-{encoder.name}"
    run.stage(kind, name, inputs, work)
    return Features(encoder, run.workdir / kind / name / "features.npy")


def ahead(shown: Progress, done: int, count: int) -> None:
    """Show `count` images more than were done before."""
    shown.update(done + count)


def reserve(path: Path) -> None:
    """Take the room that a new mapped file will need: a disk that is full later would kill the
    process without a word (SIGBUS).

    Raises:
      OSError: there is no room; the file is removed.
    """
    if not hasattr(os, "posix_fallocate"):  # Linux and FreeBSD have it
        return
    try:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError:
        path.unlink()
        raise


def compute(run: Run, encoder: Pretrained, source: Source, directory: Path) -> dict:
    """Write the features of a source; what a killed run wrote is not computed again."""
    name, size = f"features of {encoder.name}", source.size
    if encoder.kind:
        rows_of = frozen.rows_of(run, encoder, source, name)
    else:
        network = backbone(run)
        variables = read_weights(run, network, encoder.path)

        def rows_of(ids, shown):  # type: ignore[no-untyped-def]
            return outputs(run, name, network, variables, take(source, ids), None, shown)

    part, log = directory / "features.npy.part", directory / "done.json"

    def begun() -> dict:
        try:
            return read_json(log) if part.exists() else {"done": 0}
        except Unreadable:
            return {"done": 0}

    done, chunk = from_first(begun)["done"], LEAST
    with progress(name, size) as shown:
        while done < size:
            ids, began = np.arange(done, min(done + chunk, size)), time.monotonic()
            rows = rows_of(ids, partial(ahead, shown, done))
            if first():
                mode = "r+" if done else "w+"
                file = np.lib.format.open_memmap(part, mode, rows.dtype, (size, rows.shape[1]))
                if not done:
                    reserve(part)
                if file.shape[1] != rows.shape[1]:
                    raise ValueError(
                        f"{name} have {rows.shape[1]} numbers, and had {file.shape[1]} before"
                    )
                file[ids] = rows
                file.flush()
                write_json(log, {"done": int(ids[-1]) + 1})
            done = int(ids[-1]) + 1
            quick = from_first(partial(bool, time.monotonic() - began < SECONDS / 2))
            chunk = min(2 * chunk, MOST) if quick else chunk

    def finish() -> dict:
        dimension = np.load(part, mmap_mode="r").shape[1]
        log.unlink()
        part.replace(directory / "features.npy")
        return {"images": size, "dimension": dimension}

    return from_first(finish)
