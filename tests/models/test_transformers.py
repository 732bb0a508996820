"""Files that transformers' own `save_pretrained` writes: the same features and scores as its own
networks compute."""

import jax
import numpy as np
import pytest
from record_vits import body, entry, filled, images, networks_of_transformers, tensors
from test_vit import RECORDED, TINY, TOLERANCE, features, off, tiny  # noqa: F401
from torch_reference import torch

from qmx import models
from qmx.models import from_torch

TITLES = [
    title.removeprefix("transformers ")
    for title in RECORDED
    if title.startswith("transformers ") and not title.endswith(" in memory")
]


@pytest.fixture(scope="module")
def hf():
    """The package, which is imported where it is used: it takes five seconds of a processor."""
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def networks(hf):
    """{title: (class, configuration, arch)} of those that were recorded."""
    made = {title: rest for title, *rest in networks_of_transformers()}
    assert [*made] == TITLES
    return made


@pytest.mark.parametrize("title", TITLES)
def test_vit(title, networks, tiny, features, tmp_path):  # noqa: F811
    """Of tiny networks of each family, with all parameters random."""
    model, config, arch = networks[title]
    net = filled(model(config))
    net.float().save_pretrained(tmp_path)
    made = from_torch.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        tokens = body(net.double())(tensors("dinov3" in title)).last_hidden_state
    found = TINY[made.arch]
    ours = features(found, made.backbone.params, images(found.of.rope))
    assert off(ours, entry(arch, {}, tokens)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kind", "widths", "depths"),
    [
        ("resnet18", "basic", (64, 128, 256, 512), (2, 2, 2, 2)),
        ("resnet50", "bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3)),
    ],
)
def test_resnet(arch, kind, widths, depths, hf, tmp_path):
    """Scores of ten classes, with all weights and statistics random."""
    config = hf.ResNetConfig(
        layer_type=kind, hidden_sizes=[*widths], depths=[*depths], num_labels=10
    )
    torch.manual_seed(0)
    net = hf.ResNetForImageClassification(config)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    net.eval().save_pretrained(tmp_path)
    x = np.random.default_rng(0).normal(size=(4, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        want = net(torch.from_numpy(x.transpose(0, 3, 1, 2))).logits.numpy()
    made = from_torch.load(tmp_path / "model.safetensors")
    assert made.arch == arch and all("num_batches" in name for name in made.dropped)
    backbone = models.backbone(arch)
    z, _ = jax.jit(lambda p, s, x: backbone.apply(p, s, x, False))(*made.backbone, x)
    scores = np.asarray(z) @ made.head["fc"]["kernel"] + made.head["fc"]["bias"]
    np.testing.assert_allclose(scores, want, atol=2e-5 * np.abs(want).max())
    assert np.std(want, 0).min() > 1e-3 * np.abs(want).max()  # the images are told apart
