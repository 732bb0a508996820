"""Targets that others compute, or did: a served model, a Python function, recorded answers. The
first process alone asks them."""

import json
import time
from typing import Any

import numpy as np

from qmx.checkpoint import file_digest
from qmx.data import Dataset
from qmx.ledger import Unavailable, Unwritten
from qmx.progress import say
from qmx.sharding import from_first
from qmx.stages import recorded
from qmx.stages.run import Run
from qmx.targets import function, onnx_file
from qmx.targets.query import Outside, Query
from qmx.targets.shown import Shown
from qmx.train import Stopped

KINDS = ("served", "callable", "onnx", "recorded")
# Seconds before each further attempt at a batch; then the last again.
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
# Keys of a target that others compute which change how it is asked, and not what it answers.
FREE = ("batch_size", "rate", "timeout", "retries", "max_refused")
SAME, NEW = "same-target", "new-target"  # words of --update on a target that changed


def connect(keys: Any, data: Dataset) -> Outside:
    """The target that the config's `target` names. The server is asked about it, and it is asked
    nothing.

    Raises:
      ValueError, Unavailable: it cannot be the target of `data`, or is not there.
    """
    fits: dict[str, Any] = {
        "shape": data.shape,
        "classes": data.classes,
        "access": keys.access,
        "shown": Shown(**{key: keys.shown[key] for key in Shown._fields}),
    }
    tensors = {"input": keys.input, "output": keys.output}
    if keys.kind == "callable":
        return function.connect(keys.path, **fits, watch=keys.watch, rate=keys.rate)
    if keys.kind == "recorded":
        return recorded.connect(keys, data)
    if keys.kind == "onnx":
        return onnx_file.connect(keys.path, **fits, **tensors)
    from qmx.targets import served  # brings urllib3, which is not on every machine

    return served.connect(
        keys.url,
        keys.model,
        **fits,
        **tensors,
        version=keys.version,
        token_env=keys.token_env,
        headers_env=tuple(keys.headers_env),
        ca_file=keys.ca_file,
        timeout=keys.timeout,
        rate=keys.rate,
    )


def describe(keys: Any, data: Dataset) -> dict:
    """The name and digest of the target, in every process."""

    def look() -> dict:
        there = _patiently(keys, data)
        return {"name": there.name, "sha256": there.sha256, "preprocessing": there.preprocessing}

    return from_first(look)


def _patiently(keys: Any, data: Dataset) -> Outside:
    """`connect`, again and again while a server is starting."""
    for seconds in waits(keys.retries):
        try:
            return connect(keys, data)
        except Unavailable as error:
            # Nobody is there, or there is no such model: the user is to hear of it at once.
            if type(error) is not Unavailable:
                raise
            say(f"{error} (asked again in {seconds:g} s)")
            time.sleep(seconds)
    return connect(keys, data)


def inputs_of(keys: Any) -> dict:
    """Inputs of a stage that name and digest depend on; from the config, so without a server."""
    shown = {"shown": json.loads(keys.shown.to_json())}
    if keys.kind == "callable":
        return {"path": keys.path, "file": function.digest(keys.path, keys.watch), **shown}
    if keys.kind == "recorded":
        return {"file": file_digest(keys.path)}
    if keys.kind == "onnx":
        tensors = {key: keys[key] for key in ("input", "output")}
        return {"file": onnx_file.digest(keys.path), **tensors, **shown}
    return {**{key: keys[key] for key in ("url", "model", "version", "input", "output")}, **shown}


def query_of(keys: Any, data: Dataset, sha256: str) -> Query:
    """The query function of the target with this digest; to be made in all processes, and called in
    the first.

    Raises:
      ValueError: another one is there now.
    """
    made: list[Query] = []

    def look() -> None:
        found = _patiently(keys, data)
        if found.sha256 != sha256:
            raise ValueError(
                f"{found.name} is not what it was when this workdir was begun: its version, or what"
                f" the server says of its inputs and outputs; --update={SAME} goes on with the"
                f" answers that are there, --update={NEW} asks it everything"
            )
        made.append(found.query)

    from_first(look)
    return made[0] if made else _not_here


def _not_here(images: np.ndarray) -> np.ndarray:
    raise AssertionError(
        f"only the first process asks, and another one has {len(images)} images to ask about"
    )


def waits(retries: int) -> list[float]:
    """Seconds before each further attempt at a batch."""
    return [*WAITS, *[WAITS[-1]] * retries][:retries]


def pause(run: Run, seconds: float, why: OSError) -> None:
    """Wait for the target, and say why; or, silently, until answers can be written.

    Raises:
      Stopped: this process is told to stop meanwhile.
    """
    if not isinstance(why, Unwritten):
        say(f"{why} (asked again in {seconds:g} s)")
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if run.stopped():
            raise Stopped(
                f"stopped; {why}; they are lost"
                if isinstance(why, Unwritten)
                else f"stopped while waiting for the target ({why})"
            )
        time.sleep(min(left, 0.2))
