"""The call of the program that all stages belong to, and the artefacts that they hand on."""

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from qmx import networks, workdir
from qmx.checkpoint import load_weights
from qmx.contract import Encoder, Network
from qmx.data import Dataset, Source
from qmx.data.batches import ahead
from qmx.inference import ids_here, predict_batches
from qmx.progress import progress, say
from qmx.sharding import any_process, put_state
from qmx.train import Stopped
from qmx.workdir import NotDone

T = TypeVar("T")


class Run(NamedTuple):
    """One call of the program."""

    config: Any  # a frozen config, checked
    workdir: Path
    data: Dataset
    only: str  # a stage, or "all"
    stopped: Callable[[], bool]
    made: list[str]  # what this call did and did not find done

    def stage(self, kind: str, name: str, inputs: dict, work: Callable[[Path], dict]) -> dict:
        """Result of a stage, done now if it is this call's to do; see `qmx.workdir.stage`."""
        directory = self.workdir / kind / name

        def run() -> dict:
            self.made.append(f"{kind}/{name}")
            try:
                return work(directory)
            except OSError as error:
                # Who wrote knows only that it failed.
                if error.filename is None and type(error) is OSError:
                    raise OSError(f"{error} ({directory})") from error
                raise

        refuse = None
        if self.only not in ("all", kind):
            refuse = f"--stage={self.only} needs {directory}, which --stage={kind} makes"
        return workdir.stage(directory, inputs, run, say, refuse)

    def go_on(self, name: str, done: int, total: int) -> None:
        """Raise Stopped if a process was told to stop; all must ask at the same place."""
        if any_process(self.stopped()):
            raise Stopped(f"{name} stopped after {min(done, total)} of {total} images")


def handed_on(run: Run, stage: Callable[..., T], *artefacts: Any) -> T | NotDone:
    """Artefact of a stage; where it is missing and not this call's to make, the reason."""
    try:
        return stage(run, *artefacts)
    except NotDone as reason:
        if run.only == stage.__name__:
            raise
        return reason


def needed(artefact: T | NotDone | None) -> T:
    """An artefact that a stage cannot do without; raises the reason that stands in its place."""
    if isinstance(artefact, NotDone):
        raise artefact
    assert artefact is not None, "the plan hands on what a cell needs"
    return artefact


def read_weights(run: Run, network: Network, path: Path) -> Encoder:
    """Weights of a network from a file of the workdir onto the devices."""
    return put_state(load_weights(path, networks.variables(network, networks.look(run.data))))


def outputs(
    run: Run, name: str, network: Network, variables: Encoder, source: Source
) -> np.ndarray:
    """Outputs of a network for every image of a source, f32[n, D], with progress called `name`."""
    view = networks.evaluation_view(networks.look(run.data))
    ids = ids_here(source.size)
    with progress(name, source.size) as shown:

        def batches() -> Iterator[np.ndarray]:
            for done, images in ahead(source.shown, ids.ravel(), ids.shape[1]):
                yield images
                done *= jax.process_count()
                shown.update(min(done, source.size))
                run.go_on(name, done, source.size)

        return predict_batches(network, variables.params, variables.stats, view, batches())[
            : source.size
        ]


def root_key(seed: int, purpose: str) -> jax.Array:
    """The root key of a run, one for each purpose."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def plain(keys: Any) -> dict:
    """A part of the config as JSON has it."""
    return json.loads(keys.to_json())
