"""Weights between PyTorch and qmx: the same numbers, nothing lost in silence, nothing executed."""

import argparse
import contextlib
import functools
import io
import os
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference as reference
from conftest import ROOT
from safetensors.numpy import load_file, save_file
from torch_reference import torch

from qmx import models
from qmx.checkpoint import leaf_digests, load_weights, save_weights, weights_digest
from qmx.contract import Encoder, chain
from qmx.models import from_torch, to_torch
from qmx.models.read_torch import read
from qmx.models.resnet import ARCHS
from qmx.models.to_torch import unflatten


@pytest.fixture(scope="module")
def small():
    """A ResNet-8 of 10 classes, and its state dict; its files are a hundredth of a ResNet-18's."""
    net = reference.released(ARCHS["resnet8"], 10)
    return net, {name: value.clone() for name, value in net.state_dict().items()}


@pytest.fixture(scope="module")
def resnet18():
    """The same of a ResNet-18, whose shapes are no other network's."""
    net = reference.released(ARCHS["resnet18"], 10)
    return net, {name: value.clone() for name, value in net.state_dict().items()}


def numpy(state):
    """A state dict as arrays."""
    return {name: value.numpy() for name, value in state.items()}


def images(n, side, seed=1):
    """The same images for torch and for qmx."""
    x = reference.pictures(n, side, seed=seed)
    return x, x.numpy().transpose(0, 2, 3, 1)


def whole(net):
    """Variables of backbone and head out of a `Converted`."""
    return Encoder(
        {"backbone": net.backbone.params, "head": net.head},
        {"backbone": net.backbone.stats, "head": {}},
    )


def logits(arch, classes, variables, x, batch=16, options=None, **keywords):
    """In eval mode, batch by batch; `options` are the compiler's."""
    net = chain(backbone=models.backbone(arch, **keywords), head=models.classifier(classes))
    step = jax.jit(lambda p, s, x: net.apply(p, s, x, False)[0], compiler_options=options)
    variables = jax.device_put(variables)
    return np.concatenate([step(*variables, x[i : i + batch]) for i in range(0, len(x), batch)])


def their_logits(net, x, batch=16):
    """Of torch, in eval mode."""
    with torch.no_grad():
        return torch.cat([net(part) for part in x.split(batch)]).numpy()


def agree(ours, theirs, tolerance):
    """The largest difference is within `tolerance` of the standard deviation of the scores over the
    images."""
    assert ours.shape == theirs.shape and np.isfinite(theirs).all()
    difference, spread = np.abs(ours - theirs).max(), theirs.std(0).mean()
    assert difference < tolerance * spread, (difference, spread)


def run(module, *arguments):
    """A command of the package, in this process: (exit status, standard out, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = {"from_torch": from_torch, "to_torch": to_torch}[module].main(
            [*map(str, arguments)]
        )
    return status, out.getvalue(), err.getvalue()


def run_alone(module, *arguments, **environment):
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"qmx.models.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def refused(module, *arguments, out, run=run):
    """The one line that a command gives on standard error as it refuses its arguments, leaving
    nothing at `out`."""
    status, printed, error = run(module, *arguments, out)
    assert status == 2 and printed == "" and error.count("\n") == 1, error
    assert not list(out.parent.glob(f"{out.name}*")) and not out.with_suffix(".part").exists()
    return error


# The same numbers


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The ResNeXt-101 32x16d as a torch file of 776 MB, converted by the command: (network, file,
    written, report)."""
    folder = tmp_path_factory.mktemp("large")
    net, path, out = (
        reference.released(ARCHS["resnext101_32x16d"]),
        folder / "net.pth",
        folder / "net.safetensors",
    )
    torch.save(net.state_dict(), path)
    # Not getrusage, whose peak includes that of the process that started this one.
    code = (
        "import re, sys; from qmx.models import from_torch; status ="
        " from_torch.main(sys.argv[1:]);print(re.search(r'VmHWM:\\s+(\\d+) kB',"
        " open('/proc/self/status').read())[1], file=sys.stderr);sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, out], cwd=ROOT, capture_output=True, text=True
    )
    yield net, path, out, done
    path.unlink()
    out.unlink(missing_ok=True)


@pytest.mark.slow
def test_memory(large):
    """Converting the target's 776 MB takes at most three times as much, all imports included."""
    _, path, out, done = large
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 776e6 and out.stat().st_size > 776e6
    assert 1024 * int(done.stderr.split()[-1]) <= 3 * path.stat().st_size
    assert re.search(
        r"net.pth: resnext101_32x16d with a classifier of 1000 classes\nsource SHA-256"
        r" [0-9a-f]{64}\n"
        r"used 522 tensors\ndropped 104 tensors: num_batches_tracked\nwrote .*, digest"
        r" [0-9a-f]{64}\n",
        done.stdout,
    )


@pytest.mark.slow
def test_target_scores(large):
    """The target of the reference results scores 64 images as torch does, its grouped
    convolutions included."""
    net, _, out, _ = large
    x, ours = images(64, 32)
    theirs = their_logits(net, x)
    # Compiled quickly, its grouped convolutions take nine times as long.
    level = {"xla_backend_optimization_level": 2}
    ours = logits("resnext101_32x16d", 1000, unflatten(load_file(out)), ours, options=level)
    agree(ours, theirs, 1e-3)
    assert (ours.argmax(1) == theirs.argmax(1)).all() and len(set(theirs.argmax(1))) > 8


@pytest.fixture(scope="module")
def resnet50():
    """A ResNet-50, and its conversion."""
    net = reference.released(ARCHS["resnet50"])
    # Copies, since a conversion holds views, and the network is trained below.
    return net, from_torch.convert(
        {name: value.copy() for name, value in numpy(net.state_dict()).items()}
    )


@pytest.mark.slow
def test_student_scores(resnet50):
    """So does the ResNet-50 at 64 px; in half precision within its own tolerance; and with its
    norms folded in."""
    net, found = resnet50
    x, ours = images(16, 64)
    theirs = their_logits(net, x)
    full = logits("resnet50", 1000, whole(found), ours)
    agree(full, theirs, 1e-3)
    assert (full.argmax(1) == theirs.argmax(1)).all()
    half = logits("resnet50", 1000, whole(found), ours, dtype=jnp.bfloat16)
    assert np.sqrt(np.square(half - theirs).mean()) < 0.2 * theirs.std(0).mean()
    folded = models.fold(*found.backbone)
    folded = Encoder(
        {"backbone": folded.params, "head": found.head}, {"backbone": folded.stats, "head": {}}
    )
    agree(logits("resnet50", 1000, folded, ours, folded=True), theirs, 1e-3)


@pytest.mark.slow
def test_training_mode(resnet50):
    """A step in training mode: the features, and the running statistics that it leaves."""
    net, found = resnet50
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, ours = images(4, 64)
    backbone = models.backbone("resnet50")
    features, stats = jax.jit(lambda p, s, x: backbone.apply(p, s, x, True))(*found.backbone, ours)
    net.train()
    with torch.no_grad():
        theirs = reference.ResNet.forward(net, x).numpy()
    after = numpy(net.state_dict())
    moved = from_torch.convert({name: value.copy() for name, value in after.items()}).backbone.stats
    net.load_state_dict(before)
    net.eval()
    np.testing.assert_allclose(features, theirs, rtol=1e-3, atol=1e-3 * theirs.std())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()),
        stats,
        moved,
    )
    assert all(
        np.abs(np.asarray(a) - b).max() > 0
        for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(found.backbone.stats), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["resnet8", "resnet18_small", "resnet18_small_pool", "resnet34", "resnext50_32x4d"]
)
def test_other_networks(arch):
    """Recognised by their shapes and right: small stems, an odd number of channels, few classes,
    narrow groups."""
    net = reference.released(ARCHS[arch], 7, channels=2, side=32)
    found = from_torch.convert(numpy(net.state_dict()), arch if "small" in arch else "")
    assert found.arch == arch and found.used == len(
        [n for n in net.state_dict() if "tracked" not in n]
    )
    x = torch.randn(16, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    agree(
        logits(arch, 7, whole(found), x.numpy().transpose(0, 2, 3, 1)), their_logits(net, x), 1e-3
    )


# Layouts


def bn(name, width, affine=True):
    """The tensors of a batch norm."""
    found = {
        f"{name}.running_mean": torch.randn(width),
        f"{name}.running_var": torch.rand(width) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(7),
    }
    return found | (
        {f"{name}.weight": torch.rand(width), f"{name}.bias": torch.randn(width)} if affine else {}
    )


def linear(name, out, entering, bias=True):
    """The tensors of a linear layer."""
    return {f"{name}.weight": torch.randn(out, entering)} | (
        {f"{name}.bias": torch.randn(out)} if bias else {}
    )


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def body(state):
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def moco_state(state, version=2, d=64):
    """A MoCo model under DistributedDataParallel, as its training script saves it."""
    encoder = body(state) | (
        linear("fc", 128, d) if version == 1 else linear("fc.0", d, d) | linear("fc.2", 128, d)
    )
    noise = {
        name: torch.randn(value.shape) if value.is_floating_point() else value
        for name, value in encoder.items()
    }
    return prefixed(
        "module.",
        {
            "queue": torch.randn(128, 64),
            "queue_ptr": torch.zeros(1, dtype=torch.long),
            **prefixed("encoder_q.", encoder),
            **prefixed("encoder_k.", noise),
        },
    )


def simsiam_state(state, layers=3, d=64):
    """A SimSiam model under DistributedDataParallel."""
    head = linear("fc.0", d, d, bias=False) | bn("fc.1", d)
    if layers == 3:
        head |= linear("fc.3", d, d, bias=False) | bn("fc.4", d)
    last = 3 * (layers - 1)
    head |= linear(f"fc.{last}", d, d) | bn(f"fc.{last + 1}", d, affine=False)
    predictor = linear("0", 64, d, bias=False) | bn("1", 64) | linear("3", d, 64)
    return prefixed(
        "module.", prefixed("encoder.", body(state) | head) | prefixed("predictor.", predictor)
    )


def openselfsup_state(state, d=64):
    """OpenSelfSup's MoCo: the query encoder under two names, and necks."""
    neck = linear("mlp.0", d, d) | linear("mlp.2", 128, d)
    encoders = {
        f"encoder_{which}.{name}": value
        for which in "qk"
        for name, value in (prefixed("0.", body(state)) | prefixed("1.", neck)).items()
    }
    return {
        "queue": torch.randn(128, 64),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
        **encoders,
        **prefixed("backbone.", body(state)),
    }


def mmselfsup_state(state, d=64):
    """mmselfsup's SimSiam: neck and predictor beside the backbone."""
    return (
        prefixed("backbone.", body(state))
        | prefixed("neck.", linear("fc0", d, d, bias=False) | bn("bn0", d))
        | prefixed("head.predictor.", linear("fc0", 64, d))
    )


def released_file(state):
    """What the training scripts of MoCo and SimSiam write."""
    return {
        "epoch": 800,
        "arch": "resnet18",
        "state_dict": state,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.randn(3)}},
            "param_groups": [{"lr": 0.03, "momentum": 0.9, "params": [0]}],
        },
    }


def same_backbone(found, state):
    """The backbone has, bit for bit, the tensors of `state`; the expectation is read off by other
    code."""
    theirs = {
        name: value.numpy() for name, value in body(state).items() if "num_batches" not in name
    }
    ours = {name: value.numpy() for name, value in reference.variables(*found.backbone).items()}
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


LAYOUTS = {
    "moco v2": moco_state,
    "moco v1": lambda s: moco_state(s, 1),
    "moco on one device": lambda s: {
        name.removeprefix("module."): value for name, value in moco_state(s).items()
    },
    "simsiam": simsiam_state,
    "simsiam cifar": lambda s: simsiam_state(s, 2),
    "openselfsup": openselfsup_state,
    "mmselfsup": mmselfsup_state,
    "bare mmselfsup": body,
}


@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(small, tmp_path, layout, kind, tracked):
    """The encoder of each code base's files, in each kind of file: its tensors exactly, and no
    classifier."""
    _, state = small
    tensors = LAYOUTS[layout](state)
    if not tracked:
        tensors = {name: value for name, value in tensors.items() if "num_batches" not in name}
    path = tmp_path / ("net.safetensors" if kind == "safetensors" else "net.pth.tar")
    if kind == "safetensors":
        save_file(numpy(tensors), path)
    else:
        torch.save(released_file(tensors), path, _use_new_zipfile_serialization=kind == "zip")
    found = from_torch.load(path)
    same_backbone(found, state)
    assert (found.arch, found.head, found.used) == ("resnet8", None, 45)
    assert len(set(found.dropped)) == len(found.dropped) == len(tensors) - 45


@pytest.mark.parametrize("wrap", ["", "module."])
def test_classifiers(small, wrap):
    """torchvision's names, alone or under DataParallel: the classifier comes along."""
    _, state = small
    found = from_torch.convert(numpy(prefixed(wrap, state)), "resnet8")
    same_backbone(found, state)
    assert found.used == 47 and len(found.dropped) == 9
    assert np.array_equal(found.head["fc"]["kernel"], state["fc.weight"].numpy().T)
    assert np.array_equal(found.head["fc"]["bias"], state["fc.bias"].numpy())


def test_half_precision(small, tmp_path):
    """Halves become f32, exactly, from either kind of file."""
    _, state = small
    for dtype in (torch.float16, torch.bfloat16):
        halves = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in state.items()
        }
        torch.save(halves, tmp_path / "net.pth")
        from safetensors.torch import save_file as save

        save(halves, tmp_path / "net.safetensors")
        for name in ("net.pth", "net.safetensors"):
            found = from_torch.load(tmp_path / name)
            same_backbone(found, {name: value.float() for name, value in halves.items()})


@pytest.mark.slow
def test_without_torch(small, tmp_path):
    """safetensors need no torch, neither do the helps; a .pth says in one line what to install."""
    _, state = small
    (tmp_path / "torch.py").write_text("raise ImportError('blocked')")
    alone = functools.partial(run_alone, PYTHONPATH=str(tmp_path))
    save_file(numpy(moco_state(state)), tmp_path / "net.safetensors")
    torch.save(state, tmp_path / "net.pth")
    out = tmp_path / "out.safetensors"
    status, printed, error = alone("from_torch", tmp_path / "net.safetensors", out)
    assert (status, error) == (0, "")
    for line in (
        "resnet8, no classifier",
        "used 45 tensors",
        "dropped 4 tensors: encoder_q.fc.*",
        "dropped 49 tensors: encoder_k.*",
        "dropped 18 tensors: num_batches_tracked",
        "dropped 1 tensors: queue\n",
        "dropped 1 tensors: queue_ptr\n",
    ):
        assert line in printed
    found = from_torch.load(out)
    same_backbone(found, state)
    assert weights_digest(found.backbone) in printed
    assert alone("from_torch", "--help")[0] == alone("to_torch", "--help")[0] == 0
    out.unlink()
    error = refused("from_torch", tmp_path / "net.pth", out=out, run=alone)
    assert "pip install 'qmx[torch]'" in error and "net.pth" in error


def test_old_torch(small, tmp_path, monkeypatch):
    """torch before 2.10 can be made to run code by a file, and reads none."""
    torch.save(small[1], tmp_path / "net.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(ValueError, match=r"PyTorch 2.10 or newer, and here is 2.9.1.*qmx\[torch\]"):
        read(tmp_path / "net.pth")


# Refusals


@pytest.mark.slow
def test_all_differences_at_once(small, tmp_path):
    """A missing, a renamed and a misshapen tensor in one MoCo file are refused in one line with
    all the names."""
    _, state = small
    tensors, q = moco_state(state), "module.encoder_q."
    del tensors[q + "layer2.0.conv1.weight"]
    tensors[q + "layer3.0.bn2.gain"] = tensors.pop(q + "layer3.0.bn2.weight")
    tensors[q + "conv1.weight"] = torch.zeros(16, 3, 5, 5)
    torch.save(released_file(tensors), tmp_path / "moco.pth.tar")
    out = tmp_path / "out.safetensors"
    error = refused("from_torch", tmp_path / "moco.pth.tar", out=out, run=run_alone)
    assert "moco.pth.tar" in error and "resnet8" in error
    assert f"missing: {q}layer2.0.conv1.weight, {q}layer3.0.bn2.weight;" in error
    assert f"unexpected: {q}layer3.0.bn2.gain (64,);" in error
    assert f"wrong shape: {q}conv1.weight is (16, 3, 5, 5) and should be (16, 3, 3, 3)" in error


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.pop("module.encoder_q.layer2.0.bn1.bias"),
            "missing: module.encoder_q.layer2.0.bn1.bias$",
        ),
        (
            lambda s: s.update({"renamed": s.pop("module.encoder_q.layer2.0.conv2.weight")}),
            r"missing: module.encoder_q.layer2.0.conv2.weight; unexpected: renamed \(32, ",
        ),
        (
            lambda s: s.update({"module.encoder_q.layer1.0.se.fc1.weight": torch.ones(2)}),
            r"unexpected: module.encoder_q.layer1.0.se.fc1.weight \(2,\)$",
        ),
        (
            lambda s: s.update({"module.encoder_q.layer5.0.conv1.weight": torch.ones(2)}),
            r"unexpected: module.encoder_q.layer5.0.conv1.weight \(2,\)$",
        ),
        (
            lambda s: s.update(
                {"module.encoder_q.layer1.0.bn9.num_batches_tracked": torch.ones(())}
            ),
            r"unexpected: module.encoder_q.layer1.0.bn9.num_batches_tracked \(\)$",
        ),
        (
            lambda s: s.update({"module.encoder_q.bn1.weight": torch.ones(16, dtype=torch.int32)}),
            "not floating-point: module.encoder_q.bn1.weight is int32$",
        ),
        (
            lambda s: s["module.encoder_q.bn1.bias"].__setitem__(3, np.nan),
            "not finite in 1 tensors: module.encoder_q.bn1",
        ),
        (
            lambda s: s["module.encoder_q.conv1.weight"].view(-1).__setitem__(3, np.inf),
            "not finite.*q.conv1.weight",
        ),
        (
            lambda s: s["module.encoder_q.bn1.running_var"].__setitem__(0, -1),
            "a variance below zero in 1 .*q.bn1.running_",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if ".layer3.0." in name],
            "missing: .* and 5 more$",
        ),
    ],
)
def test_differences(small, change, message):
    """Nothing in a file is passed over: what is left, lacking, of another type or out of range
    is named."""
    tensors = {name: value.clone() for name, value in moco_state(small[1]).items()}
    change(tensors)
    with pytest.raises(ValueError, match=message) as caught:
        from_torch.convert(numpy(tensors), what="x.pth")
    assert str(caught.value).startswith("x.pth ") and "\n" not in str(caught.value)


def test_classifier_differences(small):
    """Half a classifier, or one of other features, is an error and not a backbone."""
    state = numpy(small[1])
    for change, message in (
        ({"fc.weight": None}, "missing: fc.weight"),
        ({"fc.bias": None}, "missing: fc.bias"),
        ({"fc.weight": np.ones((10, 9), "f")}, r"fc.weight is \(10, 9\) and should be \(10, 64\)"),
        ({"fc.bias": np.ones((), "f")}, "wrong shape"),
    ):
        with pytest.raises(ValueError, match=message):
            from_torch.convert({k: v for k, v in (state | change).items() if v is not None})


def test_many_differences(small):
    """A long list is cut, with the number of the rest."""
    state = numpy(small[1])
    with pytest.raises(
        ValueError, match="unexpected: (conv1.x.. [^ ]*, ){9}conv1.x19 .2,. and 10 more$"
    ):
        from_torch.convert(state | {f"conv1.x{i}": np.ones(2, "f") for i in range(10, 30)})


def test_other_architecture(resnet18):
    """A file of another network than asked for says which it holds; one of none says so."""
    state = numpy(resnet18[1])
    assert from_torch.convert(state).arch == "resnet18"
    with pytest.raises(
        ValueError, match="x.pth holds resnet18 and not resnet50; set arch to resnet18"
    ):
        from_torch.convert(state, "resnet50", what="x.pth")
    with pytest.raises(ValueError, match="holds resnet18 and not resnet18_small"):
        from_torch.convert(state, "resnet18_small")
    with pytest.raises(
        ValueError, match="holds 2 tensors .features.0.bias, .* not those of any network known here"
    ):
        from_torch.convert(
            {"features.0.weight": np.ones((64, 3, 3, 3), "f"), "features.0.bias": np.ones(64, "f")}
        )
    with pytest.raises(ValueError, match="'vgg16' is unknown; choose one of"):
        from_torch.convert({}, "vgg16")


class Payload:
    """A pickle that runs a command as it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


HOSTILE = {
    "zip": lambda path, marker, state: torch.save(
        {"state_dict": {**state, "x": Payload(marker)}}, path
    ),
    "legacy": lambda path, marker, state: legacy(
        {"state_dict": {**state, "x": Payload(marker)}}, path
    ),
    "pickle": lambda path, marker, state: path.write_bytes(pickle.dumps(Payload(marker))),
    "namespace": lambda path, marker, state: torch.save(
        {"state_dict": state, "args": argparse.Namespace(a=1)}, path
    ),
}
DAMAGED = {
    "text": (lambda data: b"Access denied\n" * 30, "is text and not weights"),
    "page": (lambda data: b"<!DOCTYPE html><html></html>", "is a web page and not weights"),
    "pointer": (
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "is a Git LFS pointer",
    ),
    "empty": (lambda data: b"", "is empty"),
    "truncated": (lambda data: data[: len(data) // 2], "damaged|cut short"),
    "stub": (lambda data: data[:100], "damaged|cut short|more than tensors"),
    "image": (
        lambda data: b"\xff\xd8\xff\xe0" + bytes(500),
        "neither a PyTorch file|is not .safetensors",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(small, tmp_path, kind):
    """A file that holds more than tensors is refused in one line, and nothing of it runs."""
    path, marker = tmp_path / "net.pth", tmp_path / "marker"
    HOSTILE[kind](path, marker, small[1])
    error = refused("from_torch", path, out=tmp_path / "out.safetensors")
    assert str(path) in error and "holds more than tensors" in error
    assert {"namespace": "argparse.Namespace", "pickle": "Unsupported operand"}.get(
        kind, "posix.system"
    ) in error
    assert not marker.exists()


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth.tar", "net.safetensors"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files(small, tmp_path, kind, name):
    """A file that is cut short, or something else, is named with what it seems to be."""
    path, (damage, message) = tmp_path / name, DAMAGED[kind]
    if name.endswith("safetensors"):
        save_file(numpy(small[1]), path)
    else:
        torch.save(small[1], path, _use_new_zipfile_serialization=name == "zip.pth")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_command_refuses(small, tmp_path):
    """Usage errors: one line, status 2, no file."""
    out, path = tmp_path / "out.safetensors", tmp_path / "net.safetensors"
    assert "there is no file" in refused("from_torch", tmp_path / "none.pth", out=out)
    save_file(numpy(small[1]), path)
    assert "ends with .safetensors" in refused("from_torch", path, out=tmp_path / "out.bin")
    assert "in a directory that exists" in refused(
        "from_torch", path, out=tmp_path / "none" / "out.safetensors"
    )
    assert "holds resnet8 or resnet8_pool and not resnet50" in refused(
        "from_torch", "--arch=resnet50", path, out=out
    )
    assert "'vgg16' is unknown; choose one of resnet8" in refused(
        "from_torch", "--arch=vgg16", path, out=out
    )
    assert run("from_torch", path, path)[0] == 2 and load_file(path).keys() == small[1].keys()
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    assert "holds no tensors by name, but a list" in refused(
        "from_torch", tmp_path / "list.pth", out=out
    )
    assert "are none that qmx wrote" in refused("to_torch", path, out=out)


# Back


@pytest.mark.slow
def test_round_trip(resnet18, tmp_path):
    """There and back bit for bit, through either command's files; torch loads the result
    strictly."""
    net, state = resnet18
    found = from_torch.convert(numpy(state))
    back = to_torch.to_torch(*whole(found))
    assert back.keys() == state.keys() and all(value.flags.c_contiguous for value in back.values())
    zeroed = {
        name: value * 0 if "num_batches" in name else value for name, value in numpy(state).items()
    }
    assert leaf_digests(back) == leaf_digests(zeroed)
    assert leaf_digests(whole(from_torch.convert(back))) == leaf_digests(whole(found))

    torch.save(state, tmp_path / "net.pth")
    assert (
        run("from_torch", tmp_path / "net.pth", tmp_path / "ours.safetensors", "--arch=resnet18")[0]
        == 0
    )
    loaded = load_weights(tmp_path / "ours.safetensors", whole(found))
    assert weights_digest(loaded) == weights_digest(whole(found))
    for name in ("back.safetensors", "back.pth"):
        assert run("to_torch", tmp_path / "ours.safetensors", tmp_path / name)[::2] == (0, "")
        fresh = reference.Released(ARCHS["resnet18"], 10)
        fresh.load_state_dict(
            {k: torch.from_numpy(v) for k, v in read(tmp_path / name)[""].items()}, strict=True
        )
        x, _ = images(4, 32)
        assert torch.equal(fresh.eval()(x), net(x))


def test_our_own_files(small, tmp_path):
    """What the stages write is read as well: a backbone alone, and one with a classifier."""
    _, state = small
    found = from_torch.convert(numpy(state))
    for tree, head in ((found.backbone, False), (whole(found), True)):
        save_weights(tmp_path / "ours.safetensors", tree)
        again = from_torch.load(tmp_path / "ours.safetensors")
        same_backbone(again, state)
        assert (again.head is not None) == head and again.dropped == ()
    assert weights_digest(again.head) == weights_digest(found.head)
    with pytest.raises(ValueError, match="no torchvision form"):
        to_torch.to_torch(*models.fold(*found.backbone))
    for stray, message in (
        ({"optimizer/x": np.ones(1)}, "x.st: the tensors optimizer/x are none that qmx wrote"),
        ({"params/backbone/conv1/what": np.ones(1)}, "x.st: conv1/what has no place in"),
        ({"params/head/fc_2/bias": np.ones(1, "f")}, r"unexpected: fc.2.bias \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            from_torch.convert(load_file(tmp_path / "ours.safetensors") | stray, what="x.st")


@pytest.mark.slow
def test_standardised_head(resnet18, tmp_path):
    """A classifier that standardises its features becomes one linear layer of the same scores."""
    _, state = resnet18
    found, rng = from_torch.convert(numpy(state)), np.random.default_rng(0)
    net = chain(backbone=models.backbone("resnet18"), head=models.classifier(10, standardize=True))
    stats = {
        "norm": {
            "mean": rng.normal(size=512).astype("f"),
            "var": rng.uniform(1e-6, 2, 512).astype("f"),
        }
    }
    variables = Encoder(
        {"backbone": found.backbone.params, "head": found.head},
        {"backbone": found.backbone.stats, "head": stats},
    )
    x, ours = images(8, 32)
    want = np.asarray(jax.jit(lambda p, s, x: net.apply(p, s, x, False)[0])(*variables, ours))
    save_weights(tmp_path / "student.safetensors", variables)
    assert run("to_torch", tmp_path / "student.safetensors", tmp_path / "net.pth")[0] == 0
    theirs = reference.Released(ARCHS["resnet18"], 10)
    theirs.load_state_dict(
        {k: torch.from_numpy(v) for k, v in read(tmp_path / "net.pth")[""].items()}, strict=True
    )
    np.testing.assert_allclose(
        their_logits(theirs.eval(), x), want, rtol=1e-5, atol=1e-5 * np.abs(want).max()
    )
