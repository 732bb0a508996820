"""Weights files of every kind: told by their content, and what cannot be read named in one line."""

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch_reference as reference
from safetensors.torch import save_file
from torch_reference import torch

from qmx.models import from_torch
from qmx.models.read_torch import read
from qmx.models.resnet import ARCHS

NAME = "layer1.0.conv1.weight"


@pytest.fixture(scope="module")
def state():
    """A ResNet-8 of 10 classes."""
    return reference.released(ARCHS["resnet8"], 10, side=32).state_dict()


def refused(path, *words):
    """The line that a file is refused with; it has the path and the words."""
    with pytest.raises(ValueError) as error:
        from_torch.load(path)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and str(path) in text, text
    for word in words:
        assert word in text, text
    return text


def test_a_hole_in_a_file(state, tmp_path):
    """As a download leaves it that took the room before the bytes came: torch reads zeros."""
    path = tmp_path / "net.pth"
    torch.save(state, path)
    data = bytearray(path.read_bytes())
    where = data.index(state["layer3.0.conv2.weight"].numpy().tobytes())
    data[where : where + 4096] = bytes(4096)
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["layer3.0.conv2.weight"].flatten()[0] == 0
    refused(path, "is damaged", "download it again")


ODD = {
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "of type float8_e4m3fn"),
    "float8 scaled": (lambda x: x.to(torch.float8_e5m2), "of type float8_e5m2"),
    "meta": (lambda x: x.to("meta"), "no values"),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]), "nested"),
    "expanded": (lambda x: torch.zeros(1).expand(10**13), "expanded"),
    "one row": (lambda x: x[:1].expand(16, -1, -1, -1), "expanded"),
    "sparse": (lambda x: x.to_sparse(), "sparse"),
    "compressed": (lambda x: x[0, 0].to_sparse_csr(), "sparse"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantised"),
    "complex": (lambda x: x + 1j, "of type complex64"),
    "conjugate": (lambda x: (x + 1j).conj(), "of type complex64"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change, words", ODD.values(), ids=ODD)
def test_odd_tensors_are_named(state, tmp_path, change, words):
    torch.save({"state_dict": {**state, NAME: change(state[NAME])}}, tmp_path / "net.pth")
    refused(tmp_path / "net.pth", f"net.pth: {NAME} ", words)


@pytest.mark.parametrize(
    "dtype, words",
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.complex64, "C64"),
    ],
)
def test_odd_types_in_safetensors_are_named(state, tmp_path, dtype, words):
    save_file({**state, NAME: state[NAME].to(dtype)}, tmp_path / "net.safetensors")
    refused(tmp_path / "net.safetensors", f"net.safetensors: {NAME} ", words)


def test_an_optimiser_is_not_read(state, tmp_path):
    """Its tensors may be of any kind."""
    states = {"state": {0: {"step": torch.eye(3).to_sparse()}}, "x": torch.eye(3).to_sparse()}
    torch.save({"model": state, "optimizer": states, "optim_state": states}, tmp_path / "net.pth")
    assert list(read(tmp_path / "net.pth")) == ["model"]


@pytest.mark.parametrize("wrong", ["net.safetensors", "net.pth", "net.bin", "net"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_the_content_tells_the_format(state, tmp_path, kind, wrong):
    """Whatever the file is called."""
    if kind == "safetensors":
        save_file(state, tmp_path / wrong)
    else:
        torch.save(state, tmp_path / wrong, _use_new_zipfile_serialization=kind == "zip")
    found = from_torch.load(tmp_path / wrong)
    assert found.arch == "resnet8"
    np.testing.assert_array_equal(found.head["fc"]["bias"], state["fc.bias"].numpy())


class Stem(reference.Released):
    """A ResNet whose first layer alone is run: programs hold all weights."""

    def forward(self, x):
        return self.conv1(x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["script", "export"])
def test_programs_are_named_and_the_cure_works(state, tmp_path, kind):
    """Of TorchScript and torch.export; the code of the message makes weights with the scores."""
    net = Stem(ARCHS["resnet8"], 10).eval()
    net.load_state_dict(state)
    path, images = tmp_path / "net.pth", torch.randn(2, 3, 32, 32)
    if kind == "script":
        torch.jit.save(torch.jit.trace(net, images), path)
    else:
        with path.open("wb") as file:
            torch.export.save(torch.export.export(net, (images,)), file)
    text = refused(path, "TorchScript" if kind == "script" else "torch.export")
    code = "import torch; " + text.partition("save them with ")[2]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    found = from_torch.load(tmp_path / "weights.pth")
    kernel = found.backbone.params["layer2_0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), state["layer2.0.conv1.weight"])
    assert found.head is not None


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    "content, words",
    [
        (zipped(image="x", label="y"), "a zip of image, label"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
        (b"\x93NUMPY\x01\0" + bytes(99), "an array of NumPy"),
        (b"\x1f\x8b\x08\0" + bytes(99), "compressed by gzip"),
        (bytes(500), "neither a PyTorch file nor .safetensors"),
    ],
)
def test_other_files_are_named(tmp_path, content, words):
    for name in ("net.pth", "net.safetensors"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, words)
