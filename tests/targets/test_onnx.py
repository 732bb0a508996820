"""A target in an ONNX file, made by the onnx package, computed by onnxruntime."""

import json

import numpy as np
import onnx
import pytest
from conftest import TINY
from onnx import TensorProto, helper, numpy_helper
from test_advice import advice

from qmx.data.arrays import from_arrays
from qmx.pipeline import of_targets_classes
from qmx.settings import base
from qmx.targets import onnx_file
from qmx.targets.shown import Shown

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), np.uint8)
WEIGHTS = np.random.default_rng(1).normal(size=(64, 10)).astype(np.float32)


def model(path, shape, kind=TensorProto.FLOAT, outputs=("scores",)):
    """Write a linear map of the pixels."""
    nodes = [
        helper.make_node("Cast", ["image"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["numbers"], ["flat"], axis=1),
        *(helper.make_node("MatMul", ["flat", "w"], [name]) for name in outputs),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("image", kind, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], 10])
            for name in outputs
        ],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return str(path)


def connect(path, **keys):
    return onnx_file.connect(path, shape=(8, 8, 1), classes=10, **keys)


def test_weights_in_a_file_beside_it(tmp_path):
    """PyTorch writes them so: other weights are another model, though the .onnx is the same."""
    path = model(tmp_path / "a.onnx", ["n", 8, 8, 1], TensorProto.UINT8)
    alone = connect(path).sha256
    keys = {"save_as_external_data": True, "location": "a.onnx.data", "size_threshold": 0}
    onnx.save(onnx.load(path), path, **keys)
    one, scores = connect(path), connect(path).query(IMAGES)
    before = (tmp_path / "a.onnx").read_bytes()
    (tmp_path / "a.onnx.data").write_bytes((2 * WEIGHTS).tobytes())
    two = connect(path)
    assert (tmp_path / "a.onnx").read_bytes() == before
    np.testing.assert_allclose(two.query(IMAGES), 2 * scores, rtol=1e-5)
    assert len({alone, one.sha256, two.sha256}) == 3


def test_scores(tmp_path):
    """Whatever the model takes: the scores of the same map in NumPy; its type and axes are read
    from the file."""
    flat = IMAGES.reshape(len(IMAGES), -1).astype(np.float32)
    scaled = Shown(scale=1.0, mean=(0.5,), std=(0.25,))
    found = connect(model(tmp_path / "a.onnx", ["n", 1, 8, 8]), shown=scaled)
    np.testing.assert_allclose(
        found.query(IMAGES), (flat / 255 - 0.5) / 0.25 @ WEIGHTS, rtol=1e-4, atol=1e-4
    )
    assert found.preprocessing.startswith("nchw, float32, 0..1, mean")
    for batch in ("n", 3):  # free, and fixed
        path = model(tmp_path / f"{batch}.onnx", [batch, 8, 8, 1], TensorProto.UINT8)
        found = connect(path)
        np.testing.assert_allclose(found.query(IMAGES), flat @ WEIGHTS, rtol=1e-4, atol=1e-2)
        assert found.preprocessing == "as-is"


def test_digest(tmp_path):
    """Of the file and of the tensors' names."""
    path = model(tmp_path / "a.onnx", ["n", 8, 8, 1], TensorProto.UINT8, ("a", "b"))
    digests = {connect(path, output=name).sha256 for name in ("a", "b")}
    model(tmp_path / "a.onnx", ["m", 8, 8, 1], TensorProto.UINT8, ("a", "b"))
    digests.add(connect(path, output="a").sha256)
    assert len(digests) == 3


def test_refused(tmp_path):
    """In one line, before it is asked."""
    two = model(tmp_path / "two.onnx", ["n", 8, 8, 1], TensorProto.UINT8, ("a", "b"))
    floats = model(tmp_path / "f.onnx", ["n", 8, 8, 1])
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "f.onnx").read_bytes()[:100])
    for path, keys, message in (
        (two, {}, "several outputs of the model; name one of a, b in target.output"),
        (two, {"output": "c"}, "there is no output 'c'"),
        (floats, {}, "takes float32, and nobody says in what numbers"),
        (str(tmp_path / "cut.onnx"), {}, "cut.onnx cannot be read as ONNX"),
        (str(tmp_path / "no.onnx"), {}, "no such file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            connect(path, **keys)
        assert len(str(caught.value).splitlines()) == 1
    wide = model(tmp_path / "wide.onnx", ["n", 4, 4, 4], TensorProto.UINT8)
    with pytest.raises(ValueError, match=r"\[-1, 4, 4, 4\] and images are shown as \[-1, 8, 8, 1"):
        connect(wide)


def test_images_that_it_fails_on(tmp_path):
    """In one line: what onnxruntime raises is of its own kind."""
    free = model(tmp_path / "free.onnx", ["n", "h", "w", 1], TensorProto.UINT8)
    found = onnx_file.connect(free, shape=(10, 10, 1), classes=10)
    with pytest.raises(
        ValueError, match=r"fails on uint8\[7, 10, 10, 1\]: .* target.shown"
    ) as caught:
        found.query(np.zeros((7, 10, 10, 1), np.uint8))
    assert len(str(caught.value).splitlines()) == 1


def test_the_cures_work(tmp_path):
    """Each tensor that is named is one; numbers that are said are taken."""
    two = model(tmp_path / "two.onnx", ["n", 8, 8, 1], TensorProto.UINT8, ("a", "b"))
    for wrong in ({}, {"output": "c"}, {"input": "pixels", "output": "a"}):
        found = advice(r"name one of (.*) in target\.(\w+)$", connect, two, **wrong)
        for name in found[1].split(", "):
            connect(two, **{**wrong, "output": "a", found[2]: name}).query(IMAGES)
    floats = model(tmp_path / "f.onnx", ["n", 8, 8, 1])
    scale = advice(r"scale=(\d+) for the pixels as they are", connect, floats)[1]
    flat = IMAGES.reshape(len(IMAGES), -1).astype(np.float32)
    got = connect(floats, shown=Shown(scale=float(scale))).query(IMAGES)
    np.testing.assert_allclose(got, flat @ WEIGHTS, rtol=1e-4, atol=1e-2)


@pytest.mark.slow
def test_the_command(command, tmp_path):
    """From the file to the table."""
    path = model(tmp_path / "a.onnx", ["n", 1, 8, 8])
    words = [
        *(word for word in TINY if "fractions" not in word),
        *("--config.fractions=(0.05,)", "--config.inits=('none',)", "--config.also=()"),
        *("--config.target.kind=onnx", f"--workdir={tmp_path}/w"),
    ]
    status, _, err = command(*words)
    assert status == 2 and "needs the model: --config.target.path=FILE.onnx" in err
    words += [f"--config.target.path={path}", "--config.target.shown.scale=1.0"]
    status, _, err = command(*words)
    assert status == 0, err
    assert json.loads((tmp_path / "w/results.json").read_text())["target"]["name"] == "a.onnx"


NAMES = ("cat", "great owl", "dog")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("names", "{0: 'cat', 1: 'great owl', 2: 'dog'}"),  # Ultralytics
        ("names", '{"2": "dog", "0": "cat", "1": "great owl"}'),
        ("classes", '["cat", "great owl", "dog"]'),
        ("labels", "cat, great owl,dog"),
        ("class_names", "cat\ngreat owl\ndog\n"),
    ],
)
def test_names_of_classes(tmp_path, key, text, capfd):
    """Of the metadata; folders are numbered by them, and where they are others a line says so."""
    path = model(tmp_path / "a.onnx", ["n", 8, 8, 1])
    assert onnx_file.class_names(path) == []
    made = onnx.load(path)
    helper.set_model_props(made, {key: text, "author": "a, b"})
    onnx.save(made, path)
    assert onnx_file.class_names(path) == [[name] for name in NAMES]
    config = base()
    config.target.update(kind="onnx", path=path)
    data = from_arrays("own", IMAGES[:4], np.arange(4) % 2, IMAGES[4:], np.arange(3) % 2)
    assert of_targets_classes(config, data) is data, "numbers are the target's already"
    found = of_targets_classes(config, data._replace(class_names=("Dog", "cat")))
    assert found.classes == 3 and found.pool.labels.tolist() == [2, 0, 2, 0]
    other = data._replace(class_names=("wolf", "cat"))
    assert of_targets_classes(config, other) is other
    assert "1 of 2 classes of the images are in no line of the metadata" in capfd.readouterr().err
