"""Weights files as dicts of NumPy arrays. Nothing that a file says is ever executed."""

import importlib
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np


def read(path: Path | str) -> dict[str, np.ndarray]:
    """Read every tensor of a file by its name; floats of other widths become f32.

    `.safetensors` is read without torch. Other files go through `torch.load(weights_only=True)`, in
    the zip or in the older format. If the content is a dict with a "state_dict" or a "model", only
    that entry is read.

    Raises:
      ValueError: torch is absent or too old; or the file is missing, empty, cut short, text, of
        another format, or holds more than tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return {
            name: value.astype(np.float32, copy=False)
            if np.issubdtype(value.dtype, np.floating) or value.dtype == ml_dtypes.bfloat16
            else value
            for name, value in read_safetensors(path).items()
        }
    magic = look(path)
    if not magic.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(f"{path} is neither a PyTorch file nor .safetensors; download it again")
    torch = import_torch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of files that it then refuses
            # A mapped file takes memory only for the parts in use; the older format has no map.
            content = torch.load(
                str(path), map_location="cpu", weights_only=True, mmap=magic.startswith(b"PK")
            )
    except Exception as error:  # torch raises many kinds for damaged files
        text = " ".join(str(error).split())
        if refused := re.search(r"GLOBAL (\S+)|WeightsUnpickler error: (.{,60})", text):
            raise ValueError(
                f"{path} holds more than tensors, which could run code, and is not read "
                f"({refused[1] or refused[2]}); save its state_dict alone"
            ) from None
        raise ValueError(
            f"{path} cannot be read; it is damaged or cut short ({text[:100]}); download it again"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_complex():
                raise ValueError(
                    f"{path}: {name} is sparse, quantised or complex; save plain tensors"
                )
            value = value.detach()
            tensors[name] = (value.float() if value.is_floating_point() else value).numpy()
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors by name, but a {type(content).__name__}; save a state_dict"
        )
    return tensors


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays as they are.

    Raises:
      ValueError: the file is missing, empty, cut short, text, or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    look(path)
    try:
        arrays = load_file(path)
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not .safetensors, or is cut short ({error}); download it again"
        ) from None
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
