"""What `to_torch` says of its file: the class that loads it, or that there is none."""

import jax
import jax.numpy as jnp
import pytest

from qmx import models
from qmx.checkpoint import save_weights
from qmx.contract import Encoder, chain
from qmx.models.to_torch import loader, main


def variables(arch, classes=0, channels=3):
    """A network's variables, of zeros."""
    net = models.backbone(arch)
    if classes:
        net = chain(backbone=net, head=models.classifier(classes))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((2, 32, 32, channels))))
    return Encoder(*jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


@pytest.mark.slow
def test_loader():
    """Torchvision's constructors by name, with the number of classes, or without a head."""
    assert loader(variables("resnet18", 7)) == (
        "net = torchvision.models.resnet18(num_classes=7); net.load_state_dict(...)"
    )
    assert loader(variables("resnet50")) == (
        "net = torchvision.models.resnet50(); net.fc = torch.nn.Identity();"
        " net.load_state_dict(...)"
    )
    assert "width_per_group=16" in loader(variables("resnext101_32x16d", 1000))
    for arch, channels in (("resnet18_small", 3), ("resnet8_narrow", 3), ("resnet18", 1)):
        with pytest.raises(ValueError, match="no class of torchvision loads this network.*--any"):
            loader(variables(arch, 10, channels))


def test_what_is_there_stays(tmp_path, capsys):
    """Neither its own input nor a directory is written to, nothing half-written is left, and the
    file is everybody's to read."""
    path = tmp_path / "a.safetensors"
    save_weights(path, variables("resnet8_narrow"), {"arch": "resnet8_narrow"})
    before = path.read_bytes()
    (tmp_path / "b.pth").mkdir()
    for out in (path, tmp_path / "b.pth"):
        assert main([str(path), str(out), "--anyway"]) == 2
        assert "give another name" in capsys.readouterr().err and path.read_bytes() == before
    assert main([str(path), str(tmp_path / "c.safetensors"), "--anyway"]) == 0
    assert (tmp_path / "c.safetensors").stat().st_mode & 0o777 == path.stat().st_mode & 0o777
    assert sorted(p.name for p in tmp_path.glob("*.part")) == []


def test_refused_unless_asked(tmp_path, capsys):
    """Nothing is written; with --anyway it is."""
    save_weights(tmp_path / "a.safetensors", variables("resnet8_narrow"))
    words = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(words) == 2 and "--anyway" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()
    assert main([*words, "--anyway"]) == 0 and (tmp_path / "b.safetensors").exists()
