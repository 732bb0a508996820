"""configs/photos.py: paths alone, whatever the pool's size and the device."""

import json

import numpy as np
import pytest
from conftest import ONE_BLOCK
from PIL import Image

from qmx.main import parse
from qmx.ranges import value_problems
from qmx.shipped import with_files


def derived(*words, photos=1000, device="cpu"):
    """The config that is run with a pool of so many photos."""
    arguments = parse(with_files(["qmx", "--workdir=none", *words]))
    return arguments.derive(arguments.config, photos, device)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("photos", [3, 24, 1000, 9469, 1_000_000])
def test_any_pool(photos, device):
    """Every value is allowed, batches and queues fit, and each student has steps enough."""
    words = ("--config=photos:audit", "--config.target.path=own.py:f")
    config = derived(*words, photos=photos, device=device)
    assert [*value_problems(config)] == []
    moco = config.pretrain.moco
    assert 2 <= moco.batch_size <= photos
    assert moco.queue_size % moco.batch_size == moco.batch_size % moco.group_size == 0
    assert moco.queue_size <= photos and moco.epochs == int(moco.epochs) >= 2
    assert config.distill.batch_size <= photos and config.distill.min_steps >= 300
    assert config.queries == ((50, 200, 1000) if photos >= 1000 else (photos,))
    assert config.student.size == config.weak_view.size == config.strong_view.size


def test_more_photos_are_no_longer_pretraining():
    steps = []
    for photos in (1000, 9469, 50_000):
        moco = derived("--config=photos:pretrain", photos=photos).pretrain.moco
        steps.append(moco.epochs * (photos // moco.batch_size))
    assert max(steps) <= 1600 and min(steps) >= 1000


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("own.py:scores", "callable"),
        ("package.module:f", "callable"),
        ("model.onnx", "onnx"),
        ("a.b/model.pth", "torch"),
        ("model.pth#state_dict_ema", "torch"),
        ("model.safetensors", "torch"),
        ("answers.npz", "recorded"),
        ("answers.parquet", "recorded"),
    ],
)
def test_the_kind_of_target(path, kind):
    config = derived("--config=photos:audit", f"--config.target.path={path}")
    assert config.target.kind == kind and (config.target.arch == "") == (kind == "torch")
    assert derived("--config=photos", "--config.target.url=http://x").target.kind == "served"


def test_what_is_said_stays():
    """Of all that the config derives the command line's own values are kept; a config without such
    a function is run as it is."""
    words = ["--config=photos:audit", "--config.student.arch=resnet50", "--config.queries=(7,)"]
    config = derived(*words, "--config.pretrain.moco.epochs=3")
    assert config.student.arch == "resnet50" and config.queries == (7,)
    assert config.pretrain.moco.epochs == 3 and config.student.size == 64
    plain = parse(with_files(["qmx", "--config=digits", "--workdir=none"]))
    assert plain.derive(plain.config, 1000, "cpu") is plain.config
    with pytest.raises(ValueError, match="'audi' is none of audit, pretrain"):
        derived("--config=photos:audi")


def write(root, count, seed):
    root.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(seed + i).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(root / f"{i}.png")
    return root


@pytest.mark.slow
def test_the_command(command, tmp_path):
    """Two flat folders and a function: the table of fidelity; and of one folder an encoder."""
    pool, val = write(tmp_path / "pool", 24, 0), write(tmp_path / "val", 8, 100)
    (tmp_path / "own.py").write_text(
        "import numpy as np\n\ndef f(images):\n    m = images.mean((1, 2)) / 32\n"
        "    return np.concatenate([m, -m], 1)\n"
    )
    small = ["--config.pretrain.moco.epochs=1", "--config.distill.min_steps=3"]
    small += [ONE_BLOCK[0], "--config.distill.epochs=0.1"]
    small += [f"--config.{key}=16" for key in ("data.canvas", "data.resize", "data.crop")]
    small += [f"--config.{key}.size=16" for key in ("student", "weak_view", "strong_view")]
    status, out, err = command(
        *("--config=photos:pretrain", "--stage=pretrain", f"--workdir={tmp_path}/e", *small),
        f"--config.data.path={pool}",
    )
    assert status == 0, err
    assert f"{tmp_path}/e/pretrain/moco-seed0/encoder.safetensors" in out
    assert not (tmp_path / "e/ledger.sqlite").exists()
    status, _, err = command(
        "--config=photos:pretrain", f"--workdir={tmp_path}/f", f"--config.data.path={pool}"
    )
    assert status == 2 and "--stage=pretrain" in err.splitlines()[-1]
    status, out, err = command(
        *("--config=photos:audit", f"--workdir={tmp_path}/w", f"--config.data.path={pool}"),
        *(f"--config.data.eval_path={val}", f"--config.target.path={tmp_path}/own.py:f", *small),
        *("--config.inits=('none',)", "--config.also=()"),
    )
    assert status == 0, err
    results = json.loads((tmp_path / "w/results.json").read_text())
    assert [row["queries"]["train"] for row in results["rows"]] == [24]
    assert results["pool"]["classes"] == 6 and results["config"]["queries"] == [24]
