"""Weights files as dicts of NumPy arrays. Nothing that a file says is ever executed."""

import importlib
import re
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

FORMATS = {  # how files of other kinds begin
    b"\x89HDF": "an HDF5 file, as Keras writes them, and not weights of PyTorch",
    b"\x93NUMPY": "an array of NumPy, and not weights of PyTorch",
    b"\x1f\x8b": "compressed by gzip, and not weights of PyTorch; unpack it",
    b"GGUF": "a GGUF file, and not weights of PyTorch",
}
# A tensor that is read; of safetensors and of torch.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
WHOLE = {
    f"{kind[0].upper()}{bits}": f"{kind}{bits}"
    for kind in ("int", "uint")
    for bits in (8, 16, 32, 64)
}
TYPES = FLOATS | WHOLE | {"BOOL": "bool"}
CURE = "load it in PyTorch and save dense tensors of float32"
DEPTH = 8  # of dicts in dicts


def read(path: Path | str) -> dict[str, dict[str, np.ndarray]]:
    """Read every tensor of a file; floats of other widths become f32.

    The content decides the format, not the file's name. safetensors are read without torch. Other
    files go through `torch.load(weights_only=True)`, in the zip or in the older format.

    Returns:
      Tensors by name, for each dict in the file that has some: "" for the content itself,
      "state_dict", "model.teacher" for dicts in it. Optimisers' are left out.

    Raises:
      ValueError: torch is absent or too old; or the file is missing, empty, cut short, text, of
        another format, or holds more than tensors; a tensor that is sparse, nested, quantised,
        expanded, without values, or of a type that NumPy has not.
    """
    path = Path(path)
    magic = look(path)
    if is_safetensors(magic):
        arrays = {
            name: value.astype(np.float32, copy=False)
            if np.issubdtype(value.dtype, np.floating) or value.dtype == ml_dtypes.bfloat16
            else value
            for name, value in read_safetensors(path).items()
        }
        return {"": arrays}
    if not magic.startswith((b"PK\x03\x04", b"\x80")):
        words = next((words for start, words in FORMATS.items() if magic.startswith(start)), "")
        raise ValueError(
            f"{path} is {words or 'neither a PyTorch file nor .safetensors; download it again'}"
        )
    if magic.startswith(b"PK"):
        refuse_programs(path)
    torch = import_torch(path)
    try:
        # A mapped file takes memory only for the parts in use; the older format has no map. torch
        # goes by the name ".safetensors", and has no map of files without a name.
        mapped = magic.startswith(b"PK") and path.suffix != ".safetensors"
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # torch warns of files that it then refuses
            content = torch.load(
                str(path) if mapped else file, map_location="cpu", weights_only=True, mmap=mapped
            )
    except Exception as error:  # torch raises many kinds for damaged files
        text = " ".join(str(error).split())
        if refused := re.search(r"GLOBAL (\S+)|WeightsUnpickler error: (.{,60})", text):
            raise ValueError(
                f"{path} holds more than tensors, which could run code, and is not read "
                f"({refused[1] or refused[2]}); save its state_dict alone"
            ) from None
        if "nested jag" in text:
            raise ValueError(f"{path} holds nested tensors; {CURE}") from None
        raise ValueError(
            f"{path} cannot be read; it is damaged or cut short ({text[:100]}); download it again"
        ) from None
    tables: dict[str, dict[str, np.ndarray]] = {}

    def add(found: Any, at: str, depth: int) -> None:
        for name, value in found.items():
            if isinstance(value, torch.Tensor) and isinstance(name, str):
                tables.setdefault(at, {})[name] = array(torch, value, f"{path}: {name}")
            if isinstance(value, dict) and depth and not str(name).startswith("optim"):
                add(value, f"{at}.{name}" if at else str(name), depth - 1)

    if isinstance(content, dict):
        add(content, "", DEPTH)
    if not tables:
        raise ValueError(
            f"{path} holds no tensors by name, but a {type(content).__name__}; save a state_dict"
        )
    return tables


def array(torch: Any, value: Any, what: str) -> np.ndarray:
    """A tensor of torch, floats as f32; ValueError unless it is dense and plain."""
    kind = str(value.dtype).removeprefix("torch.")
    problem = ""
    if value.is_nested:
        problem = "nested"
    elif value.layout != torch.strided:
        problem = "sparse"
    elif value.is_quantized:
        problem = "quantised"
    elif value.device.type == "meta":
        raise ValueError(f"{what} has a shape and no values (meta); save a network with weights")
    elif kind not in TYPES.values():
        problem = f"of type {kind}"
    elif any(
        step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)
    ):
        problem = "expanded, one value for many"
    if problem:
        raise ValueError(f"{what} is {problem}; {CURE}")
    value = value.detach().resolve_neg()
    return (value.float() if value.is_floating_point() else value).numpy()


def refuse_programs(path: Path) -> None:
    """Raise ValueError, with the cure, for zips that torch writes and that are not weights, or that
    are damaged inside: torch looks at no sum."""
    try:
        with zipfile.ZipFile(path) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # torch.load names the damage
    if damaged:
        raise ValueError(
            f"{path} is damaged: {damaged} in it is not what was written; download it again, or"
            " save it with its sums (torch.serialization.set_crc32_options)"
        )
    where = repr(str(path))
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        raise ValueError(
            f"{path} is a TorchScript program and not weights; save them with"
            f" torch.save(torch.jit.load({where}).state_dict(), 'weights.pth')"
        )
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        raise ValueError(
            f"{path} is a program of torch.export and not weights; save them with"
            f" torch.save(torch.export.load({where}).state_dict, 'weights.pth')"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise ValueError(
            f"{path} is a zip of {', '.join(names[:3]) or 'nothing'} and not a PyTorch file; give"
            " the weights in it"
        )


def is_safetensors(start: bytes) -> bool:
    """True if a file begins with the length of a JSON header and the header."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays as they are.

    Raises:
      ValueError: the file is missing, empty, cut short, text, or of another format; a type that
        NumPy has not.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    look(path)
    try:
        with safe_open(path, "numpy") as file:
            types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not .safetensors, or is cut short ({error}); download it again"
        ) from None
    for name, kind in types.items():
        if kind not in TYPES:
            raise ValueError(f"{path}: {name} is of type {kind}; {CURE}")
    arrays = load_file(path)
    if not arrays:
        raise ValueError(f"{path} holds no tensors; download it again")
    return arrays


def look(path: Path) -> bytes:
    """Read the first bytes of a file.

    Raises:
      ValueError: there is no such file, or it is empty or text.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        raise ValueError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer and not the weights; fetch the file itself (git lfs pull)"
        )
    if start.isascii() and not re.search(rb"[\x00-\x08\x0e-\x1f]", start):
        kind = "a web page" if start.lstrip().startswith(b"<") else "text"
        raise ValueError(f"{path} is {kind} and not weights; download it again")
    return start


def import_torch(path: Path) -> ModuleType:
    """Import torch, in a version that reads files safely.

    Raises:
      ValueError: torch is absent, or older than 2.10. There a crafted file could execute code in
        spite of `weights_only=True` (CVE-2025-32434, CVE-2026-24747).
    """
    cure = "pip install 'qmx[torch]', or convert the file to .safetensors elsewhere"
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        raise ValueError(f"{path} needs PyTorch; {cure}") from None
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        raise ValueError(
            f"{path} needs PyTorch 2.10 or newer, and here is {torch.__version__}; {cure}"
        )
    return torch
