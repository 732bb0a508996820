"""The shipped configs, as their users run them: on a folder of photos, on an npz, with weights from
PyTorch."""

import json
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ONE_BLOCK, table
from ml_collections import FrozenConfigDict
from PIL import Image
from safetensors.numpy import load_file
from torch_reference import released

from qmx.checks import check_values
from qmx.grid import Cell, attacks, cells, recipe_name, recipe_of
from qmx.main import load_file as load_config
from qmx.models.resnet import ARCHS

CLASSES = ("n01440764", "n02102040", "n03000684")


def write_photos(root, per_class, seed):
    """A folder in the ImageNet layout, of photos of several sizes; each class has its own
    colour."""
    rng = np.random.default_rng(seed)
    for number, wnid in enumerate(CLASSES):
        (root / wnid).mkdir(parents=True)
        for i in range(per_class):
            height, width = rng.integers(40, 90, 2)
            pixels = rng.integers(0, 120, (height, width, 3))
            pixels[..., number] += 120
            image = Image.fromarray(pixels.astype(np.uint8))
            (image.convert("L") if i == 1 else image).save(root / wnid / f"{wnid}_{seed}{i}.JPEG")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The flags of a pool of 120 photos and an evaluation set of 30."""
    root = tmp_path_factory.mktemp("photos")
    return [
        f"--config.data.path={write_photos(root / 'train', 40, 1)}",
        f"--config.data.eval_path={write_photos(root / 'val', 10, 2)}",
    ]


# Half the side of the tiny form, for its time.
HALF = [
    "--config.data.resize=18",
    "--config.data.crop=16",
    "--config.weak_view.size=16",
    "--config.strong_view.size=16",
]


@pytest.fixture(scope="module")
def imagenet(photos, command, tmp_path_factory):
    """The workdir of imagenet.py:tiny."""
    workdir = tmp_path_factory.mktemp("runs") / "imagenet"
    status, out, err = command(
        "--config=configs/imagenet.py:tiny",
        *photos,
        *ONE_BLOCK,
        *HALF,
        f"--workdir={workdir}",
        "--config.inits=('none','moco')",
        "--config.also=('moco+fixmatch',)",
        "--config.fixmatch.epochs=1",
        "--config.fixmatch.mu=2",
    )
    assert status == 0, err
    return workdir


@pytest.mark.slow
def test_imagenet_tiny(imagenet):
    """Target, pretraining, query, distillation and report from a folder of JPEGs; each cell by its
    own recipe."""
    results = json.loads((imagenet / "results.json").read_text())
    assert (
        results["pool"]["size"] == 96
        and results["pool"]["evaluation"] == 30
        and results["pool"]["classes"] == 3
    )
    assert {
        (row["init"], row["fraction"], row["recipe"])
        for row in results["rows"]
        if row["use"] == "asked"
    } == {
        (init, fraction, recipe + ending)
        for fraction, ending in ((0.1, "_10"), (1.0, "_100"))
        for init, recipe in (("none", "scratch"), ("moco", "tune"))
    }
    assert len(results["rows"]) == 6 and results["rows"][2]["use"] == "fixmatch"
    assert results["account"]["purposes"] == {"train": 96, "select": 0, "report": 30}
    assert "recipes of their own" in (imagenet / "report.md").read_text()


@pytest.mark.slow
def test_a_cache_gives_the_same_target_and_answers(imagenet, photos, command, tmp_path):
    """Training reads the cache; what the target is asked about comes from the photos, so that its
    answers are equal."""
    path = photos[0].partition("path=")[2]
    made = subprocess.run(
        [sys.executable, "-m", "qmx.data.cache", path, str(tmp_path / "cache"), "--side=40"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    shutil.copytree(imagenet, tmp_path / "w")
    status, _, err = command(
        "--config=configs/imagenet.py:tiny",
        *photos,
        *ONE_BLOCK,
        *HALF,
        f"--workdir={tmp_path}/w",
        "--update",
        f"--config.data.cache={tmp_path}/cache",
        "--config.inits=('none',)",
        "--config.also=('none+fixmatch',)",
        "--config.fixmatch.epochs=1",
    )
    assert status == 0, err
    # Another target was trained, on the cache's pixels, and asked about the same images.
    assert table(tmp_path / "w")["account"]["purposes"] == table(imagenet)["account"]["purposes"]


@pytest.mark.slow
def test_cifar10_tiny(command, tmp_path):
    """The same from npz files of CIFAR's shape."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 200), ("test", 100)):
        images = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", image=images, label=np.arange(n) % 10)
    status, out, err = command(
        "--config=configs/cifar10.py:tiny",
        f"--config.data.path={tmp_path}/train.npz",
        f"--config.data.eval_path={tmp_path}/test.npz",
        *ONE_BLOCK,
        f"--workdir={tmp_path}/w",
        "--config.data.limit=192",
        "--config.monitor.linear=True",
        "--config.monitor.probe.epochs=1",
        "--config.monitor.probe.optimizer=lars",
        "--config.monitor.probe.batch_size=64",
        "--config.inits=('none','moco')",
    )
    assert status == 0, err
    results = json.loads((tmp_path / "w/results.json").read_text())
    assert results["pool"]["size"] == 192 and len(results["rows"]) == 6
    (monitor,) = results["monitors"]
    assert monitor["knn_k"] == 20 and 0 <= monitor["linear_top1"] <= 100
    assert "linear probe" in (tmp_path / "w/report.md").read_text()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Released files as their authors' code writes them: a target, and a MoCo v2 checkpoint, both
    ResNet-8."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(released(ARCHS["resnet8"], classes=3).state_dict(), folder / "target.pth")
    encoder = {
        name: value
        for name, value in released(ARCHS["resnet8"], seed=1).state_dict().items()
        if not name.startswith("fc.")
    }
    state = {
        f"module.encoder_{branch}.{name}": value
        for branch in "qk"
        for name, value in encoder.items()
    }
    for branch in "qk":
        for layer, rows in (("0", 64), ("2", 128)):
            state[f"module.encoder_{branch}.fc.{layer}.weight"] = torch.randn(rows, 64)
            state[f"module.encoder_{branch}.fc.{layer}.bias"] = torch.randn(rows)
    state |= {
        "module.queue": torch.randn(128, 64),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    torch.save(
        {"epoch": 200, "arch": "resnet8", "state_dict": state, "optimizer": {}},
        folder / "moco.pth.tar",
    )
    return folder


TORCH = [
    "--config=configs/imagenet.py:tiny,none,moco",
    "--config.student.arch=resnet8",
    *HALF,
    "--config.data.limit=32",
    "--config.fractions=(1.0,)",
    "--config.target.kind=torch",
    "--config.target.arch=resnet8",
]


@pytest.mark.slow
def test_pytorch_target_and_encoder(photos, weights, command, tmp_path):
    """A target and an init from PyTorch's files by one line each; their answers are PyTorch's, the
    encoder is the file's to the bit; the accuracy that was promised and is not there is warned of,
    in the report too.
    """
    status, out, err = command(
        *TORCH,
        *photos,
        f"--config.target.path={weights}/target.pth",
        f"--workdir={tmp_path}/w",
        f"--config.pretrain.moco.path={weights}/moco.pth.tar",
        "--config.target.expect=(99,99)",
    )
    assert status == 0, err
    assert "pretrain moco" not in err, "nothing was pretrained"
    assert (
        "the config expects 99 / 99" in err
        and "expects 99 / 99" in (tmp_path / "w/report.md").read_text()
    )
    results = json.loads((tmp_path / "w/results.json").read_text())
    assert (
        results["target"]["name"] == "resnet8 from target.pth"
        and results["target"]["precision"] == "float32"
    )

    encoder = load_file(tmp_path / "w/pretrain/moco/encoder.safetensors")
    theirs = torch.load(weights / "moco.pth.tar", weights_only=True)["state_dict"][
        "module.encoder_q.conv1.weight"
    ]
    np.testing.assert_array_equal(
        encoder["params/conv1/kernel"], theirs.numpy().transpose(2, 3, 1, 0)
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--config.target.path={weights}/target.pth", "--config.target.arch=resnet50"],
            ("resnet8", "resnet50"),
        ),
        (["--config.target.path={weights}/text.pth"], ("text.pth",)),
        (["--config.target.path={weights}/cut.pth"], ("cut.pth",)),
        (["--config.target.path={weights}/no.pth"], ("no.pth", "no such file")),
        (["--config.target.path={weights}/ten.pth"], ("10 classes", "3")),
        (["--config.target.path={weights}/moco.pth.tar"], ("without a classifier",)),
        (
            [
                "--config.target.path={weights}/target.pth",
                "--config.pretrain.moco.path={weights}/damaged.pth.tar",
            ],
            ("layer1.0.conv1.weight", "layer2.0.conv2.weight", "layer3.0.conv1.weight", "renamed"),
        ),
        ([], ("--config.target.path",)),
    ],
)
def test_wrong_weights(photos, weights, command, tmp_path, flags, words):
    """Status 2 and one line that names what is wrong, before anything is trained."""
    if not (weights / "cut.pth").exists():
        (weights / "text.pth").write_text("<!doctype html><title>404</title>")
        whole = (weights / "target.pth").read_bytes()
        (weights / "cut.pth").write_bytes(whole[: len(whole) // 2])
        torch.save(released(ARCHS["resnet8"], classes=10).state_dict(), weights / "ten.pth")
        file = torch.load(weights / "moco.pth.tar", weights_only=True)
        state, prefix = file["state_dict"], "module.encoder_q."
        del state[prefix + "layer1.0.conv1.weight"]
        state["module.encoder_q.renamed"] = state.pop(prefix + "layer2.0.conv2.weight")
        state[prefix + "layer3.0.conv1.weight"] = torch.zeros(7, 7, 3, 3)
        torch.save(file, weights / "damaged.pth.tar")
    flags = [flag.format(weights=weights) for flag in flags]
    status, out, err = command(*TORCH, *photos, *flags, f"--workdir={tmp_path}/w")
    assert status == 2 and not out, err
    last = err.splitlines()[-1]
    assert "Traceback" not in err and all(word in last for word in words), err
    assert len(err.splitlines()) == 1 and not (tmp_path / "w").exists()


def test_recipes_of_the_table():
    """The protocol of every cell: epochs, rates of backbone and classifier, decay, milestones
    (protocols of the predecessor's code, PCL and pytorch/examples)."""
    config = FrozenConfigDict(load_config("configs/imagenet.py"))
    found = {}
    for cell in cells(config, 1_281_167):
        keys = recipe_of(config, cell)
        found[cell.init, cell.fraction] = (
            keys.epochs,
            keys.learning_rate,
            keys.head_learning_rate,
            keys.weight_decay,
            keys.milestones,
            keys.factor,
            keys.warmup_epochs,
            any(keys.jitter),
        )
    for init in ("rotation", "simsiam"):  # as MoCo's
        assert all(found[init, share] == found["moco", share] for share in (0.01, 0.1, 1.0))
    assert {key: numbers for key, numbers in found.items() if key[0] in ("none", "moco")} == {
        ("none", 0.01): (1000, 0.01, 0.01, 1e-2, (700, 800, 900), 0.1, 10, True),
        ("none", 0.1): (200, 0.1, 0.1, 1e-3, (140, 160, 180), 0.1, 5, True),
        ("none", 1.0): (90, 0.1, 0.1, 1e-4, (30, 60), 0.1, 0, True),
        ("moco", 0.01): (20, 0.01, 1.0, 5e-4, (12, 16), 0.2, 0, False),
        ("moco", 0.1): (20, 0.01, 0.1, 5e-4, (12, 16), 0.2, 0, False),
        ("moco", 1.0): (90, 0.1, 0.1, 1e-4, (30, 60), 0.1, 0, False),
    }
    best = FrozenConfigDict(load_config("configs/imagenet.py:best"))
    assert (
        recipe_of(best, Cell("none", "random", "logits", "asked", 12_811, 0.01, 0)).weight_decay_on
        == "kernels"
    )
    assert recipe_of(
        best, Cell("simsiam", "random", "logits", "asked", 12_811, 0.01, 0)
    ).standardize
    assert load_config("configs/imagenet.py:moco800").pretrain.moco.epochs == 800
    assert load_config("configs/imagenet.py:moco,best").inits == ("moco",)


def test_pretraining_protocols():
    """Epochs, batch, rate, schedule and the methods' own numbers, as the references have them."""
    pretrain = load_config("configs/imagenet.py").pretrain

    def of(name, *keys):
        return tuple(pretrain[name][key] for key in keys)

    common = (
        "epochs",
        "batch_size",
        "learning_rate",
        "schedule",
        "momentum",
        "weight_decay",
        "warmup_epochs",
    )
    assert of("moco", *common, "queue_size", "decay", "temperature", "features", "group_size") == (
        200,
        256,
        0.03,
        "cosine_by_epoch",
        0.9,
        1e-4,
        0,
        65536,
        0.999,
        0.2,
        128,
        32,
    )
    assert of("simsiam", *common, "features", "layers", "hidden", "fix_predictor_rate") == (
        100,
        512,
        0.1,
        "cosine_by_epoch",
        0.9,
        1e-4,
        0,
        2048,
        3,
        512,
        True,
    )
    assert of("rotation", *common, "milestones", "factor", "warmup_start") == (
        70,
        128,
        0.2,
        "step",
        0.9,
        1e-4,
        5,
        (30, 50),
        0.1,
        0.1,
    )
    cifar = load_config("configs/cifar10.py").pretrain
    assert (
        cifar.moco.epochs,
        cifar.moco.batch_size,
        cifar.moco.learning_rate,
        cifar.moco.queue_size,
        cifar.moco.decay,
        cifar.moco.temperature,
        cifar.moco.head,
        cifar.moco.batch_size // cifar.moco.group_size,
    ) == (200, 512, 0.06, 4096, 0.99, 0.1, "linear", 8)


def test_recipes_by_number():
    """A budget given as a number has the recipe of its share: 12,811 and 128,116 are the published
    1 % and 10 %."""
    shares, numbers = (load_config("configs/imagenet.py:none,moco") for _ in range(2))
    numbers.fractions, numbers.queries = (), (1_281_167, 12_811, 128_116)
    by_share, by_number = (
        [(cell.init, cell.queries, recipe_name(config, cell)) for cell in cells(config, 1_281_167)]
        for config in (shares, numbers)
    )
    assert (
        by_share
        == by_number
        == [
            (init, queries, recipe + ending)
            for queries, ending in ((12_811, "_1"), (128_116, "_10"), (1_281_167, "_100"))
            for init, recipe in (("none", "scratch"), ("moco", "tune"))
        ]
    )


@pytest.mark.parametrize("name, pool", [("fashion_mnist", 60_000), ("cifar10", 50_000)])
def test_laptops_are_fair(name, pool):
    """Students of a budget differ in their start and its rate alone: as many steps and images."""
    config = load_config(f"{name}:laptop")
    check_values(config)
    budgets = {cell.queries for cell in cells(config, pool)}
    assert budgets == set(config.queries) and {50, 100, 250} <= budgets
    for cell in cells(config, pool):
        ours, scratch = (
            recipe_of(config, one).to_dict() for one in (cell, cell._replace(init="none"))
        )
        differ = {key for key in ours if ours[key] != scratch[key]}
        assert differ <= {"inits", "head_learning_rate"}
        assert ours["min_steps"] == (1200 if cell.queries > 250 else 600)
    with pytest.raises(ValueError, match="gpu"):
        load_config("fashion_mnist:gpu")


def test_dinov2(command, photos, tmp_path):
    """The rows of the second table; every column has its control; without weights it says which key
    takes them, and a method beside it keeps its recipes."""
    config = load_config("configs/imagenet.py:dinov2")
    grid = cells(config, 1_281_167)
    assert [cell.queries for cell in grid[::12]] == [1000, 5000, 12_811, 128_116, 1_281_167]
    assert {cell.use for cell in grid} == {"head"} and len(grid) == 60
    assert {(cell.select, cell.access) for cell in grid} == {
        (select, access)
        for select in ("random", "class_balanced")
        for access in ("logits", "true_labels")
    }
    assert {column.access for column in attacks(config)} == {"logits"}
    check_values(config)
    both = load_config("configs/imagenet.py:dinov2,moco")
    recipes = {recipe_name(both, cell) for cell in cells(both, 1_281_167) if cell.init == "moco"}
    assert recipes == {"tune_1", "tune_10", "tune_100"}
    status, _, err = command(
        "--config=configs/imagenet.py:dinov2,tiny", *photos, f"--workdir={tmp_path}/w"
    )
    assert status == 2 and "--config.pretrain.dinov2.path" in err and not (tmp_path / "w").exists()


def test_recipes_must_not_overlap():
    """Each cell has one recipe, or the default one."""
    config = load_config("configs/imagenet.py")
    cell = Cell("moco", "random", "logits", "asked", 71, 71 / 1437, 0)
    assert recipe_name(config, cell) == "tune_10"
    assert recipe_name(config, cell._replace(init="imported")) == "tune_10"
    config.recipes.tune_1.up_to = 0.1
    with pytest.raises(
        ValueError, match="tune_1 and tune_10 both claim init moco at 71 queries, a share of 0.049"
    ):
        recipe_name(config, cell)
    config.recipes.tune_1.inits = config.recipes.tune_10.inits = ("none",)
    assert recipe_name(config, cell) == ""


@pytest.mark.slow
def test_precision_is_part_of_the_question(photos, weights, command, tmp_path):
    """Answers in bfloat16 are others than those in float32, though near them: they are asked
    for anew and kept apart, and cost no budget, which counts images."""
    target = [
        *TORCH,
        *photos,
        f"--config.target.path={weights}/target.pth",
        f"--workdir={tmp_path}/w",
        "--config.inits=('none',)",
        "--config.budget=32",
    ]
    assert command(*target)[0] == 0
    before = table(tmp_path / "w")
    status, _, err = command(*target, "--config.target.precision=bfloat16", "--update")
    assert status == 0, err
    after = table(tmp_path / "w")
    assert (before["account"]["images"], before["account"]["views"]) == (62, 62)
    assert (after["account"]["images"], after["account"]["views"]) == (62, 124)
    assert (
        after["target"]["precision"] == "bfloat16"
        and after["target"]["sha256"] == before["target"]["sha256"]
    )
    with sqlite3.connect(tmp_path / "w/ledger.sqlite") as db:
        rows = db.execute(
            "SELECT scores FROM answers JOIN scores USING (row) ORDER BY image, request"
        ).fetchall()
    exact, rough = (
        np.array([np.frombuffer(scores, "<f4") for (scores,) in rows])
        .reshape(62, 2, 3)
        .swapaxes(0, 1)
    )
    apart = np.abs(exact - rough).max(1)
    assert apart.min() > 0 and np.sqrt(np.mean(apart**2)) < 0.2 * exact.std()
