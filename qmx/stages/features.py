"""Features of an encoder for the whole pool; the images to ask about are chosen by them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from qmx import networks
from qmx.files import read_arrays, write_arrays
from qmx.selection.by_features import unit
from qmx.sharding import first
from qmx.stages.pretrain import Pretrained, backbone
from qmx.stages.run import Run, needed, outputs, read_weights
from qmx.workdir import NotDone


class Features(NamedTuple):
    """Features of the pool in a file."""

    encoder: Pretrained
    path: Path

    def read(self) -> np.ndarray:
        """f32[n, D], unit rows."""
        return read_arrays(self.path)["features"]


def features(run: Run, encoder: Pretrained | NotDone) -> Features:
    """An encoder's features of every image of the pool."""
    encoder = needed(encoder)
    inputs = {
        "pool": run.data.pool_digest,
        "encoder": encoder.sha256,
        "dtype": networks.evaluated_in(run.config.student.dtype),
        "size": run.config.student.size,
    }

    def work(directory: Path) -> dict:
        network, name = backbone(run), f"features of {encoder.name}"
        variables = read_weights(run, network, encoder.path)
        rows = unit(outputs(run, name, network, variables, run.data.pool))
        if first():
            write_arrays(directory / "features.npz", features=rows.astype(np.float32))
        return {"images": len(rows), "dimension": rows.shape[1]}

    name = f"features-{encoder.name}"
    run.stage("select", name, inputs, work)
    return Features(encoder, run.workdir / "select" / name / "features.npz")
