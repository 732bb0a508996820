"""Requests and answers of the Open Inference Protocol v2, as JSON or with binary data behind it."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qmx.ledger import Unavailable
from qmx.targets.said import shown

# Types that images can be sent as: NumPy's names, here and on the wire.
INPUTS = {"UINT8": "uint8", "FP16": "float16", "FP32": "float32"}
OUTPUTS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
LABELS = {"INT32": "<i4", "INT64": "<i8"}  # class numbers, where the access is "label"
HEADER = "Inference-Header-Content-Length"


class Tensor(NamedTuple):
    """An input or output in the model's metadata."""

    name: str
    datatype: str
    shape: list[int]  # -1 is any size


def request(
    number: str, model_input: Tensor, model_output: Tensor, images: np.ndarray, binary: bool
) -> tuple[bytes, dict]:
    """Body and headers of a request for the scores of images, as the model is shown them.

    Args:
      number: id of the request.
      binary: the pixels follow the JSON, and the scores may.
    """
    pixels = images.astype(images.dtype.newbyteorder("<"), copy=False)
    tensor: dict[str, Any] = {
        "name": model_input.name,
        "datatype": {dtype: name for name, dtype in INPUTS.items()}[images.dtype.name],
        "shape": list(images.shape),
    }
    output: dict[str, Any] = {"name": model_output.name}
    content = {"id": number, "inputs": [tensor], "outputs": [output]}
    if not binary:
        tensor["data"] = pixels.ravel().tolist()
        return json.dumps(content).encode(), {"Content-Type": "application/json"}
    tensor["parameters"], output["parameters"] = (
        {"binary_data_size": pixels.nbytes},
        {"binary_data": True},
    )
    header = json.dumps(content).encode()
    return header + pixels.tobytes(), {
        "Content-Type": "application/octet-stream",
        HEADER: str(len(header)),
    }


def read(
    body: bytes,
    headers: Mapping[str, str],
    number: str,
    version: str,
    name: str,
    known: dict[str, str],
) -> np.ndarray:
    """The output called `name` of an answer, in any shape.

    Args:
      number, version: id and model version that the answer must have if it has any.
      known: NumPy's type for each datatype that the output may have.

    Raises:
      ValueError: the answer is another's, or not the protocol's.
      Unavailable: it breaks off.
    """
    length = int(headers[HEADER]) if headers.get(HEADER, "").isdecimal() else len(body)
    answer, rest = parsed(body[:length], headers), body[length:]
    if answer.get("id") not in (None, "", number):
        raise ValueError(
            "the answer belongs to another request, as its id says; nothing of it is kept"
        )
    if version and str(answer.get("model_version") or version) != version:
        raise ValueError(
            f"version {answer['model_version']} of the model answered, and {version} was asked; is"
            " it being replaced? Answers of two models are not mixed"
        )
    names = _all(answer, lambda output: str(output["name"]))
    if name not in names:
        raise ValueError(
            f"the answer has no output {name!r}, but {', '.join(names)}; name one in target.output,"
            " and where the server describes the model, it must call its output so too"
        )
    datatype, shape = _all(answer, lambda output: (output["datatype"], output["shape"]))[
        names.index(name)
    ]
    if not isinstance(datatype, str) or datatype not in known:
        raise ValueError(f"the output {name} is {datatype}, and should be {' or '.join(known)}")
    values = _values(answer, names.index(name), rest, known[datatype])
    if (
        not isinstance(shape, list)
        or not all(type(size) is int and size >= 0 for size in shape)
        or values.size != math.prod(shape)
    ):
        raise ValueError(
            f"the output {name} has {values.size} numbers and says that its shape is {shape};"
            " nothing of this batch is kept"
        )
    return values.reshape(shape)


def _all(answer: dict, part: Callable[[dict], Any]) -> list:
    """Part of each output of an answer."""
    try:
        return [part(output) for output in answer["outputs"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"the answer is not the protocol's: {error!r}") from None


def _values(answer: dict, place: int, rest: bytes, dtype: str) -> np.ndarray:
    """Numbers of one output, from its JSON or from the binary data `rest`."""
    sizes = _all(
        answer, lambda output: int((output.get("parameters") or {}).get("binary_data_size", 0))
    )
    try:
        if sizes[place]:
            start = sum(sizes[:place])
            if min(sizes) < 0 or start + sizes[place] > len(rest):
                raise ValueError(f"{len(rest)} bytes of binary data, sizes {sizes}")
            return np.frombuffer(rest[start : start + sizes[place]], dtype)
        # Some servers write null for NaN; it becomes NaN.
        return np.array(answer["outputs"][place]["data"], dtype)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the answer is not the protocol's: {error!r}") from None


def parsed(body: bytes, headers: Mapping[str, str]) -> dict:
    """A JSON object.

    Raises:
      Unavailable: a body of unstated length is not one: it may be cut off.
      ValueError: it is another thing.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        if "Content-Length" not in headers and headers.get("Transfer-Encoding", "") != "chunked":
            raise Unavailable(f"the answer breaks off: {error}") from None
        content = None
    if not isinstance(content, dict):
        raise ValueError(
            f'the answer is not a JSON object but begins with "{shown(body[:60], "")}"; does a'
            " server of the Open Inference Protocol v2 stand at target.url?"
        )
    return content
