"""An encoder's features of the whole pool, by which is chosen."""

from pathlib import Path

import numpy as np

from qmx import trainers
from qmx.selection.by_features import unit
from qmx.sharding import first
from qmx.stages.pretrain import backbone, pretrain, read_encoder
from qmx.stages.run import Run, outputs
from qmx.workdir import write_arrays


def features(run: Run, init: str, seed: int) -> np.ndarray:
    """An encoder's features of the whole pool, with unit rows, f32[n, D]; by them it is chosen what
    to ask."""
    name = f"{init}-seed{seed}"
    inputs = {
        "encoder": pretrain(run, init, seed)["sha256"],
        "dtype": trainers.evaluated_in(run.config.student.dtype),
    }

    def work(directory: Path) -> dict:
        encoder = read_encoder(run, init, seed)
        rows = unit(outputs(run, f"features of {name}", backbone(run), encoder, run.data.pool))
        if first():
            write_arrays(directory / "features.npz", features=rows.astype(np.float32))
        return {"images": len(rows), "dimension": rows.shape[1]}

    run.stage("select", f"features-{name}", inputs, work)
    with np.load(
        run.workdir / "select" / f"features-{name}" / "features.npz", allow_pickle=False
    ) as file:
        return file["features"]
