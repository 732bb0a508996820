"""A target in an ONNX file, computed here by onnxruntime, as it is deployed."""

import ast
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from qmx.checkpoint import file_digest
from qmx.ledger.access import received
from qmx.targets.query import Outside, filled_up
from qmx.targets.shown import UNCHANGED, Shown, prepare, resolved
from qmx.targets.shown import name as name_of

# The entry of a tensor whose values are in another file (TensorProto.external_data, onnx.proto):
# a key, and the length of the file's name that follows.
LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f])")
# Types of an input that images can be shown as: ONNX's name, NumPy's.
NAMES = ("names", "class_names", "classes", "labels")  # keys of metadata that hold class names
INPUTS = {"tensor(uint8)": "uint8", "tensor(float16)": "float16", "tensor(float)": "float32"}


def opened(path: str) -> Any:
    """The session of onnxruntime for a file; ValueError if there is none, or it cannot be read."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ValueError("target.kind=onnx needs onnxruntime: pip install 'qmx[onnx]'") from None
    if not Path(path).is_file():
        raise ValueError(f"target.path {path}: no such file")
    onnxruntime.set_default_logger_severity(3)  # errors alone
    try:
        return onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    except Exception as error:  # it has exceptions of its own, without a common base
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"target.path {path} cannot be read as ONNX: {reason}") from None


def connect(
    path: str,
    *,
    shape: tuple[int, int, int],
    classes: int,
    input: str = "",
    output: str = "",
    access: str = "logits",
    shown: Shown = UNCHANGED,
) -> Outside:
    """A query function around the model of a file.

    The digest is of the file, of those that hold its weights, and of the input's and the output's
    name. A model that takes a fixed number of images gets them so, the last ones filled up.

    Args:
      path: of the .onnx file.
      shape: of the images, H, W, C.
      classes: N, 0 if it is not known.
      input, output: names of the tensors; by default the only ones.
      access: level of the output, "logits", "probs" or "label"; see `qmx.ledger.access.received`.
      shown: how the model gets the images; the file says the type and the order of the axes.

    Raises:
      ValueError: onnxruntime is not installed, or cannot read the file; no such tensor; images that
        do not fit. By the query: an answer that does not.
    """
    session = opened(path)
    tensor = _one(session.get_inputs(), "input", input)
    answer = _one(session.get_outputs(), "output", output)
    if tensor.type not in INPUTS:
        raise ValueError(
            f"the model's input {tensor.name} is {tensor.type}, and not {' or '.join(INPUTS)}"
        )
    sizes = [size if isinstance(size, int) else -1 for size in tensor.shape]
    seen = resolved(shown, shape, INPUTS[tensor.type], sizes)
    fixed = max([0, *sizes[:1]])

    def query(images: np.ndarray) -> np.ndarray:
        count = len(images)
        pixels, rows = prepare(images, seen), filled_up(count, fixed or count)
        try:
            parts = [session.run([answer.name], {tensor.name: pixels[some]})[0] for some in rows]
        except Exception as error:  # onnxruntime's own have no other base
            text = " ".join(str(error).split())
            if "allocat" in text:
                raise MemoryError(f"{path}: {text}; lower target.batch_size") from None
            raise ValueError(
                f"{path} fails on {pixels.dtype}{list(pixels.shape)}: {text}; target.shown says how"
                " images are shown to it"
            ) from None
        return received(np.concatenate(parts)[:count], count, classes, access)

    named = f"\0{tensor.name}\0{answer.name}".encode()
    return Outside(query, Path(path).name, digest(path, named), name_of(seen))


def digest(path: str, more: bytes = b"") -> str:
    """SHA-256 of a file with what `more` says, and of the files that hold its weights, if they are
    not in it: PyTorch writes MODEL.onnx.data beside MODEL.onnx."""
    content = Path(path).read_bytes()
    result = hashlib.sha256(content + more)
    names = {content[m.end() : m.end() + m[1][0]] for m in LOCATION.finditer(content)}
    for name in sorted(names):
        outside = Path(path).parent / name.decode(errors="surrogateescape")
        if outside.is_file():
            result.update(file_digest(outside).encode())
    return result.hexdigest()


def class_names(path: str) -> list[list[str]]:
    """The classes' names in a file's metadata, as `qmx.data.named.read` has them; [] without any.

    They are looked for under `NAMES`, as a list or a table by number in JSON or Python's notation
    (Ultralytics has "names" so), or with commas or line ends between them.

    Raises:
      ValueError: see `opened`.
    """
    metadata = opened(path).get_modelmeta().custom_metadata_map
    for key in NAMES:
        names = listed(metadata.get(key, ""))
        if len(names) > 1:
            return [[name] for name in names]
    return []


def listed(text: str) -> list[str]:
    """Names in a text, in their order."""
    try:
        value = ast.literal_eval(text.strip())  # JSON's lists and tables of strings, too
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [name.strip() for name in text.replace("\n", ",").split(",") if name.strip()]
    if isinstance(value, dict):
        numbers = {int(key): name for key, name in value.items() if str(key).isdigit()}
        complete = sorted(numbers) == [*range(len(numbers))]
        value = [numbers[i] for i in range(len(numbers))] if complete else []
    return [str(name) for name in value] if isinstance(value, list | tuple) else []


def _one(tensors: list[Any], kind: str, name: str) -> Any:
    """The tensor called `name`, or the only one."""
    matches = [tensor for tensor in tensors if tensor.name == name] if name else tensors
    if len(matches) != 1:
        has = f"there is no {kind} {name!r}" if name else f"there are several {kind}s"
        names = ", ".join(tensor.name for tensor in tensors)
        raise ValueError(f"{has} of the model; name one of {names} in target.{kind}")
    return matches[0]
