"""A target behind the Open Inference Protocol v2 (KServe, Triton, TorchServe, MLServer), over HTTP.

The protocol is https://github.com/kserve/open-inference-protocol,
specification/protocol/inference_rest.md. Tensors go as JSON, or in Triton's binary data extension
(triton-inference-server/server, docs/protocol/extension_binary_data.md) if the server lists it.
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

# Types that images can be sent as; the pixels are 0..255 in each.
INPUTS = {"UINT8": "u1", "FP32": "<f4"}
OUTPUTS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
LABELS = {"INT32": "<i4", "INT64": "<i8"}  # class numbers, where the access is "label"
HEADER = "Inference-Header-Content-Length"


class Tensor(NamedTuple):
    """An input or output in the model's metadata."""

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

    It checks the model's metadata first, so a wrong setting costs no query.

    The digest is of the address, the model's name and version, and its platform, inputs and outputs
    in the metadata. It is part of the ledger's keys: at another address or version everything is
    asked again. New weights under the same version go unnoticed.

    Args:
      url: of the server, as in https://models.example.org:8443; see `qmx.targets.http.client` for
        this and for `token_env`, `ca_file`, `timeout` and `rate`.
      shape: of the images, H, W, C. The model gets them as they are, [b, H, W, C] in UINT8, or the
        same numbers in FP32 if its metadata ask for FP32.
      classes: N.
      version: of the model; by default the one that the server lists.
      input, output: names of the tensors; by default the only ones that the server lists.
      access: level of the output, "logits", "probs" or "label"; see `qmx.ledger.access.received`.

    Raises:
      Unavailable: there is no server, or the model is not ready. By the query: see
        `qmx.targets.http.client`.
      ValueError: no such model, version or tensor, images or classes that do not fit, a refused
        address or token. By the query: an answer that does not fit the request.
    """
    send = client(url, token_env=token_env, ca_file=ca_file, timeout=timeout, rate=rate)
    base = f"/v2/models/{quote(model, safe='')}"
    metadata = _object(
        *send("GET", base + (f"/versions/{quote(version, safe='')}" if version else ""), None, {})
    )
    version = version or _only_version(metadata, model)
    if version:
        base += f"/versions/{quote(version, safe='')}"
    _check_ready(send, f"{base}/ready")
    model_input = _tensor(metadata, "input", input, Tensor(input, "UINT8", []))
    model_output = _tensor(metadata, "output", output, Tensor(output, "", []))
    _check_tensors(model_input, model_output, shape, classes, access)
    binary = "binary_tensor_data" in _extensions(send)
    known = OUTPUTS | (LABELS if access == "label" else {})

    def query(images: np.ndarray) -> np.ndarray:
        number = uuid.uuid4().hex
        body, headers = _request(number, model_input, model_output, images, binary)
        answer, reply_headers = send("POST", f"{base}/infer", body, headers)
        scores = _read(answer, reply_headers, number, version, model_output.name, known)
        return received(scores, len(images), classes, access)

    about = {key: metadata.get(key) for key in ("platform", "inputs", "outputs")}
    identity = {"url": url.rstrip("/"), "model": model, "version": version, **about}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Outside(
        query, f"{model}{f' version {version}' if version else ''} at {url.rstrip('/')}", digest
    )


def _check_ready(send: Send, path: str) -> None:
    """Raise Unavailable unless the model is ready, by the status and by a body if there is one."""
    try:
        body, headers = send("GET", path, None, {})
        ready = not body or _object(body, headers).get("ready", True)
    except ValueError as error:
        raise Unavailable(f"the model is not ready: {error}") from None
    if not ready:
        raise Unavailable("the model is not ready; wait until it is loaded")


def _only_version(metadata: dict, model: str) -> str:
    """The model's one version, "" if it has none. Naming it keeps a later version out."""
    versions = [str(version) for version in metadata.get("versions") or []]
    if len(versions) > 1:
        raise ValueError(
            f"the model {model} has the versions {', '.join(versions)}; name one in target.version"
        )
    return versions[0] if versions else ""


def _tensor(metadata: dict, kind: str, name: str, default: Tensor) -> Tensor:
    """The input or output called `name`, or the only one; `default` if the server lists none."""
    try:
        listed = [
            Tensor(
                str(each["name"]),
                str(each["datatype"]),
                [int(size) for size in each.get("shape") or []],
            )
            for each in metadata.get(f"{kind}s") or []
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
    matches = [each for each in listed if each.name == name] if name else listed
    if len(matches) > 1 or (listed and not matches):
        has = f"there is no {kind} {name!r}" if name else f"there are several {kind}s"
        raise ValueError(f"{has} of the model; name one of {names} in target.{kind}")
    return matches[0] if matches else default


def _check_tensors(
    model_input: Tensor,
    model_output: Tensor,
    shape: tuple[int, int, int],
    classes: int,
    access: str,
) -> None:
    """Raise ValueError unless the input takes the images and the output has a score per class."""
    if model_input.datatype not in INPUTS:
        raise ValueError(
            f"the model's input {model_input.name} is {model_input.datatype}, and images are sent"
            f" as {' or '.join(INPUTS)}"
        )
    if model_input.shape and not _fits(model_input.shape, (-1, *shape)):
        raise ValueError(
            f"the model's input {model_input.name} has the shape {model_input.shape} and images"
            f" are sent as {[-1, *shape]}: any number of height, width, channels; serve the model"
            " with its preprocessing in front of it, or set the data's size to its own"
        )
    if model_output.datatype in LABELS and access == "label":
        return
    if model_output.datatype and model_output.datatype not in OUTPUTS:
        raise ValueError(
            f"the model's output {model_output.name} is {model_output.datatype}, and scores are "
            f"{', '.join(OUTPUTS)}"
            + (
                f" (class numbers, {' or '.join(LABELS)}, are target.access=label)"
                if model_output.datatype in LABELS
                else ""
            )
        )
    if model_output.shape and not _fits(model_output.shape, (-1, classes)):
        raise ValueError(
            f"the model's output {model_output.name} has the shape {model_output.shape} and should"
            f" have {[-1, classes]}: the images have {classes} classes, which must be the model's,"
            " in its order"
        )


def _fits(theirs: list[int], ours: tuple[int, ...]) -> bool:
    return len(theirs) == len(ours) and all(
        -1 in pair or pair[0] == pair[1] for pair in zip(theirs[1:], ours[1:], strict=True)
    )


def _extensions(send: Send) -> list[str]:
    try:
        return _object(*send("GET", "/v2", None, {})).get("extensions") or []
    except ValueError:  # a gateway may let only the model's own addresses pass
        return []


def _request(
    number: str, model_input: Tensor, model_output: Tensor, images: np.ndarray, binary: bool
) -> tuple[bytes, dict]:
    """Body and headers of a request for the scores of images."""
    pixels = images.astype(INPUTS[model_input.datatype])
    tensor: dict[str, Any] = {
        "name": model_input.name,
        "datatype": model_input.datatype,
        "shape": list(images.shape),
    }
    output: dict[str, Any] = {"name": model_output.name}
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
    """The output called `name` of an answer, in any shape."""
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
            # Some servers write null for NaN; it becomes NaN.
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
    """A JSON object. A body of unstated length may be cut off: that is Unavailable."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        if "Content-Length" not in headers and headers.get("Transfer-Encoding", "") != "chunked":
            raise Unavailable(f"the answer breaks off: {error}") from None
        content = None
    if not isinstance(content, dict):
        raise ValueError(
            f"the answer is no JSON object but begins with {body[:60]!r}; does a server of the Open"
            " Inference Protocol v2 stand at target.url?"
        )
    return content
