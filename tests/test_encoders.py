"""Files of encoders, targets and students that say how they are used."""

import csv
import os
import shutil
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY
from PIL import Image

import qmx
from qmx import models
from qmx.checkpoint import save_weights
from qmx.embed import found, main
from qmx.stages.pretrain import Pretrained

FACTS = {
    **{"qmx": "0", "method": "moco", "arch": "resnet8_narrow", "dtype": "float32"},
    **{"shape": (16, 16, 3), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "resize": 20},
    "size": 0,
    **{"classes": 0, "class_names": (), "standardize": False},
}


def made(net):
    """Its variables at first."""
    return qmx.Encoder(*net.init(jax.random.key(0), jnp.zeros((2, 16, 16, 3))))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """(a file with an encoder, its variables)."""
    encoder = made(models.backbone("resnet8_narrow"))
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_weights(path, encoder, FACTS)
    return path, encoder


def photos(folder, count=5):
    """JPEGs of several sizes, in folders of any depth."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "a/b" / f"{i}.jpg" if i % 2 else folder / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (30 + i, 40 - i)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path, "JPEG")


def test_an_encoder_by_its_file(file):
    """Its features are those from before; the file is for others to read."""
    path, encoder = file
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    net = models.backbone("resnet8_narrow")
    view = qmx.augment.plain_view(FACTS["mean"], FACTS["std"])
    before = qmx.predict(net, *encoder, view, images)
    read = qmx.load_encoder(str(path))
    np.testing.assert_array_equal(qmx.encode(read, images), before)
    assert read.shape == (16, 16, 3) and read.facts["method"] == "moco"
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444
    with pytest.raises(ValueError, match=r"takes uint8\[n, 16, 16, 3\]"):
        qmx.encode(read, images[:, :8])


def test_files_that_are_none(file, tmp_path):
    """One line that names the file."""
    path, encoder = file
    save_weights(tmp_path / "bare.safetensors", encoder)
    save_weights(tmp_path / "other.safetensors", encoder, {**FACTS, "arch": "resnet8"})
    (tmp_path / "text.safetensors").write_text("no")
    cut = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(cut[: len(cut) // 2])
    for name, message in (
        ("bare", "does not say what network it is of"),
        ("other", "is of another network: .*conv1"),
        ("text", "is no safetensors file"),
        ("cut", "is no safetensors file, or is damaged"),
        ("missing", "no such file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            qmx.load_encoder(tmp_path / f"{name}.safetensors")
        assert name in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("classes", [0, 5], ids=["backbone", "classifier"])
def test_save_encoder(tmp_path, classes):
    """A network of one's own training comes back as it was, with what its use takes."""
    net = models.backbone("resnet8_narrow")
    if classes:
        net = qmx.chain(backbone=net, head=models.classifier(classes))
    mean, std = np.array([0.5, 0.4, 0.3]), (0.2, 0.25, 0.3)
    encoder = made(net)
    keywords = {"shape": (16, 16, 3), "mean": mean, "std": std, "classes": classes}
    path = tmp_path / "own.safetensors"
    qmx.save_encoder(str(path), "resnet8_narrow", encoder, method="my own", **keywords)
    read = qmx.load_encoder(path)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    before = qmx.predict(net, *encoder, qmx.augment.plain_view(mean, std), images)
    np.testing.assert_array_equal(qmx.encode(read, images), before)
    assert before.shape == (5, classes or 32)
    assert read.facts["method"] == "my own" and read.facts["dtype"] == "float32"


def test_save_encoder_refuses(file, tmp_path):
    """A file that could not be read again is not written."""
    _, encoder = file
    path = tmp_path / "none.safetensors"
    keywords = {"shape": (16, 16, 3), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    for arch, changes, message in (
        ("resnet8", {}, "the encoder is of another network: .*conv1"),
        ("resnet8_narrow", {"classes": 5}, "the encoder is of another network: .*head"),
        ("resnet9", {}, "network 'resnet9' is unknown"),
        ("resnet8_narrow", {"mean": (0.5,)}, "images have 3 channels, mean 1 and std 3"),
    ):
        with pytest.raises(ValueError, match=message):
            qmx.save_encoder(path, arch, encoder, **{**keywords, **changes})
        assert not path.exists()


@pytest.mark.slow
def test_what_a_run_leaves(finished, command, tmp_path):
    """Encoder, target and student of a run can be used without the run; --stage=pretrain says
    where the encoders are."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, 1), np.uint8)
    for path, width in (
        ("pretrain/moco-seed0/encoder", 8),
        ("target/target", 10),
        ("distill/moco-random-logits-asked-71-seed0/student", 10),
    ):
        loaded = qmx.load_encoder(finished / f"{path}.safetensors")
        assert qmx.encode(loaded, images).shape == (3, width), path
    shutil.copytree(finished, tmp_path / "w")
    status, out, _ = command(*TINY, f"--workdir={tmp_path}/w", "--stage=pretrain")
    lines = out.splitlines()
    assert status == 0 and str(tmp_path / "w/pretrain/moco-seed0/encoder.safetensors") in lines
    assert Pretrained("moco", 0, tmp_path, {}).name == "moco-seed0"


def test_embed(file, tmp_path, capsys):
    """The three formats have the same figures, those of the photos as evaluations see them; what
    cannot be read is named and left out."""
    path, _ = file
    photos(tmp_path / "photos")
    (tmp_path / "photos/cut.jpg").write_bytes((tmp_path / "photos/0.JPEG").read_bytes()[:300])
    (tmp_path / "photos/.hidden.jpg").write_bytes(b"x")
    (tmp_path / "photos/readme.txt").write_text("no photo")
    for name in ("f.npz", "f.csv", "f.parquet"):
        assert main([str(path), str(tmp_path / "photos"), str(tmp_path / name)]) == 0
        said = capsys.readouterr()
        assert "left out: " in said.err and "cut.jpg" in said.err
        assert f"wrote 5 x 32 features to {tmp_path / name}" in said.out
    with np.load(tmp_path / "f.npz") as data:
        names, rows = data["names"].tolist(), data["features"]
    assert names == ["0.JPEG", "2.JPEG", "4.JPEG", "a/b/1.jpg", "a/b/3.jpg"]
    loaded = qmx.load_encoder(path)
    one = qmx.data.photos.shown(Image.open(tmp_path / "photos/a/b/3.jpg"), 20, 16)
    np.testing.assert_allclose(qmx.encode(loaded, one[None])[0], rows[4], rtol=1e-5, atol=1e-5)
    with open(tmp_path / "f.csv") as lines:
        table = list(csv.reader(lines))
    assert [row[0] for row in table] == names
    np.testing.assert_array_equal(np.array([row[1:] for row in table], np.float32), rows)
    import pyarrow.parquet as pq

    read = pq.read_table(tmp_path / "f.parquet")
    assert read["name"].to_pylist() == names
    np.testing.assert_array_equal(np.array(read["features"].to_pylist(), np.float32), rows)


def test_embed_follows_links(file, tmp_path, capsys):
    """Class folders that are links have photos too; a link to a folder above ends nothing. A name
    that no text holds is told before anything is computed."""
    photos(tmp_path / "real")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat").symlink_to(tmp_path / "real")
    (tmp_path / "real/again").symlink_to(tmp_path / "real")
    assert [path.name for path in found(tmp_path / "photos")][:3] == ["0.JPEG", "2.JPEG", "4.JPEG"]
    assert len(found(tmp_path / "photos")) == 5
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / "real" / name).write_bytes((tmp_path / "real/0.JPEG").read_bytes())
    for out, status in (("g.csv", 2), ("g.parquet", 2), ("g.npz", 0)):
        assert main([str(file[0]), str(tmp_path / "photos"), str(tmp_path / out)]) == status
    said = capsys.readouterr().err
    assert said.count("or write .npz") == 2


def test_save_encoder_of_a_vit(tmp_path):
    """The features that it was trained on are those that are read."""
    net = models.backbone("vit_s16", features="mean")
    x = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), x))
    rng = np.random.default_rng(0)
    encoder = qmx.Encoder(
        *jax.tree.map(lambda s: 0.1 * rng.normal(size=s.shape).astype(s.dtype), shapes)
    )
    keys = {"shape": (32, 32, 3), "mean": (0.5,) * 3, "std": (0.5,) * 3, "features": "mean"}
    qmx.save_encoder(tmp_path / "v.safetensors", "vit_s16", encoder, **keys)
    images = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    view = qmx.augment.plain_view(keys["mean"], keys["std"])
    before = qmx.predict(net, *encoder, view, images)
    np.testing.assert_array_equal(
        qmx.encode(qmx.load_encoder(tmp_path / "v.safetensors"), images), before
    )


def test_embed_mistakes(file, tmp_path, capsys):
    path, _ = file
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([path, tmp_path / "empty", tmp_path / "f.npz"], "empty: no photo is in it"),
        ([path, tmp_path / "empty", tmp_path / "f.txt"], "ends with .npz, .parquet, .csv"),
        ([tmp_path / "none", tmp_path / "empty", tmp_path / "f.npz"], "none: no such file"),
    ):
        assert main([str(word) for word in words]) == 2
        assert message in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "qmx.embed", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "as those were that it was trained on" in done.stdout
