"""Sets that tensorflow-datasets has prepared: read without TensorFlow, and never downloaded."""

import importlib.util
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_advice import advice
from test_data import load
from test_photos import WHOLE, encoded, photo

from qmx.data import cache, open_photos, prepared
from qmx.data.photos import canvas, decode, shown

PHOTOS = {  # split -> file name -> (the file, class)
    "train": {
        f"n0{i % 3}_{i}.JPEG": (encoded(photo(30 + i, 41, seed=i)), i % 3) for i in range(12)
    },
    "validation": {
        f"val_{i}.JPEG": (encoded(photo(50, 30 + i, "L", seed=i)), i % 3) for i in range(4)
    },
    "test": {f"test_{i}.JPEG": (encoded(photo(33, 30, seed=i)), i % 3) for i in range(3)},
}


def prepare(name, data_dir, splits, label="label", file_format="array_record"):
    """Prepare a set of these photos as its own builder would, in array_record, without
    TensorFlow."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(encoding_format="jpeg"),
                        "file_name": tfds.features.Text(),
                        label: tfds.features.ClassLabel(names=["n00", "n01", "n02"]),
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for file, (data, c) in PHOTOS[split].items():
                yield file, {"image": data, "file_name": file, label: c}

    Tiny.name = name
    Tiny(data_dir=data_dir, file_format=file_format).download_and_prepare()


@pytest.fixture(scope="module")
def prepared_sets(tmp_path_factory):
    """A data directory with the set tiny_photos."""
    data_dir = tmp_path_factory.mktemp("tfds")
    prepare("tiny_photos", data_dir, ("train", "validation", "test"))
    prepare("tiny_two", data_dir, ("train", "test"))
    prepare("tiny_captions", data_dir, ("train", "test"), label="caption")
    return data_dir


@pytest.fixture(autouse=True)
def data_dir(prepared_sets, monkeypatch):
    """That directory as TFDS_DATA_DIR, and no network."""

    def no_network(*words):
        raise AssertionError(f"the network was asked for {words}")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared_sets))
    yield prepared_sets
    prepared.builder.cache_clear()
    prepared.records.cache_clear()


def examples(split):
    """Files, labels and names of a split in the order in which TFDS keeps them."""
    import tensorflow_datasets as tfds

    source = tfds.builder("tiny_photos", data_dir=os.environ["TFDS_DATA_DIR"]).as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return [(e["image"], int(e["label"]), e["file_name"].decode()) for e in source]


def test_a_prepared_set_is_a_data_set():
    """The pool is "train"; images, labels and names as TFDS has them, in its order."""
    data = load("tfds", "tiny_photos", canvas=16, resize=24, crop=20)
    assert (data.name, data.classes, data.shape) == ("tiny_photos", 3, (20, 20, 3))
    assert data.class_names == ("n00", "n01", "n02") and data.mean == (0.485, 0.456, 0.406)
    assert (data.pool.size, data.evaluation.size) == (12, 4)
    for part, split in ((data.pool, "train"), (data.evaluation, "validation")):
        want = examples(split)
        assert part.names == tuple(name for *_, name in want) and set(part.names) == set(
            PHOTOS[split]
        )
        assert part.labels.dtype == np.int32 and part.labels.tolist() == [
            label for _, label, _ in want
        ]
        ids = np.arange(part.size)[::-1]
        rows, pixels = part.read(ids), part.shown(ids)
        for row, i in enumerate(ids):
            file, label = PHOTOS[split][part.names[i]]
            assert file == want[i][0] and label == part.labels[i] == rows["label"][row]
            image = decode(file, "x")
            np.testing.assert_array_equal(rows["image"][row], canvas(image, 16)[0])
            np.testing.assert_array_equal(rows["size"][row], image.size[::-1])
            np.testing.assert_array_equal(pixels[row], shown(image, 24, 20))


def test_photos_are_opened_first_and_left_out_by_name(tmp_path, monkeypatch):
    """A record that is no whole photo is named, and left out of its side alone."""
    assert open_photos(load("tfds", "tiny_photos"), tmp_path / "w") == []
    monkeypatch.setitem(PHOTOS["validation"], "val_2.JPEG", (WHOLE[:900], 2))
    prepare("tiny_cut", tmp_path, ("train", "validation"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    whole = load("tfds", "tiny_cut")
    bad = "tiny_cut/validation/val_2.JPEG"
    with pytest.raises(ValueError, match=f"^1 of 16 photos cannot be read: {bad}: .*truncated"):
        open_photos(whole, tmp_path / "w")
    data = load("tfds", "tiny_cut", leave_out=str(tmp_path / "w" / "unreadable.txt"))
    assert (data.pool.size, data.evaluation.size) == (12, 3)
    assert data.pool_digest == whole.pool_digest
    assert open_photos(data, tmp_path / "w") == []
    data.evaluation.shown(np.arange(3))


def test_the_evaluation_split_is_chosen():
    assert load("tfds", "tiny_photos", "test").evaluation.size == 3
    assert load("tfds", "tiny_two").evaluation.size == 3
    digests = {
        load("tfds", *words).digest
        for words in (("tiny_photos",), ("tiny_photos", "test"), ("tiny_two",))
    }
    assert len(digests) == 3
    with pytest.raises(
        ValueError,
        match="tiny_photos has no split 'val', only test, train, validation; .*eval_path",
    ):
        load("tfds", "tiny_photos", "val")
    with pytest.raises(ValueError, match="'train', which is the pool"):
        load("tfds", "tiny_photos", "train")


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012", "cifar100", "svhn_cropped"])
def test_what_is_not_prepared_is_refused_at_once_with_the_command(name, caplog):
    """No download is begun, and no second line is written."""
    start = time.monotonic()
    command = (
        f"pip install tensorflow-datasets tensorflow && tfds build {name}"
        " --file_format=array_record"
    )
    with pytest.raises(
        ValueError, match=f"^{name} is not prepared in .*; run {command}, or set"
    ) as error:
        load("tfds", name)
    assert (
        time.monotonic() - start < 5
        and len(str(error.value).splitlines()) == 1
        and not caplog.records
    )


@pytest.mark.parametrize(
    "name", ["nonsense_xyz", "../x", "tiny_photos:9.9.9", "cifar10/none", "a b"]
)
def test_an_unknown_set_is_refused_at_once(name):
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        load("tfds", name)
    assert (
        name in str(error.value)
        and len(str(error.value).splitlines()) == 1
        and len(str(error.value)) < 400
    )
    assert time.monotonic() - start < 5


def test_a_name_is_needed():
    with pytest.raises(ValueError, match="data.source=tfds needs the name of a set"):
        load("tfds")


def test_the_command_is_tfds_own():
    """The flag that we tell users is one of `tfds build`, which cannot even be asked without
    TensorFlow."""
    cli = Path(importlib.util.find_spec("tensorflow_datasets").origin).parent / "scripts" / "cli"
    assert "file_format: str | None = simple_parsing.choice(" in (cli / "cli_utils.py").read_text()


def test_a_set_without_labels_is_refused():
    with pytest.raises(
        ValueError, match="tiny_captions has no 'label' among its features, only .*caption"
    ):
        load("tfds", "tiny_captions")


def test_another_file_format_is_refused(prepared_sets, tmp_path, monkeypatch):
    """As TFDS prepares by default."""
    shutil.copytree(prepared_sets / "tiny_two", tmp_path / "tiny_two")
    info = next((tmp_path / "tiny_two").rglob("dataset_info.json"))
    info.write_text(json.dumps({**json.loads(info.read_text()), "fileFormat": "tfrecord"}))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(
        ValueError, match="tiny_two in .* is kept as tfrecord, which has no random access; "
    ):
        load("tfds", "tiny_two")


def test_damaged_records_are_named(prepared_sets, tmp_path, monkeypatch):
    shutil.copytree(prepared_sets / "tiny_two", tmp_path / "tiny_two")
    shard = next((tmp_path / "tiny_two").rglob("*train.array_record*"))
    whole = bytearray(shard.read_bytes())
    at = whole.find(b"JFIF")
    whole[at] ^= 0xFF
    shard.write_bytes(whole)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(
        ValueError, match="tiny_two, train, image 0: .*mismatch.*prepare tiny_two again"
    ):
        load("tfds", "tiny_two")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_prepared_set_can_be_cached(tmp_path, data_dir, processes):
    """With the names of what cannot be read, by several processes."""
    words = ["--source=tfds", "tiny_photos", str(tmp_path / "cache"), "--side=16", "--shard=5"]
    assert cache.main([*words, f"--processes={processes}"]) == 0
    plain = load("tfds", "tiny_photos", canvas=16, crop=20)
    quick = load("tfds", "tiny_photos", canvas=16, crop=20, cache=str(tmp_path / "cache"))
    assert quick.digest != plain.digest, "its canvases are not the files' to the last bit"
    assert quick.pool.names == plain.pool.names
    ids = np.arange(12)[::-1]
    want, got = plain.pool.read(ids), quick.pool.read(ids)
    np.testing.assert_array_equal(got["size"], want["size"])
    np.testing.assert_array_equal(got["label"], want["label"])
    assert np.abs(got["image"].astype(int) - want["image"]).mean() < 6
    np.testing.assert_array_equal(quick.pool.shown(ids), plain.pool.shown(ids))
    with pytest.raises(
        ValueError,
        match=(
            "other photos than tiny_two/train.*run python -m qmx.data.cache --source=tfds tiny_two "
        ),
    ):
        load("tfds", "tiny_two", canvas=16, cache=str(tmp_path / "cache"))


def test_unreadable_photos_have_their_name(tmp_path, monkeypatch):
    monkeypatch.setitem(PHOTOS["train"], "n02_11.JPEG", (WHOLE[:900], 2))
    prepare("tiny_broken", tmp_path, ("train", "test"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    data = load("tfds", "tiny_broken")
    with pytest.raises(
        ValueError, match="tiny_broken/train/n02_11.JPEG: .*data.leave_out=FILE.*n02_11.JPEG$"
    ):
        data.pool.read(np.arange(12))


def test_tensorflow_is_not_needed():
    assert importlib.util.find_spec("tensorflow") is None or "tensorflow" not in sys.modules


def test_the_cures_of_sets_work(prepared_sets, tmp_path, monkeypatch):
    """A name; the directory where the set is; one prepared anew in another; a split to evaluate on
    with the key that is named."""
    set_key = advice(r"needs the name of a set, data\.(\w+)=", load, "tfds")[1]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    variable = advice(r"set (\w+) to where it is, if", load, "tfds", **{set_key: "tiny_two"})[1]
    monkeypatch.setenv(variable, str(prepared_sets))
    assert load("tfds", "tiny_two", canvas=16, crop=20).pool.size == 12
    prepared.builder.cache_clear(), prepared.records.cache_clear()

    other = tmp_path / "other"
    shutil.copytree(prepared_sets / "tiny_two", other / "tiny_two")
    info = next((other / "tiny_two").rglob("dataset_info.json"))
    info.write_text(json.dumps({**json.loads(info.read_text()), "fileFormat": "tfrecord"}))
    monkeypatch.setenv(variable, str(other))
    advice(f"prepare it again in another {variable} with pip", load, "tfds", "tiny_two")
    prepare("tiny_two", tmp_path / "again", ("train", "test"))
    monkeypatch.setenv(variable, str(tmp_path / "again"))
    assert load("tfds", "tiny_two", canvas=16, crop=20).pool.size == 12

    shard = next((tmp_path / "again").rglob("*train.array_record*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b"JFIF", b"JFIG", 1))
    prepared.builder.cache_clear(), prepared.records.cache_clear()
    name = advice(r"; prepare (\w+) again$", load, "tfds", "tiny_two")[1]
    shutil.rmtree(tmp_path / "again")
    prepare(name, tmp_path / "again", ("train", "test"))
    prepared.builder.cache_clear(), prepared.records.cache_clear()
    assert load("tfds", "tiny_two", canvas=16, crop=20).pool.size == 12

    cure = r"only (.*); name the one to evaluate on with data\.(\w+)$"
    found = advice(cure, load, "tfds", "tiny_two", "val")
    keys = {split: {found[2]: split} for split in found[1].split(", ")}
    advice("evaluate on another split", load, "tfds", "tiny_two", **keys.pop("train"))
    for key in keys.values():
        assert load("tfds", "tiny_two", canvas=16, crop=20, **key).evaluation.size == 3
