"""Images of some of a target's classes, numbered as the target numbers them."""

import json

import numpy as np
import pytest
from conftest import ONE_BLOCK
from PIL import Image

from qmx.data import load, named
from qmx.data.arrays import from_arrays


def arrays(classes=3, names=()):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 8, 8, 1), np.uint8)
    made = from_arrays("own", image[:8], np.arange(8) % classes, image[8:], np.arange(4) % classes)
    return made._replace(class_names=tuple(names))


def write(tmp_path, text):
    (tmp_path / "names.txt").write_text(text)
    return str(tmp_path / "names.txt")


def test_by_names(tmp_path):
    """Whatever their case and order; by any of a line's names; both sides, in reads and in arrays
    in memory."""
    before = arrays(names=("Dog", "n02", "great grey owl"))
    path = write(tmp_path, "n01, cat\nn02\ttench\nwolf\nn09,great grey owl, owl\n\ndog\n")
    data = named(before, path)
    columns = np.array([4, 1, 3])
    assert data.classes == 5 and data.class_names[3] == "n09"
    for old, new in ((before.pool, data.pool), (before.evaluation, data.evaluation)):
        np.testing.assert_array_equal(new.labels, columns[old.labels])
        ids = np.array([3, 1])
        np.testing.assert_array_equal(new.read(ids)["label"], new.labels[ids])
        np.testing.assert_array_equal(new.read(ids)["image"], old.read(ids)["image"])
        np.testing.assert_array_equal(new.held.arrays["label"][new.held.rows], new.labels)
    assert before.pool_digest != data.pool_digest
    assert before.evaluation_digest != data.evaluation_digest


def test_by_number(tmp_path):
    """Without names the numbers stay, and there may be more classes than the images show."""
    data = named(arrays(), write(tmp_path, "a\nb\nc\nd\n"))
    np.testing.assert_array_equal(data.pool.labels, arrays().pool.labels)
    assert data.classes == 4
    with pytest.raises(ValueError, match="names 2 classes and own has 3"):
        named(arrays(), write(tmp_path, "a\nb\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\n", "1 of 3 classes of the images are in no line of .*: x; name the folders as"),
        ("a\nb\nx\nX\n", "class x is in the lines 3 and 4 of"),
        ("\n \n", "names no class"),
    ],
)
def test_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        named(arrays(names=("a", "b", "x")), write(tmp_path, text))
    with pytest.raises(ValueError, match="none.txt cannot be read as text"):
        named(arrays(), str(tmp_path / "none.txt"))


@pytest.mark.slow
def test_a_target_of_more_classes(command, tmp_path):
    """Two folders of a target of five classes: the student copies all five scores, accuracy is of
    the two that have labels."""
    rng = np.random.default_rng(0)
    for side, count in (("pool", 20), ("eval", 6)):
        for name, level in (("owl", 200), ("cat", 40)):
            (tmp_path / side / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 30, level + 30, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / side / name / f"{side}{i}.png")
    (tmp_path / "own.py").write_text(
        "import numpy as np\n\ndef f(images):\n    bright = images.mean((1, 2, 3)) / 255\n"
        "    return np.stack([0 * bright, -bright, 1 - 4 * bright, bright * 2, bright], 1)\n"
    )
    words = [
        *("--config=configs/digits.py:float32", ONE_BLOCK[0]),
        *("--config.seeds=(0,)", "--config.inits=('rotation',)", "--config.also=()"),
        *("--config.pretrain.rotation.epochs=1", "--config.pretrain.rotation.batch_size=16"),
        *("--config.fractions=()", "--config.queries=(20,)", "--config.data.source=folder"),
        *(f"--config.data.path={tmp_path}/pool", f"--config.data.eval_path={tmp_path}/eval"),
        *("--config.data.canvas=16", "--config.data.resize=16", "--config.data.crop=16"),
        *("--config.distill.batch_size=16", "--config.distill.min_steps=4"),
        *("--config.target.kind=callable", f"--config.target.path={tmp_path}/own.py:f"),
        *("--config.target.precision=float32", f"--workdir={tmp_path}/w"),
    ]
    status, _, err = command(*words)
    assert status == 2 and "with the shape [1, 5], and it must be [1, 2]" in err.splitlines()[-1]
    assert command(*words, "--stage=pretrain")[0] == 0  # it needs no target, and no classes
    encoder = tmp_path / "w/pretrain/rotation-seed0/encoder.safetensors"
    before = encoder.stat().st_mtime_ns
    names = write(tmp_path, "wolf\ndog\ncat\nowl\ntench\n")
    status, _, err = command(*words, f"--config.target.classes={names}", "--update")
    assert status == 0, err
    assert encoder.stat().st_mtime_ns == before, "it was pretrained again"
    results = json.loads((tmp_path / "w/results.json").read_text())
    assert results["target"]["top1"] == 100 and results["pool"]["classes"] == 5
    assert load(source="digits").class_names == ()
