"""The call of the program that all stages belong to, and the artefacts that they hand on."""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from qmx import networks, workdir
from qmx.checkpoint import load_weights
from qmx.contract import Encoder, Network, View
from qmx.data import Dataset, Source
from qmx.data.batches import ahead
from qmx.encoders import facts_of
from qmx.files import check_file
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
    update: str = ""  # what the user said of a workdir of something else, see `qmx.main`
    command: str = ""  # the command line, for the report

    def stage(
        self,
        kind: str,
        name: str,
        inputs: dict,
        work: Callable[[Path], dict],
        lacking: Callable[[], str | None] = lambda: None,
    ) -> dict:
        """Result of a stage, done now if it is this call's to do; see `qmx.workdir.stage`."""
        directory = self.workdir / kind / name

        def run() -> dict:
            self.made.append(f"{kind}/{name}")
            try:
                return work(directory)
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise out_of_memory(kind, name, error) from None
                raise
            except OSError as error:
                # Who wrote knows only that it failed.
                if error.filename is None and type(error) is OSError:
                    raise OSError(f"{error} ({directory})") from error
                raise

        refuse = None
        if self.only not in ("all", kind):
            refuse = f"--stage={self.only} needs {directory}, which --stage={kind} makes"
        return workdir.stage(
            directory,
            inputs,
            run,
            say,
            refuse=refuse,
            update=bool(self.update),
            lacking=lacking,
        )

    def go_on(self, name: str, done: int, total: int) -> None:
        """Raise Stopped if a process was told to stop; all must ask at the same place."""
        if any_process(self.stopped()):
            raise Stopped(f"{name} stopped after {min(done, total)} of {total} images")


# Keys that make each stage's arrays smaller.
SMALLER = {
    "target": "target.batch_size, or data.crop",
    "pretrain": "the method's batch_size, as pretrain.moco.batch_size, or strong_view.size",
    "monitor": "data.crop, or student.arch to a smaller network",
    "select": "data.crop, or student.arch to a smaller network",
    "query": "target.batch_size of a target elsewhere, data.crop, or target.precision to bfloat16",
    "distill": "the recipe's batch_size, as distill.batch_size, or fixmatch.mu",
    "evaluate": "data.crop, or student.arch to a smaller network",
}


def out_of_memory(kind: str, name: str, error: BaseException) -> MemoryError:
    """The error in one line: which stage, on what device, how much it wanted, what to lower."""
    text = " ".join(str(error).split())
    amount = re.search(r"([\d.]+ ?[KMGTPE]i?B)", text) or re.search(r"allocat\w+ (\d+)\b", text)
    wanted = f" for {amount[1]}{' bytes' if amount[1].isdigit() else ''}" if amount else ""
    device = jax.devices()[0]
    where = "the machine" if isinstance(error, MemoryError) else f"{device.platform} {device.id}"
    return MemoryError(
        f"{where} has no memory left{wanted} in {kind}/{name}; lower {SMALLER[kind]} (the same"
        " command with --update goes on from what is done)"
    )


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


def facts(run: Run, method: str, **more: Any) -> dict[str, Any]:
    """Metadata of a file of weights of a run; `more` stands in the place of what it usually is."""
    data, student = run.data, run.config.student
    photos = run.config.data.source in ("folder", "tfds")
    usual = {
        "arch": student.arch,
        "dtype": student.dtype,
        "shape": data.shape,
        "mean": data.mean,
        "std": data.std,
        "resize": run.config.data.resize if photos else 0,
        "size": student.size,
        "class_names": data.class_names,
    }
    return facts_of(method=method, **{**usual, **more})


def read_weights(run: Run, network: Network, path: Path, size: int | None = None) -> Encoder:
    """Weights of a network from a file of the workdir onto the devices.

    Args:
      size: side of the images that it sees, as `student.size`, which None is.

    Raises:
      Unreadable: the file is not as it was written.
    """
    check_file(path)
    side = run.config.student.size if size is None else size
    return put_state(load_weights(path, networks.variables(network, networks.look(run.data), side)))


def outputs(
    run: Run,
    name: str,
    network: Network,
    variables: Encoder,
    source: Source,
    view: View | None = None,
    shown: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Outputs of a network for every image of a source, f32[n, D].

    Args:
      name: of the progress.
      view: of the images; None is the one of evaluations.
      shown: takes the number of images done, in the place of a progress of its own.
    """
    if shown is None:
        with progress(name, source.size) as own:
            return outputs(run, name, network, variables, source, view, own.update)
    view = view or networks.evaluation_view(networks.look(run.data), run.config.student.size)
    ids = ids_here(source.size)

    def batches() -> Iterator[np.ndarray]:
        for done, images in ahead(source.shown, ids.ravel(), ids.shape[1]):
            yield images
            done *= jax.process_count()
            shown(min(done, source.size))
            run.go_on(name, done, source.size)

    return predict_batches(network, variables.params, variables.stats, view, batches())[
        : source.size
    ]


def root_key(seed: int, purpose: str) -> jax.Array:
    """The root key of a run, one for each purpose."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


# Keys of a training that are newer than students and targets that people have: at these values,
# which change nothing, they are not part of what these depend on.
NEWER = {"layer_decay": 1.0, "drop_path": 0.0, "whole_statistics": False}


def trained_by(keys: Any) -> dict:
    """The keys of a training that a student or a target depends on."""
    return {key: value for key, value in plain(keys).items() if NEWER.get(key) != value}


def plain(keys: Any) -> dict:
    """A part of the config as JSON has it."""
    return json.loads(keys.to_json())
