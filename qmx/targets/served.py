"""A target behind the Open Inference Protocol v2 (KServe, Triton, TorchServe, MLServer), over HTTP.

The protocol is https://github.com/kserve/open-inference-protocol,
specification/protocol/inference_rest.md. Tensors go as Triton's binary data extension has them
(triton-inference-server/server, docs/protocol/extension_binary_data.md) where the server says that
it knows it, else as JSON.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from qmx.ledger import Unavailable
from qmx.ledger.access import received
from qmx.targets.http import Send, client
from qmx.targets.query import Outside

# What images are sent as: the pixels 0..255, whatever the type.
INPUTS = {"UINT8": "u1", "FP32": "<f4"}
OUTPUTS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
LABELS = {"INT32": "<i4", "INT64": "<i8"}  # class numbers, where the access is "label"
HEADER = "Inference-Header-Content-Length"


class Tensor(NamedTuple):
    """An input or output, as the model's metadata have it."""

    name: str
    datatype: str
    shape: list[int]  # -1 is any size


def connect(
    url: str,
    model: str,
    *,
    shape: tuple[int, int, int],
    classes: int,
    version: str = "",
    input: str = "",
    output: str = "",
    access: str = "logits",
    token_env: str = "",
    ca_file: str = "",
    timeout: float = 60.0,
    rate: float = 0.0,
) -> Outside:
    """A query function around a served model: one request for each call, and no second attempt.

    The server is asked about the model, and nothing of the model: what it would be refused for
      costs no query.

    The digest stands for the address, the model's name and version, and what the server says of its
    platform, inputs and outputs. It is part of the ledger's keys: at another address or version
    everything is asked again, and a server that changes its weights and says nothing of it is taken
    for the same target.

    Args:
      url: of the server, as in https://models.example.org:8443; see `qmx.targets.http.client` for
        this and for `token_env`, `ca_file`, `timeout` and `rate`.
      shape: of the images, H, W, C. They go to the model as they are, [b, H, W, C] in UINT8, or the
        same numbers in FP32 if it says that it takes these.
      classes: N.
      version: of the model; by default the one that the server lists.
      input, output: names of the tensors; by default the only ones that the server lists.
      access: level of the output, "logits", "probs" or "label"; see `qmx.ledger.access.received`.

    Raises:
      Unavailable: there is no server, or the model is not ready. By the query: see
        `qmx.targets.http.client`.
      ValueError: no such model, version or tensor, images or classes that do not fit, a refused
        address or token. By the query: an answer that is not what was asked for; nothing of it is
        returned.
    """
    send = client(url, token_env=token_env, ca_file=ca_file, timeout=timeout, rate=rate)
    base = f"/v2/models/{quote(model, safe='')}"
    said = _object(
        *send("GET", base + (f"/versions/{quote(version, safe='')}" if version else ""), None, {})
    )
    version = version or _only_version(said, model)
    if version:
        base += f"/versions/{quote(version, safe='')}"
    _check_ready(send, f"{base}/ready")
    given = _tensor(said, "input", input, Tensor(input, "UINT8", []))
    wanted = _tensor(said, "output", output, Tensor(output, "", []))
    _check_tensors(given, wanted, shape, classes, access)
    binary = "binary_tensor_data" in _extensions(send)
    known = OUTPUTS | (LABELS if access == "label" else {})

    def query(images: np.ndarray) -> np.ndarray:
        number = uuid.uuid4().hex
        body, headers = _request(number, given, wanted, images, binary)
        answer, told = send("POST", f"{base}/infer", body, headers)
        scores = _read(answer, told, number, version, wanted.name, known)
        return received(scores, len(images), classes, access)

    about = {key: said.get(key) for key in ("platform", "inputs", "outputs")}
    identity = {"url": url.rstrip("/"), "model": model, "version": version, **about}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Outside(
        query, f"{model}{f' version {version}' if version else ''} at {url.rstrip('/')}", digest
    )


def _check_ready(send: Send, path: str) -> None:
    """Raise Unavailable unless the model is ready: by the status, and by the body where it has
    one."""
    try:
        body, headers = send("GET", path, None, {})
        ready = not body or _object(body, headers).get("ready", True)
    except ValueError as error:
        raise Unavailable(f"the model is not ready: {error}") from None
    if not ready:
        raise Unavailable("the model is not ready; wait until it is loaded")


def _only_version(said: dict, model: str) -> str:
    """The version that a model has, so that a new one is noticed and not mixed with it; "" where
    there are none."""
    versions = [str(version) for version in said.get("versions") or []]
    if len(versions) > 1:
        raise ValueError(
            f"the model {model} has the versions {', '.join(versions)}; name one in target.version"
        )
    return versions[0] if versions else ""


def _tensor(said: dict, kind: str, name: str, unsaid: Tensor) -> Tensor:
    """The input or output that is called `name`, or the only one; `unsaid` where the server lists
    none."""
    try:
        listed = [
            Tensor(
                str(each["name"]),
                str(each["datatype"]),
                [int(size) for size in each.get("shape") or []],
            )
            for each in said.get(f"{kind}s") or []
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"what the server says of the model's {kind}s is not the protocol's: {error!r}"
        ) from None
    if not listed and not name:
        raise ValueError(
            f"the server does not say what the model's {kind} is called; name it in target.{kind}"
        )
    names = ", ".join(each.name for each in listed)
    found = [each for each in listed if each.name == name] if name else listed
    if len(found) > 1 or (listed and not found):
        has = f"there is no {kind} {name!r}" if name else f"there are several {kind}s"
        raise ValueError(f"{has} of the model; name one of {names} in target.{kind}")
    return found[0] if found else unsaid


def _check_tensors(
    given: Tensor, wanted: Tensor, shape: tuple[int, int, int], classes: int, access: str
) -> None:
    """Raise ValueError unless images can be sent as they are, and the answer can be a score for
    each class."""
    if given.datatype not in INPUTS:
        raise ValueError(
            f"the model's input {given.name} is {given.datatype}, and images are sent as "
            f"{' or '.join(INPUTS)}"
        )
    if given.shape and not _fits(given.shape, (-1, *shape)):
        raise ValueError(
            f"the model's input {given.name} has the shape {given.shape} and images are sent as "
            f"{[-1, *shape]}: any number of height, width, channels; serve the model with its "
            "preprocessing in front of it, or set the data's size to its own"
        )
    if wanted.datatype in LABELS and access == "label":
        return
    if wanted.datatype and wanted.datatype not in OUTPUTS:
        raise ValueError(
            f"the model's output {wanted.name} is {wanted.datatype}, and scores are "
            f"{', '.join(OUTPUTS)}"
            + (
                f" (class numbers, {' or '.join(LABELS)}, are target.access=label)"
                if wanted.datatype in LABELS
                else ""
            )
        )
    if wanted.shape and not _fits(wanted.shape, (-1, classes)):
        raise ValueError(
            f"the model's output {wanted.name} has the shape {wanted.shape} and should have"
            f" {[-1, classes]}: the images have {classes} classes, which must be the model's, in"
            " its order"
        )


def _fits(said: list[int], ours: tuple[int, ...]) -> bool:
    return len(said) == len(ours) and all(
        -1 in pair or pair[0] == pair[1] for pair in zip(said[1:], ours[1:], strict=True)
    )


def _extensions(send: Send) -> list[str]:
    try:
        return _object(*send("GET", "/v2", None, {})).get("extensions") or []
    except ValueError:  # a gateway may let only the model's own addresses pass
        return []


def _request(
    number: str, given: Tensor, wanted: Tensor, images: np.ndarray, binary: bool
) -> tuple[bytes, dict]:
    """The body and the headers of a request for the scores of images."""
    pixels = images.astype(INPUTS[given.datatype])
    tensor: dict[str, Any] = {
        "name": given.name,
        "datatype": given.datatype,
        "shape": list(images.shape),
    }
    output: dict[str, Any] = {"name": wanted.name}
    request = {"id": number, "inputs": [tensor], "outputs": [output]}
    if not binary:
        tensor["data"] = pixels.ravel().tolist()
        return json.dumps(request).encode(), {"Content-Type": "application/json"}
    tensor["parameters"], output["parameters"] = (
        {"binary_data_size": pixels.nbytes},
        {"binary_data": True},
    )
    header = json.dumps(request).encode()
    return header + pixels.tobytes(), {
        "Content-Type": "application/octet-stream",
        HEADER: str(len(header)),
    }


def _read(
    body: bytes,
    headers: Mapping[str, str],
    number: str,
    version: str,
    name: str,
    known: dict[str, str],
) -> np.ndarray:
    """The output called `name` of an answer, of whatever shape."""
    length = int(headers[HEADER]) if headers.get(HEADER, "").isdigit() else len(body)
    answer, rest = _object(body[:length], headers), body[length:]
    if answer.get("id") not in (None, "", number):
        raise ValueError(
            "the answer belongs to another request, as its id says; nothing of it is kept"
        )
    if version and str(answer.get("model_version") or version) != version:
        raise ValueError(
            f"version {answer['model_version']} of the model answered, and {version} was asked; is"
            " it being replaced? Answers of two models are not mixed"
        )
    try:
        names = [str(output["name"]) for output in answer["outputs"]]
        if name not in names:
            raise ValueError(
                f"the answer has no output {name!r}, but {', '.join(names)}; name one in"
                " target.output"
            )
        sizes = [
            int((output.get("parameters") or {}).get("binary_data_size", 0))
            for output in answer["outputs"]
        ]
        place = names.index(name)
        output, start = answer["outputs"][place], sum(sizes[:place])
        datatype, shape = output["datatype"], output["shape"]
        if datatype not in known:
            raise ValueError(f"the output {name} is {datatype}, and should be {' or '.join(known)}")
        if sizes[place]:
            values = np.frombuffer(rest[start : start + sizes[place]], known[datatype])
        else:
            # Null, as some write NaN, becomes NaN.
            values = np.array(output["data"], known[datatype])
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"the answer is not the protocol's: {error!r}") from None
    if not isinstance(shape, list) or values.size != np.prod(shape):
        raise ValueError(
            f"the output {name} has {values.size} numbers and says that its shape is {shape};"
            " nothing of this batch is kept"
        )
    return values.reshape(shape)


def _object(body: bytes, headers: Mapping[str, str]) -> dict:
    """A JSON object; what ends before its end, where nobody said how long it is, may be whole the
    next time."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        if "Content-Length" not in headers and headers.get("Transfer-Encoding", "") != "chunked":
            raise Unavailable(f"the answer breaks off: {error}") from None
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"the answer is no JSON object but begins with {body[:60]!r}; does a server of the Open"
            " Inference Protocol v2 stand at target.url?"
        )
    return found
