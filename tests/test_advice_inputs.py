"""Advice in messages about images, caches and weights, followed: each cure that one names is taken,
and works."""

import csv
import gzip
import json
import re
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference as reference
from PIL import Image
from safetensors.torch import save_file
from test_advice import advice
from test_cache import files, make
from test_data import load
from test_foreign import Nnx, X
from test_originals import write_idx
from test_photos import encoded, tree
from test_read_torch import NAME, ODD
from torch_reference import torch

import qmx
from qmx import detection, embed, models
from qmx.checkpoint import save_weights
from qmx.contract import Encoder
from qmx.data import cache, cached, open_photos
from qmx.data.arrays import arrays, from_arrays, read_npz, trigger_images
from qmx.data.classes import warnings
from qmx.data.originals import BATCHES, IDX
from qmx.data.photos import decode
from qmx.models import from_torch, to_torch
from qmx.models.layout import torch_name
from qmx.models.norm import BatchNorm
from qmx.models.resnet import ARCHS
from qmx.models.vit import VITS
from qmx.models.vit_from_torch import at_size

RNG = np.random.default_rng(0)
STATE = reference.released(ARCHS["resnet8"], 10, side=32).state_dict()


def narrow():
    """Variables of a small backbone, all of them ones."""
    net, image = models.backbone("resnet8_narrow"), jnp.zeros((2, 16, 16, 3))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image))
    return Encoder(*jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes))


def told(pattern, capsys, main, *words):
    """The match of `pattern` in the line that a command ends with, with status 2; a slow one shows
    its progress before."""
    capsys.readouterr()  # what an earlier command has shown
    assert main([str(word) for word in words]) == 2
    *before, line = capsys.readouterr().err.strip().splitlines()
    assert all(shown.endswith(" left") for shown in before), before
    match = re.search(pattern, line)
    assert match, line
    return match


# Caches


@pytest.fixture
def sides(tmp_path):
    """A pool with a space in its name, and an evaluation folder."""
    pool = {f"n{c}/{i}.JPEG": (40 + i, 30 + c) for c in (1, 2) for i in range(6)}
    held = {f"n{c}/v.JPEG": (31, 32 + c) for c in (1, 2)}
    return tree(tmp_path / "my pool", pool), tree(tmp_path / "val", held)


@pytest.fixture
def opened(sides, tmp_path):
    """opened(**keys) -> the data set with a cache of the pool, whose settings are not the usual."""
    make(sides[0], tmp_path / "a cache", quality=70)
    keys = {"canvas": 32, "resize": 30, "crop": 24, "cache": str(tmp_path / "a cache")}
    return lambda **more: load("folder", *sides, **{**keys, **more})


def run_named(text):
    """Run the command of a message as it stands there, in this process alone."""
    words = shlex.split(text)
    assert words[:3] == ["python", "-m", "qmx.data.cache"]
    assert cache.main([*words[3:], "--processes=1"]) == 0


MADE_BY = "(python -m qmx.data.cache .*?)"


@pytest.mark.parametrize("there", [True, False], ids=["shards", "no shards"])
def test_a_cache_that_is_not_finished(opened, tmp_path, there):
    """The command goes on with the shards that are there, whatever their settings; or makes all."""
    folder = tmp_path / "a cache"
    want = files(folder)
    for path in folder.iterdir():
        if path.name == "manifest.json" or not there:
            path.unlink()
    run_named(advice(f"no finished cache in it; run {MADE_BY}$", opened)[1])
    assert (files(folder) == want) == there and opened().pool.size == 12


def test_a_manifest_that_is_damaged(opened, tmp_path):
    """Removed, and made by the command."""
    path = tmp_path / "a cache/manifest.json"
    want = path.read_text()
    path.write_text(want[:50])
    command = advice(f"remove it and run {MADE_BY}$", opened)[1]
    path.unlink()
    run_named(command)
    assert path.read_text() == want and opened().pool.size == 12


@pytest.mark.parametrize("fault", ["cut off", "removed", "damaged"])
def test_a_shard_that_is_damaged(opened, tmp_path, fault):
    """The command writes only this one, as it was."""
    folder = tmp_path / "a cache"
    want = files(folder)
    shard = folder / "shard-00001.array_record"
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    if fault == "removed":
        shard.unlink()
    else:
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] if fault == "cut off" else bytes(len(whole)))
    if fault == "damaged":
        cure = f"^(.*) is damaged, .*; remove it and run {MADE_BY}, which writes only it$"
        found = advice(cure, lambda: opened().pool.all())
        Path(found[1]).unlink()
        command = found[2]
    else:
        command = advice(f"run {MADE_BY}, which writes only these$", opened)[1]
    run_named(command)
    assert files(folder) == want and len(opened().pool.all()["image"]) == 12
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    assert {name for name in times if after[name] != times[name]} == {shard.name}


def test_shards_that_verify_finds(opened, tmp_path):
    """Removed, and made again by the same command."""
    folder = tmp_path / "a cache"
    want = files(folder)
    (folder / "shard-00001.array_record").write_bytes(b"short")
    shard = folder / "shard-00002.array_record"
    shard.write_bytes(bytes(shard.stat().st_size))
    found = advice(
        "damaged: (.*); remove them and make the cache again", cached.verify, str(folder)
    )
    for name in found[1].split(", "):
        (folder / name).unlink()
    make(str(tmp_path / "my pool"), folder, quality=70)
    assert files(folder) == want and "as they were written" in cached.verify(str(folder))


def test_a_cache_of_other_photos(opened, sides, tmp_path):
    """Removed, and made by the command."""
    tree(sides[0], {"n1/more.JPEG": (50, 51)})
    command = advice(f"have changed since; remove it and run {MADE_BY}$", opened)[1]
    shutil.rmtree(tmp_path / "a cache")
    run_named(command)
    assert opened().pool.size == 13


def test_a_cache_of_another_side_or_version(opened, tmp_path):
    """The key that is named, or another cache by the command beside the old one."""
    cures = rf"use data\.(\w+)=(\d+), or run {MADE_BY} and set data\.(\w+)=(.*)$"
    found = advice(cures, opened, canvas=16)
    assert opened(**{found[1]: int(found[2])}).pool.size == 12
    run_named(found[3])
    (there,) = shlex.split(found[5])
    assert opened(canvas=16, **{found[4]: there}).pool.size == 12
    path = tmp_path / "a cache/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}))
    found = advice(rf"run {MADE_BY} and set data\.(\w+)=(.*)$", opened)
    run_named(found[1])
    (there,) = shlex.split(found[3])
    assert opened(**{found[2]: there}).pool.size == 12


def test_a_cache_in_the_pool(sides, tmp_path, capsys):
    words = "--processes=1", "--side=16"
    told("write elsewhere", capsys, cache.main, sides[0], Path(sides[0], "cache"), *words)
    assert cache.main([sides[0], str(tmp_path / "elsewhere"), *words]) == 0


# Photos and arrays


def test_photos_of_one_colour(sides, tmp_path):
    """Scaled to the range of their bits they are read as they are."""
    faint = RNG.integers(0, 100, (30, 30)).astype(np.uint16)
    tree(sides[0], {"n1/faint.png": encoded(Image.fromarray(faint), "PNG")})
    sizes = {"canvas": 16, "resize": 24, "crop": 20}
    (line,) = open_photos(load("folder", *sides, **sizes), tmp_path / "w")
    found = re.search(r"more: (.*); scale their values to the range of (\d+) or (\d+) bits$", line)
    for bits in found.groups()[1:]:
        scaled = (faint / 100 * (2 ** int(bits) - 1)).astype(f"uint{bits}")
        Path(found[1]).write_bytes(encoded(Image.fromarray(scaled), "PNG"))
        assert open_photos(load("folder", *sides, **sizes), tmp_path / f"w{bits}") == []


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_unknown_range(kind):
    """Scaled and saved as is said."""
    values = np.linspace(0, 3000, 20).reshape(4, 5).astype(kind)
    data = encoded(Image.fromarray(values), "TIFF")
    cure = r"pixels, (\S+) .. (\S+), .*scale them to (\d+) .. (\d+) and save them with (\d) bits"
    low, high, first, last, bits = map(float, advice(cure, decode, data, "x").groups())
    scaled = first + (values - low) / (high - low) * (last - first)
    saved = encoded(Image.fromarray(scaled.astype(f"uint{bits:.0f}")), "TIFF")
    assert decode(saved, "x").getextrema() == ((0, 255),) * 3


def test_a_photo_that_is_damaged_as_it_is_read(sides, tmp_path):
    """Left out by a file that holds its name, or repaired; the file is text, one name a line."""
    bad = Path(sides[0], "n1/2.JPEG")
    whole, sizes = bad.read_bytes(), {"canvas": 16, "resize": 24, "crop": 20}
    bad.write_bytes(whole[:200])
    read = load("folder", *sides, **sizes).pool.all
    found = advice(r"repair it, or .* data\.(\w+)=FILE, a text file that holds (.*)$", read)
    names = tmp_path / "names.txt"
    more = {**sizes, found[1]: str(names)}
    advice("give a text file with the name of a photo on each line", load, "folder", *sides, **more)
    names.write_bytes(found[2].encode("utf-16"))
    advice("give a file with the name of a photo on each line", load, "folder", *sides, **more)
    names.write_text(found[2])
    assert len(load("folder", *sides, **more).pool.all()["image"]) == 11
    bad.write_bytes(whole)
    assert len(load("folder", *sides, **sizes).pool.all()["image"]) == 12


def test_names_of_arrays(tmp_path):
    """Those that are named, and no labels by another name."""
    image, label = RNG.integers(0, 256, (6, 8, 8, 1), np.uint8), np.arange(6) % 3
    path = str(tmp_path / "own.npz")
    np.savez(path, x=image, y=label)
    found = advice(r"save (\w+)=uint8\[n, H, W, C\], and (\w+)=int\[n\]", read_npz, path)
    np.savez(path, **{found[1]: image, found[2]: label})
    assert read_npz(path)[1].tolist() == label.tolist()
    np.savez(path, image=image, y=label)
    found = advice(r"name the labels '(\w+)', or save (\w+) alone", read_npz, path)
    for given in ({found[2]: image}, {found[2]: image, found[1]: label}):
        np.savez(path, **given)
        assert len(read_npz(path)[1]) == (len(given) - 1) * 6
    np.savez(path, image=image)
    name = advice(r"save (\w+)=int\[n\], the class of", trigger_images, path, (8, 8, 1), 3)[1]
    np.savez(path, image=image, **{name: label})
    assert trigger_images(path, (8, 8, 1), 3)[1].tolist() == label.tolist()


def test_original_files(tmp_path):
    """Both kinds of folders, or two files; all of them; what is damaged is fetched again."""
    cures = r"neither (\S+).gz .* nor (\S+) .*data\.(\w+)=POOL.npz and data\.(\w+)=EVALUATION"
    found = advice(cures, arrays, str(tmp_path), "")
    assert (found[1], found[2]) == (IDX[0][0], BATCHES[0][0])
    image = RNG.integers(0, 256, (6, 28, 28), np.uint8)
    for side, (images, labels) in zip((image[:4], image[4:]), IDX, strict=True):
        write_idx(tmp_path / images, side, packed=True)
        if images == IDX[0][0]:
            write_idx(tmp_path / labels, np.arange(4, dtype=np.uint8) % 2, packed=True)
    advice("the folder must have all of them", arrays, str(tmp_path), "")
    write_idx(tmp_path / IDX[1][1], np.arange(2, dtype=np.uint8), packed=True)
    path = tmp_path / f"{IDX[1][0]}.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-9], gzip.compress(b"404")):
        path.write_bytes(damaged)
        advice("fetch it again", arrays, str(tmp_path), "")
    path.write_bytes(whole)
    assert arrays(str(tmp_path), "").pool.size == 4
    for key, side in zip(found.groups()[2:], (image[:4], image[4:]), strict=True):
        np.savez(tmp_path / f"{key}.npz", image=side)
    data = load("arrays", **{key: str(tmp_path / f"{key}.npz") for key in found.groups()[2:]})
    assert (data.pool.size, data.evaluation.size) == (4, 2)
    row = bytes(1 + 32 * 32 * 3)
    for number, name in enumerate((*BATCHES[0], *BATCHES[1])):
        (tmp_path / "cifar").mkdir(exist_ok=True)
        (tmp_path / "cifar" / name).write_bytes(row[:-1] + bytes([number]))
    assert arrays(str(tmp_path / "cifar"), "").pool.size == 5


def test_numbers_of_images_and_channels():
    """As many as is said, in the range that is said."""
    known = load("digits", limit=int(advice("or (0) for all", load, "digits", limit=-1)[1]))
    assert known.pool.size == 1437
    for key, least in (("mean", "0"), ("std", "1e-06")):
        cure = rf"data\.{key} .* must be (\d) numbers in (\S+) .. (\d), one a channel"
        found = advice(cure, load, "digits", **{key: (2.0, 0.5)})
        assert found[2] == least
        for number in map(float, found.groups()[1:]):
            data = load("digits", **{key: (number,) * int(found[1])})
            assert getattr(data, key) == (number,)


def test_numbers_of_classes_that_no_image_has(sides):
    """Labels that are the classes' numbers."""
    image = RNG.integers(0, 256, (8, 8, 8, 1), np.uint8)
    held, label = RNG.integers(0, 256, (4, 8, 8, 1), np.uint8), np.arange(8) % 2

    def warned(step):
        return warnings(from_arrays("own", image, label * step, held, label[:4] * step))

    (line,) = warned(3)
    assert re.search(r"no image: 1, 2; is label the number of the class, 0\.\.N-1\?$", line)
    assert warned(1) == []


# Weights of PyTorch


def dense(value):
    """A tensor as the cure says: dense, of float32."""
    if value.is_nested:
        return value.to_padded_tensor(0.0)
    if value.is_quantized:
        return value.dequantize()
    if value.layout != torch.strided:
        value = value.to_dense()
    return (value.real if value.is_complex() else value).resolve_conj().float().contiguous()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(ODD.keys() - {"expanded"}))  # to more than any memory
def test_odd_tensors(tmp_path, name):
    """Loaded in PyTorch and saved dense; or with values, where there are none."""
    path, odd = tmp_path / "net.pth", ODD[name][0](STATE[NAME])
    torch.save({**STATE, NAME: odd}, path)
    cures = "load it in PyTorch and save dense tensors of float32$|save a network with weights$"
    cure = advice(cures, from_torch.read, path)[0]
    state = torch.load(path, weights_only=True)
    state[NAME] = dense(state[NAME]) if "PyTorch" in cure else STATE[NAME]
    torch.save(state, path)
    value = from_torch.read(path)[""][NAME]
    assert value.dtype == np.float32 and value.size


def test_odd_tensors_of_safetensors(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({**STATE, NAME: STATE[NAME].to(torch.float8_e5m2)}, path)
    advice("load it in PyTorch and save dense tensors of float32", from_torch.read, path)
    from safetensors.torch import load_file as load_torch

    save_file({name: dense(value) for name, value in load_torch(path).items()}, path)
    assert from_torch.load(path).arch == "resnet8"


def test_files_with_more_than_weights(tmp_path):
    """The state_dict alone, the unpacked file, the weights in a zip, the file itself."""
    net, path = reference.released(ARCHS["resnet8"], 10, side=32), tmp_path / "net.pth"
    torch.save(net, path)
    advice("save its state_dict alone", from_torch.load, path)
    torch.save(net.state_dict(), path)
    assert from_torch.load(path).arch == "resnet8"
    whole = path.read_bytes()
    torch.save([*net.state_dict().values()], path)
    advice("save a state_dict", from_torch.load, path)
    for damaged, cure in (
        (gzip.compress(whole), "compressed by gzip, and not weights of PyTorch; unpack it$"),
        (whole[: len(whole) // 2], "download it again"),
        (b"", "is empty; download it again"),
        (b"<html>", "download it again"),
        (bytes(500), "download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "fetch the file itself"),
    ):
        path.write_bytes(damaged)
        advice(cure, from_torch.load, path)
        path.write_bytes(gzip.decompress(damaged) if "unpack" in cure else whole)
        assert from_torch.load(path).arch == "resnet8"
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(path, "net.pth")
    inside = advice("a zip of (.*) and .*give the weights in it", from_torch.load, archive.filename)
    with zipfile.ZipFile(archive.filename) as archive:
        assert from_torch.load(archive.extract(inside[1], tmp_path / "out")).arch == "resnet8"


def test_torch_that_is_old(tmp_path, monkeypatch):
    """The file as .safetensors needs none; it is converted where a newer one is."""
    torch.save(STATE, tmp_path / "net.pth")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.9.1")
        cure = r"convert the file to (\.\w+) elsewhere"
        end = advice(cure, from_torch.load, tmp_path / "net.pth")[1]
    path = tmp_path / f"net{end}"
    save_file(torch.load(tmp_path / "net.pth", weights_only=True), path)
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert from_torch.load(path).arch == "resnet8"


def test_networks_of_a_file(tmp_path):
    """One classifier, one of two equal names, the architecture that the file holds."""
    state = {name: value.numpy() for name, value in STATE.items()}
    convert = from_torch.convert
    others = {f"head.{end}": state[f"fc.{end}"] for end in ("weight", "bias")}
    found = advice("classifiers: (.*); save the network with one of them", convert, state | others)
    for dropped in found[1].split(", "):
        layer = dropped.rpartition(".")[0]
        one = {name: x for name, x in (state | others).items() if not name.startswith(layer)}
        assert convert(one).head is not None
    found = advice(
        r"^\S+ \S+ (\S+) and (\S+) are both .*save the weights of one",
        convert,
        state | {"module.conv1.weight": state["conv1.weight"]},
        what="the file",
    )
    assert convert({**state, found[1]: state["conv1.weight"]}).arch == "resnet8"
    kinds = advice("its last part should be one of (.*)$", torch_name, "conv1/weights")[1]
    for kind in kinds.split(", "):
        assert torch_name(f"conv1/{kind}").startswith("conv1.")
    arch = advice(r"set arch to (\w+), or give another file", convert, state, "resnet50")[1]
    assert convert(state, arch).arch == arch
    for known in advice("choose one of (.*)$", convert, state, "vgg16")[1].split(", "):
        assert known in models.NETWORKS
    state["bn1.running_var"] = -state["bn1.running_var"]
    advice("download or train it again", convert, state)
    assert convert(state | {"bn1.running_var": STATE["bn1.running_var"].numpy()}).head


def test_a_stem_that_shapes_do_not_tell(tmp_path, capsys):
    """The architecture, in the function and as the command's flag."""
    net = reference.released(ARCHS["resnet18_small"], 10, side=32)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    words = tmp_path / "net.safetensors", tmp_path / "out.safetensors"
    found = told(r"as in (arch)=(\w+) \((\S+)\)$", capsys, from_torch.main, *words)
    assert from_torch.load(words[0], **{found[1]: found[2]}).arch == found[2]
    assert from_torch.main([*map(str, words), found[3]]) == 0


def test_places_to_write_to(tmp_path, capsys, monkeypatch):
    """Each command's ends, in a directory that is there; another name than the source's."""
    path, image = tmp_path / "net.safetensors", np.zeros((30, 30, 3), np.uint8)
    save_file(STATE, path)
    cure = "give a name that ends with (.*?),? in a directory that exists"
    for out in (tmp_path / "a.bin", tmp_path / "none/a.safetensors"):
        end = told(cure, capsys, from_torch.main, path, out)[1]
    told("give another name to write to", capsys, from_torch.main, path, path)
    made = tmp_path / f"out{end}"
    assert from_torch.main([str(path), str(made)]) == 0
    for end in told(cure, capsys, to_torch.main, made, tmp_path / "a.bin")[1].split(" or "):
        back = tmp_path / f"back{end}"
        assert to_torch.main([str(made), str(back), "--anyway"]) == 0
        assert from_torch.load(back).arch == "resnet8"
    told("give an encoder, a target or a student", capsys, to_torch.main, path, back)
    encoder = narrow()
    numbers = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    qmx.save_encoder(made, "resnet8_narrow", encoder, shape=(16, 16, 3), **numbers)
    (tmp_path / "photos").mkdir()
    Image.fromarray(image).save(tmp_path / "photos/a.png")
    words = made, tmp_path / "photos"
    ends = told(cure, capsys, embed.main, *words, tmp_path / "f.txt")[1].split(", ")
    assert len(ends) == 3
    for end in ends:
        assert embed.main([*map(str, words), str(tmp_path / f"f{end}")]) == 0
    with open(tmp_path / "f.csv") as lines:
        assert next(csv.reader(lines))[0] == "a.png"
    save_weights(tmp_path / "bare.safetensors", encoder)
    bare = tmp_path / "bare.safetensors", words[1], tmp_path / "g.npz"
    told("give one that qmx wrote", capsys, embed.main, *bare)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    cure = told(
        r"needs (\w+): pip install (\w+)$", capsys, embed.main, *words, tmp_path / "g.parquet"
    )
    monkeypatch.undo()
    assert (
        cure[1] == cure[2] == "pyarrow"
        and embed.main([*map(str, words), str(tmp_path / "g.parquet")]) == 0
    )


# Networks and encoders of ours


def test_files_that_load_encoder_does_not_take(tmp_path):
    """One that qmx wrote; a head by the function that is named; numbers for each channel."""
    encoder, path = narrow(), tmp_path / "own.safetensors"
    save_weights(path, encoder)
    advice("give one that qmx wrote", qmx.load_encoder, path)
    save = qmx.save_encoder
    keywords = {"shape": (16, 16, 3), "mean": (0.5,), "std": (0.2,) * 3}
    cure = r"images have (\d) channels, .* give one for each"
    number = advice(cure, save, path, "resnet8_narrow", encoder, **keywords)[1]
    save(path, "resnet8_narrow", encoder, **{**keywords, "mean": (0.5,) * int(number)})
    assert qmx.load_encoder(path).shape == (16, 16, 3)
    for name in advice("choose one of (.*)$", models.backbone, "resnet9")[1].split(", "):
        models.backbone(name)
    rate = advice(r"set it to (\d) for", models.backbone, "resnet8", drop_path=0.1)[1]
    models.backbone("resnet8", drop_path=float(rate))


def test_norms_and_patches():
    """Batches, groups and sizes that fit; variables that are not folded yet."""
    norm = BatchNorm(groups=4)
    images = jnp.ones((6, 1, 1, 2))
    variables = norm.init(jax.random.key(0), images, False)

    def train(x, groups):
        return BatchNorm(groups=groups).apply(variables, x, True, mutable=["batch_stats"])

    number = int(advice(r"into (\d) groups .*make the batch a multiple of it", train, images, 4)[1])
    train(jnp.ones((2 * number, 1, 1, 2)), 4)
    advice("use fewer groups or a larger batch", train, images, 6)
    train(images, 3), train(jnp.ones((12, 1, 1, 2)), 6)

    params, stats = narrow()
    folded = models.fold(params, stats)
    advice("give the variables of a backbone that is not folded yet", models.fold, *folded)
    models.fold(params, stats)
    advice("give those of a backbone, or", to_torch.to_torch, {"backbone": params, "x": {}}, stats)
    to_torch.to_torch(params, stats)

    name = "vit_s16"
    vit = models.backbone(name)

    def shape(side):
        start = jax.eval_shape(lambda: vit.init(jax.random.key(0), jnp.zeros((1, *side, 3))))
        return Encoder(*start)

    sides = advice(r"show them at (\d+) x (\d+)$", shape, (70, 40))
    shape(tuple(map(int, sides.groups())))
    near = advice(r"; (\d+) and (\d+) are$", at_size, Encoder({}, {}), VITS[name], 70)
    for side in near.groups():
        at_size(Encoder({}, {}), VITS[name], int(side))


def test_a_module_that_draws():
    """With the key that is asked for."""
    net = qmx.from_nnx(lambda rngs: Nnx(rngs, 0.5))
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), X))

    def scores(**more):
        return jax.eval_shape(lambda *v: net.apply(*v, X, True, **more)[0], *variables)

    key = advice(r"give apply a key, as (\w+)=", scores)[1]
    assert scores(**{key: jax.random.key(1)}).shape == (6, 3)


# Detectors


def test_detectors_with_too_little():
    """As many images, permutations or as large an alpha as is said."""
    features, classes = RNG.normal(size=(400, 4)).astype(np.float32), RNG.integers(0, 2, 400)
    keywords = {"window": 20, "orders": 1}

    def watch(count, **more):
        rows = features[:count], classes[:count]
        return detection.watch(features[:60], classes[:60], *rows, **{**keywords, **more})

    number = int(advice(r"are too few; (\d+) are needed", watch, 39)[1])
    assert len(watch(number)) == 2
    cures = r"needs permutations above (\d+), or must itself be above (\S+)$"
    found = advice(cures, watch, 100, alpha=0.001)
    assert len(watch(100, alpha=float(found[2]) * 1.01)) == 2
    some, more = features[:40], {"window": 20, "alpha": 0.001}
    detection.mmd(some, features[60:90], **more, permutations=int(found[1]) + 1)
    advice("both need two", detection.mmd, some, features[:1], window=20)
    detection.mmd(some, features[:2], window=20)
