"""Subsets, the order of images, batches on the device, and the sources with all that can be wrong
in a file."""

import hashlib
import io
import re
import zipfile
from itertools import islice
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qmx import data as qmx_data
from qmx.contract import Rows
from qmx.data import SOURCES, batches, epoch_steps
from qmx.data.batches import BESIDE, ahead, batch_ids, feed
from qmx.data.classes import warnings as class_warnings
from qmx.data.sources import Beside, in_memory, take
from qmx.selection.orders import (
    class_balanced_order,
    from_list,
    predecessor_order,
    random_order,
    subset_size,
)
from qmx.selection.select import select


def keys(source, path="", eval_path="", **more):
    """A config's `data`."""
    return {
        "source": source,
        "path": str(path),
        "eval_path": str(eval_path),
        "canvas": 256,
        "resize": 256,
        "crop": 224,
        "leave_out": "",
        "cache": "",
        "mean": (),
        "std": (),
        "limit": 0,
        **more,
    }


def load(*words, **more):
    return qmx_data.load(**keys(*words, **more))


# Subsets


@pytest.mark.parametrize(
    "fraction, size, count",
    [
        (0.29, 100, 29),
        (0.58, 100, 58),
        (0.07, 100, 7),
        (0.57, 100, 57),
        (1.1e-3, 10000, 11),
        (0.01, 1437, 14),
        (0.1, 1437, 143),
        (1.0, 1437, 1437),
        (1, 7, 7),
        (0.999, 7, 6),
        (1e-3, 1000, 1),
        (0.01, 1281167, 12811),
        (0.1, 1281167, 128116),
        (np.float64(0.29), 100, 29),
    ],
)
def test_a_share_is_taken_in_decimal(fraction, size, count):
    """int(fraction * size) of the number as it is written: 12,811 and 128,116 of ImageNet, and 29
    of 100."""
    assert subset_size(fraction, size) == count


@pytest.mark.parametrize(
    "fraction", [0, -0.1, 1.5, 1.0000001, float("nan"), float("inf"), -float("inf")]
)
def test_a_share_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match=re.escape(f"fraction {fraction} ")):
        subset_size(fraction, 100)


@pytest.mark.parametrize("size", [3, 60, 99, 101, 1437, 1797, 50000])
def test_a_share_that_leaves_no_image_is_refused_with_one_that_does(size):
    with pytest.raises(ValueError, match=rf"of {size} images is none") as error:
        subset_size(0.5 / size, size)
    cure = float(re.search(r"at least ([0-9.e-]+)$", str(error.value)).group(1))
    assert subset_size(cure, size) >= 1


@pytest.mark.parametrize("size", [1, 2, 1437])
def test_the_order_is_a_permutation_and_shares_are_nested(size):
    """What the 1 % holds does not depend on whether the 10 % was ever asked about."""
    order = random_order(size, 3)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    np.testing.assert_array_equal(order, random_order(size, 3))
    subsets = [
        set(random_order(size, 3)[: subset_size(share, size)])
        for share in (0.01, 0.1, 0.5, 1.0)
        if share * size >= 1
    ]
    assert all(small <= large for small, large in zip(subsets, subsets[1:], strict=False))


def test_seeds_give_other_orders():
    assert len({tuple(random_order(50, seed)) for seed in range(20)}) == 20


@pytest.mark.parametrize("counts", [(5, 5, 5), (1, 9, 4), (30,), (0, 3, 7), (40, 40)])
def test_a_balanced_order_holds_classes_equally_often_up_to_one(counts):
    """In every prefix, for as long as a class lasts; all prefixes are of one order, so they are
    nested."""
    labels = np.random.default_rng(1).permutation(
        np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    )
    order = class_balanced_order(labels, 3)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(labels)))
    np.testing.assert_array_equal(order, class_balanced_order(labels, 3))
    for m in range(1, len(labels) + 1):
        seen = np.bincount(labels[order[:m]], minlength=len(counts))
        for c, count in enumerate(counts):
            assert seen[c] == count or seen[c] >= seen.max() - 1


def test_a_balanced_order_follows_its_seed_in_images_and_in_classes():
    labels = np.tile(np.arange(10, dtype=np.int32), 4)
    orders = [class_balanced_order(labels, seed) for seed in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    # a prefix within a round favours no class.
    assert len({tuple(labels[order[:3]]) for order in orders}) > 10
    assert (
        len({tuple(labels[order[at : at + 10]]) for order in orders for at in (0, 10, 20, 30)}) > 60
    )


def test_the_order_of_the_predecessor():
    """Numpy's seed 1234 over the list of all images. The hash is of this numpy's; its stream is
    frozen."""
    images = [f"image {i}" for i in range(1000)]
    np.random.seed(1234)
    np.random.shuffle(images)
    assert [f"image {i}" for i in predecessor_order(1000)] == images
    digest = hashlib.sha256(predecessor_order(1000).astype("<i8").tobytes()).hexdigest()
    assert digest == "f10f39ebc2b7c2c37c3b9cea9a72196aca6f2c751f8096d64e129d310cf35a64"
    first = predecessor_order(1281167)[:12811].astype("<i8")
    digest = hashlib.sha256(first.tobytes()).hexdigest()
    assert digest == "b5d2db4599a3d22f8a3a628195ef48a7be5a938425e3cdd5f2ec441133edf78b"


NAMES = ("n01/n01_5.JPEG", "n01/n01_7.JPEG", "n02/n02_1.JPEG", "n02/same.JPEG", "n03/same.JPEG")


@pytest.mark.parametrize(
    "text, ids",
    [
        ("n02_1.JPEG\nn01_5.JPEG\n", [2, 0]),
        ("n01/n01_7.JPEG\n\n  n02_1.JPEG", [1, 2]),
        ("n03/same.JPEG\r\nn02/same.JPEG", [4, 3]),
        ("train/n01/n01_5.JPEG", [0]),
    ],
)
def test_a_list_chooses_images_in_its_order(tmp_path, text, ids):
    (tmp_path / "1percent.txt").write_text(text)
    np.testing.assert_array_equal(from_list(str(tmp_path / "1percent.txt"), NAMES), ids)


def test_a_list_with_folders_finds_bare_names(tmp_path):
    (tmp_path / "list.txt").write_text("n02/n02_1.JPEG\n")
    np.testing.assert_array_equal(
        from_list(str(tmp_path / "list.txt"), ("n01_5.JPEG", "n02_1.JPEG")), [1]
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("n01_5.JPEG\nnone.JPEG\n01_7.JPEG", "2 of 3 names are of no image: none.JPEG, 01_7.JPEG$"),
        ("n02/n01_5.JPEG", "1 of 1 names are of no image"),
        ("same.JPEG\nn01_5.JPEG", "1 of 2 names are of several images each: same.JPEG$"),
        ("n01_5.JPEG\nn01/n01_5.JPEG", "1 of 2 names come more than once: n01/n01_5.JPEG$"),
        ("\n \n", "no names in it"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, text, message):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        from_list(str(path), NAMES)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_list_needs_names_and_a_file(tmp_path):
    (tmp_path / "list.txt").write_text("n01_5.JPEG")
    with pytest.raises(ValueError, match="no names to choose by"):
        from_list(str(tmp_path / "list.txt"), ())
    with pytest.raises(ValueError, match="none.txt: No such file"):
        from_list(str(tmp_path / "none.txt"), NAMES)


def test_each_budget_has_a_list(tmp_path):
    """The one with as many names as the budget has images; none of that length, or two, are
    refused."""
    texts = {
        "1.txt": "n01_5.JPEG",
        "2.txt": "n02_1.JPEG\nn01_5.JPEG",
        "2b.txt": "n01_5.JPEG\nn02_1.JPEG",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    one, two, other = (str(tmp_path / name) for name in texts)
    pool = SimpleNamespace(size=2, names=("n01_5.JPEG", "n02_1.JPEG"))
    for budget, ids in ((1, [0]), (2, [1, 0])):
        np.testing.assert_array_equal(select("list", pool, budget, 0, (one, two)), ids)
    for lists, message in (
        ((one,), "0 of the lists have 2 images .*1.txt 1"),
        ((two, other), "2 of the lists have 2"),
    ):
        with pytest.raises(
            ValueError, match=message + ".*one list of as many images as each budget has"
        ):
            select("list", pool, 2, 0, lists)


# The order of the batches


@pytest.mark.parametrize("size, batch_size", [(12, 4), (13, 4), (10, 10), (11, 10), (7, 1), (1, 1)])
def test_each_epoch_without_its_remainder_is_a_shuffle(size, batch_size):
    """With drop_last every epoch shows floor(size / batch) batches of images that are all
    different."""
    steps = int(epoch_steps(size, batch_size, drop_last=True))
    assert steps == size // batch_size
    for epoch in range(5):
        ids = [batch_ids(size, batch_size, 0, epoch * steps + k, True) for k in range(steps)]
        assert all(len(b) == batch_size for b in ids)
        seen = np.concatenate(ids)
        assert len(set(seen)) == steps * batch_size and set(seen) <= set(range(size))


@pytest.mark.parametrize(
    "size, batch_size", [(12, 4), (13, 4), (10, 10), (11, 10), (7, 1), (5, 8), (3, 10), (1, 4)]
)
def test_epochs_follow_each_other_without_a_seam(size, batch_size):
    """`size` batches show every image exactly `batch_size` times, each epoch's stretch is a
    permutation.

    Also where the set is smaller than the batch.
    """
    assert epoch_steps(size, batch_size, drop_last=False) == size / batch_size
    ids = np.concatenate([batch_ids(size, batch_size, 0, k, False) for k in range(size)])
    np.testing.assert_array_equal(np.bincount(ids, minlength=size), batch_size)
    for epoch in range(batch_size):
        np.testing.assert_array_equal(
            np.sort(ids[epoch * size : (epoch + 1) * size]), np.arange(size)
        )


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_batch_is_a_pure_function_of_seed_and_number(drop_last):
    """Asked for in any order, any number of times, and not touched by what a caller does to
    it."""
    first = [batch_ids(11, 4, 5, k, drop_last).copy() for k in range(12)]
    for k in (7, 0, 11, 3, 7):
        ids = batch_ids(11, 4, 5, k, drop_last)
        np.testing.assert_array_equal(ids, first[k])
        ids[:] = -1
    np.testing.assert_array_equal([batch_ids(11, 4, 5, k, drop_last) for k in range(12)], first)


@pytest.mark.parametrize("drop_last", [True, False])
def test_epochs_and_seeds_differ(drop_last):
    """No two epochs and no two seeds have one order."""
    orders = {
        tuple(batch_ids(40, 40, seed, epoch, drop_last)) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


# Batches through grain, on the device


def source(size):
    images = np.arange(size * 4, dtype=np.uint8).reshape(size, 2, 2, 1)
    return in_memory(image=images, label=np.arange(size, dtype=np.int32))


B = 8  # divides over as many devices as a test machine simulates


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("start", [0, 1, 5, 9])
@pytest.mark.parametrize("size, drop_last", [(20, True), (20, False), (16, True), (5, False)])
def test_batches_arrive_in_order_from_any_start(size, drop_last, start, threads):
    """Those of an undisturbed run from `start` on, with any number of threads."""
    data = source(size)
    got = list(batches(data, B, steps=9, seed=3, start=start, drop_last=drop_last, threads=threads))
    assert len(got) == 9 - start
    for k, batch in enumerate(got, start):
        ids = batch_ids(size, B, 3, k, drop_last)
        np.testing.assert_array_equal(batch["label"], ids)
        np.testing.assert_array_equal(batch["image"], data.all()["image"][ids])


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize(
    "size, pool, drop_last", [(20, 50, False), (5, 50, False), (20, 20, False), (20, 50, True)]
)
def test_a_pool_comes_beside_in_an_order_of_its_own(size, pool, drop_last, start):
    """So many images of it in every batch, each once in a pass over it, whatever the source;
    from any start."""
    data = take(source(60), np.arange(size))._replace(
        beside=Beside(take(source(60), np.arange(pool)), 3)
    )
    got = list(batches(data, B, steps=9, seed=3, start=start, drop_last=drop_last))
    for k, batch in enumerate(got, start):
        assert batch.keys() == {"image", "label", "pool_image", "pool_label"}
        np.testing.assert_array_equal(batch["label"], batch_ids(size, B, 3, k, drop_last))
        np.testing.assert_array_equal(
            batch["pool_label"], batch_ids(pool, 3 * B, 3, k, drop_last, BESIDE)
        )
        np.testing.assert_array_equal(
            batch["pool_image"][:, 0, 0, 0], np.asarray(batch["pool_label"]) * 4
        )
        assert batch["pool_label"].sharding.spec == PartitionSpec("data")
    seen = np.concatenate([batch["pool_label"] for batch in got])
    if not drop_last and not start:
        np.testing.assert_array_equal(
            np.bincount(seen[: len(seen) // pool * pool]), len(seen) // pool
        )
    own = np.concatenate([batch["label"] for batch in got])
    assert not np.array_equal(seen[: len(own)], own), (
        "a stream of its own, also where both are one set"
    )


def test_batches_are_arrays_split_over_the_devices():
    for batch in batches(source(20), B, steps=2, seed=0):
        assert batch["image"].shape == (B, 2, 2, 1) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (B,) and batch["label"].dtype == np.int32
        for array in batch.values():
            assert isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding)
            assert array.sharding.spec == PartitionSpec("data")
            assert array.sharding.device_set == set(jax.devices())


# Images that lie on the devices


def unpacked(rows):
    """The batches that a dispatch trains on."""
    return [jax.device_get(rows.batch(place)) for place in range(rows.steps)]


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("start", [0, 3, 9])
def test_numbers_of_rows_are_the_hosts_batches(at_once, start):
    """The same examples in the same order, with what comes beside them, also where a dispatch is
    not full."""
    ids = np.array([7, 3, 11, 50, 2, 40, 8])
    scores = np.arange(14, dtype=np.float32).reshape(7, 2)
    data = take(source(60), ids, scores=scores)._replace(
        beside=Beside(take(source(60), np.arange(5, 30)), 2)
    )
    dispatches = list(feed(data, B, steps=9, seed=3, start=start, at_once=at_once))
    assert all(isinstance(rows, Rows) and rows.ids[""].shape == (at_once, B) for rows in dispatches)
    got = [batch for rows in dispatches for batch in unpacked(rows)]
    wanted = list(batches(data, B, steps=9, seed=3, start=start))
    assert len(got) == len(wanted) == 9 - start
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_rows_lie_on_all_devices_and_batches_are_split_over_them():
    """Tables of one shape for all that is taken of a source: one compilation serves every
    budget."""
    of_few, of_more = (
        next(
            feed(
                take(source(60), np.arange(size), scores=np.ones((size, 3), np.float32)),
                B,
                steps=1,
                seed=0,
            )
        )
        for size in (3, 40)
    )
    assert jax.tree.map(np.shape, of_few) == jax.tree.map(np.shape, of_more)
    assert of_few.tables[""]["image"].shape[0] == 60
    assert of_few.tables[""]["image"].sharding.spec == PartitionSpec()
    assert of_few.ids[""].sharding.spec == PartitionSpec(None, "data")
    assert len(jax.devices()) == 1 or not of_few.ids[""].sharding.is_fully_replicated


def test_what_does_not_fit_or_is_in_files_comes_from_the_host(monkeypatch):
    """More than a share of what is free on a device, no arrays, or one image twice."""
    files, twice = source(20)._replace(held=None), take(source(20), np.array([1, 1, 2]))
    for data in (files, source(20)._replace(beside=Beside(files, 1)), twice):
        assert isinstance(next(feed(data, B, steps=1, seed=0)), dict)
    monkeypatch.setattr("qmx.sharding.SHARE_OF_MEMORY", 1e-12)
    assert isinstance(next(feed(source(20), B, steps=1, seed=0)), dict)


def test_a_batch_larger_than_the_source_is_refused_there_too():
    with pytest.raises(ValueError, match="batch_size 24 is larger than the 20 images"):
        next(feed(source(20), 24, steps=1, seed=0, drop_last=True))


def test_a_long_run_can_be_left_at_any_time():
    """A million steps are not read ahead."""
    read = []
    data = source(64)
    counted = data._replace(read=lambda ids: read.append(len(ids)) or data.read(ids))
    for k, batch in enumerate(
        islice(batches(counted, B, steps=1_000_800, seed=0, start=500_000), 3), 500_000
    ):
        np.testing.assert_array_equal(batch["label"], batch_ids(64, B, 0, k, False))
    assert len(read) < 50


def test_a_batch_larger_than_the_source_is_refused_where_the_rest_is_dropped():
    with pytest.raises(ValueError, match="batch_size 24 is larger than the 20 images"):
        batches(source(20), 24, steps=1, seed=0, drop_last=True)
    assert len(list(batches(source(20), 20 // B * B, steps=3, seed=0, drop_last=True))) == 3
    assert len(list(batches(source(20), 24, steps=3, seed=0))) == 3


def test_a_failing_source_is_not_an_end_of_the_data():
    """An error in a reading thread reaches the loop."""

    def read(ids):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(batches(source(20)._replace(read=read), B, steps=3, seed=0))


def test_arrays_beside_a_subset_stay_with_their_images():
    """Scores go with the images through the subset and the shuffle."""
    ids = np.array([9, 3, 17, 4, 0, 11, 12, 13])
    subset = take(source(20), ids, scores=ids[:, None] * np.array([[1.0, 10.0]]))
    assert subset.size == 8
    np.testing.assert_array_equal(subset.all()["label"], ids)
    for batch in batches(subset, B, steps=4, seed=0):
        np.testing.assert_array_equal(
            batch["scores"], np.asarray(batch["label"])[:, None] * [[1, 10]]
        )
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], np.asarray(batch["label"]) * 4)


def test_a_subset_shows_and_names_its_images():
    whole = source(20)._replace(names=tuple(f"{i}.png" for i in range(20)))
    ids = np.array([9, 3, 17])
    subset = take(take(whole, np.arange(1, 20)), ids - 1)
    np.testing.assert_array_equal(subset.shown(np.array([2, 0])), whole.shown(np.array([17, 9])))
    np.testing.assert_array_equal(subset.labels, ids)
    assert subset.names == ("9.png", "3.png", "17.png") and take(source(20), ids).names == ()


def test_arrays_without_labels_are_a_source():
    plain = in_memory(x=np.arange(5))
    assert len(plain.labels) == 0 and len(take(plain, np.array([1, 2])).labels) == 0
    np.testing.assert_array_equal(take(plain, np.array([3, 1])).all()["x"], [3, 1])


@pytest.mark.parametrize("size", [1, 4, 5, 20, 30])
def test_chunks_come_in_order_with_what_is_done(size):
    ids = np.arange(20)[::-1]
    got = list(ahead(lambda some: some * 2, ids, size))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in got]), ids * 2)
    assert [done for done, _ in got] == [min(k * size, 20) for k in range(1, -(-20 // size) + 1)]
    assert not list(ahead(lambda some: some, ids[:0], size))


def test_arrays_of_different_lengths_are_no_source():
    with pytest.raises(ValueError, match="'image': 3, 'label': 2"):
        in_memory(image=np.zeros((3, 1)), label=np.zeros(2))


# digits


def test_digits():
    """1,437 in the pool and 360 outside, all of scikit-learn's, none in both."""
    from sklearn.datasets import load_digits

    data = load("digits")
    pool, evaluation = data.pool.all(), data.evaluation.all()
    assert (data.name, data.classes, data.shape) == ("digits", 10, (8, 8, 1))
    assert pool["image"].shape == (1437, 8, 8, 1) and evaluation["image"].shape == (360, 8, 8, 1)
    assert data.pool.size == 1437 and data.evaluation.size == 360
    for part in (pool, evaluation):
        assert part["image"].dtype == np.uint8 and part["label"].dtype == np.int32
        assert set(part["label"]) == set(range(10))

    given, labels = load_digits(return_X_y=True)
    both = [
        (i.tobytes(), int(n))
        for part in (pool, evaluation)
        for i, n in zip(*part.values(), strict=True)
    ]
    whole = [
        (np.round(i * 255 / 16).astype(np.uint8).tobytes(), int(n))
        for i, n in zip(given, labels, strict=True)
    ]
    assert sorted(both) == sorted(whole)
    assert not {i.tobytes() for i in pool["image"]} & {i.tobytes() for i in evaluation["image"]}


def test_digits_are_the_same_every_time():
    one, two = load("digits"), load("digits")
    assert one.digest == two.digest and len(one.digest) == 64
    np.testing.assert_array_equal(one.pool.all()["image"], two.pool.all()["image"])


def test_digits_take_no_files(tmp_path):
    for paths in (("x.npz", ""), ("", "x.npz")):
        with pytest.raises(ValueError, match="data.source=arrays"):
            load("digits", *paths)


def test_an_unknown_source_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'mnist' is unknown; choose one of digits, arrays"):
        load("mnist")
    assert set(SOURCES) == {"digits", "arrays", "folder", "tfds"}


def test_what_is_shown_of_arrays_is_what_is_read():
    data = load("digits")
    for part in (data.pool, data.evaluation):
        rows = part.all()
        np.testing.assert_array_equal(part.shown(np.arange(part.size)), rows["image"])
        np.testing.assert_array_equal(part.labels, rows["label"])
        assert part.labels.dtype == np.int32 and part.names == () and data.class_names == ()


def test_the_normalisation_can_be_given():
    data = load("digits", mean=(0.25,), std=(0.5,))
    assert (data.mean, data.std) == ((0.25,), (0.5,))
    assert load("digits", mean=(0.25,)).std == load("digits").std
    assert data.digest != load("digits").digest  # what a network is shown is another thing


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_a_limit_keeps_images_spread_over_the_whole(limit):
    whole, some = load("digits"), load("digits", limit=limit)
    for all_of, part in ((whole.pool, some.pool), (whole.evaluation, some.evaluation)):
        assert part.size == limit
        ids = [k * all_of.size // limit for k in range(limit)]
        np.testing.assert_array_equal(part.all()["image"], all_of.all()["image"][ids])
        np.testing.assert_array_equal(part.labels, all_of.labels[ids])
    assert some.digest != whole.digest and some.classes == 10
    assert load("digits", limit=10_000).pool.size == 1437
    with pytest.raises(ValueError, match="data.limit -1 "):
        load("digits", limit=-1)


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(mean=(0.1, 0.2, 0.3)), "data.mean .* must be 1 numbers"),
        (dict(mean=(128.0,)), r"data.mean \(128.0,\)"),
        (dict(std=(0.0,)), r"data.std \(0.0,\)"),
        (dict(std=(float("nan"),)), "data.std"),
        (dict(mean=(-0.1,)), "data.mean"),
        (dict(cache="there"), "data.cache is not read by data.source=digits"),
    ],
)
def test_keys_that_do_not_fit_arrays_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        load("digits", **more)


# arrays

RNG = np.random.default_rng(0)
GOOD = {
    "image": RNG.integers(0, 256, (6, 5, 4, 3), np.uint8),
    "label": np.array([0, 3, 1, 1, 0, 2]),
}
OTHER = {"image": RNG.integers(0, 256, (3, 5, 4, 3), np.uint8), "label": np.array([4, 0, 2])}


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def good(tmp_path):
    return save(tmp_path / "good.npz", **GOOD)


@pytest.fixture
def other(tmp_path):
    return save(tmp_path / "other.npz", **OTHER)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("label", [np.int64, np.int32, np.uint8, np.uint16, ">i4"])
def test_arrays(tmp_path, write, label):
    """Images, labels, number of classes over both files, and the pool's statistics as numpy has
    them."""
    write(tmp_path / "pool.npz", image=GOOD["image"], label=GOOD["label"].astype(label))
    write(tmp_path / "test.npz", image=OTHER["image"], label=OTHER["label"].astype(label))
    data = load("arrays", str(tmp_path / "pool.npz"), str(tmp_path / "test.npz"))
    assert (data.name, data.classes, data.shape) == ("pool", 5, (5, 4, 3))
    for part, given in ((data.pool, GOOD), (data.evaluation, OTHER)):
        assert part.size == len(given["image"])
        for name in ("image", "label"):
            np.testing.assert_array_equal(part.all()[name], given[name])
        assert part.all()["image"].dtype == np.uint8 and part.all()["label"].dtype == np.int32
    np.testing.assert_allclose(data.mean, (GOOD["image"] / 255.0).mean((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(data.std, (GOOD["image"] / 255.0).std((0, 1, 2)), rtol=1e-10)


def test_statistics_of_the_digits_are_numpys():
    data = load("digits")
    pixels = data.pool.all()["image"] / 255.0
    np.testing.assert_allclose([*data.mean, *data.std], [pixels.mean(), pixels.std()], rtol=1e-10)


def test_a_constant_channel_can_be_divided_by(tmp_path, other):
    images = GOOD["image"].copy()
    images[..., 1] = 77
    data = load("arrays", save(tmp_path / "flat.npz", image=images, label=GOOD["label"]), other)
    assert all(s > 0 for s in data.std)
    np.testing.assert_allclose(data.mean[1], 77 / 255)


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 1)])
def test_grey_images_have_one_channel(tmp_path, shape):
    grey = save(
        tmp_path / "grey.npz", image=GOOD["image"][..., 0].reshape(shape), label=GOOD["label"]
    )
    test = save(tmp_path / "test.npz", image=OTHER["image"][..., 0], label=OTHER["label"])
    data = load("arrays", grey, test)
    assert data.shape == (5, 4, 1) and len(data.mean) == len(data.std) == 1
    np.testing.assert_array_equal(data.pool.all()["image"][..., 0], GOOD["image"][..., 0])


def test_the_digest_is_of_all_images_and_labels(tmp_path, good, other):
    """Not of the files' names, nor of what else is in them."""
    digest = load("arrays", good, other).digest
    assert (
        load("arrays", save(tmp_path / "again.npz", **GOOD, note=np.zeros(3)), other).digest
        == digest
    )
    images, labels = GOOD["image"].copy(), GOOD["label"].copy()
    images[2, 1, 1, 1] ^= 1
    labels[3] = 2
    assert (
        load("arrays", save(tmp_path / "a.npz", image=images, label=GOOD["label"]), other).digest
        != digest
    )
    assert (
        load("arrays", save(tmp_path / "b.npz", image=GOOD["image"], label=labels), other).digest
        != digest
    )
    assert load("arrays", other, good).digest != digest
    # Each side has its own, so that an evaluation image less is no other pool.
    fewer = {name: array[:-1] for name, array in OTHER.items()}
    one, two = load("arrays", good, other), load("arrays", good, save(tmp_path / "c.npz", **fewer))
    assert one.pool_digest == two.pool_digest and one.evaluation_digest != two.evaluation_digest


def with_nan(images):
    images = images.astype(np.float32)
    images[[1, 4], 0, 0, 0] = np.nan
    return images


IMAGE, LABEL = GOOD["image"], GOOD["label"]
BAD = {
    "labels": (dict(image=IMAGE, labels=LABEL), "no array 'label'.*'labels'.*save image alone"),
    "no image": (dict(label=LABEL), "'image'"),
    "other names": (dict(x=IMAGE, y=LABEL), r"'image'.*\['x', 'y'\]"),
    "nothing": (dict(), "'image'"),
    "rank 1": (dict(image=IMAGE[:, 0, 0, 0], label=LABEL), r"shape \(6,\)"),
    "rank 2": (dict(image=IMAGE.reshape(6, -1), label=LABEL), r"shape \(6, 60\)"),
    "rank 5": (dict(image=IMAGE[None], label=LABEL), r"shape \(1, 6, 5, 4, 3\)"),
    "a scalar": (dict(image=np.uint8(3), label=LABEL), r"shape \(\)"),
    "two channels": (dict(image=IMAGE[..., :2], label=LABEL), r"shape \(6, 5, 4, 2\)"),
    "channels first": (dict(image=np.moveaxis(IMAGE, -1, 1), label=LABEL), r"shape \(6, 3, 5, 4\)"),
    "NaN": (dict(image=with_nan(IMAGE), label=LABEL), "NaN in 2 of 6"),
    "float": (dict(image=IMAGE / 255, label=LABEL), "float64"),
    "int64": (dict(image=IMAGE.astype(int), label=LABEL), "int64"),
    "bool": (dict(image=IMAGE > 9, label=LABEL), "bool"),
    "complex": (dict(image=IMAGE * 1j, label=LABEL), "complex128"),
    "text": (dict(image=IMAGE.astype(str), label=LABEL), "<U3"),
    "no images": (dict(image=IMAGE[:0], label=LABEL[:0]), "no image"),
    "no pixels": (dict(image=IMAGE[:, :0], label=LABEL), r"0, 4, 3\)"),
    "negative label": (dict(image=IMAGE, label=LABEL - 1), "-1 is negative"),
    "float label": (dict(image=IMAGE, label=LABEL / 2), "float64"),
    "bool label": (dict(image=IMAGE, label=LABEL > 1), "bool"),
    "text label": (dict(image=IMAGE, label=LABEL.astype(str)), "<U"),
    "a label too few": (dict(image=IMAGE, label=LABEL[:-1]), r"\(5,\).*\[6\]"),
    "one-hot label": (dict(image=IMAGE, label=np.eye(4)[LABEL].astype(int)), r"\(6, 4\).*\[6\]"),
    "one label": (dict(image=IMAGE, label=np.int64(3)), r"\(\).*\[6\]"),
    "a label that int32 cannot hold": (dict(image=IMAGE, label=LABEL + 2**32), "429496729"),
}


def refused(path, message, *paths):
    """The one line that `load` refuses a file with; it has the path and names the problem."""
    with pytest.raises(ValueError) as error:
        load("arrays", *paths)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and str(path) in text and len(text) > len(str(path)) + 5
    assert re.search(message, text.replace(str(path), ""))


@pytest.mark.parametrize("arrays, message", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_by_name(tmp_path, other, arrays, message):
    """As the pool and as the evaluation images."""
    bad = save(tmp_path / "bad file.npz", **arrays)
    refused(bad, message, bad, other)
    refused(bad, message, other, bad)


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def zipped(compression=zipfile.ZIP_STORED, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


WHOLE = zipped(image=npy(IMAGE), label=npy(LABEL))
BROKEN = {
    "empty": (b"", "[Nn]o data"),
    "text": (b"image,label\n1,2\n", "npz"),
    "one array": (npy(IMAGE), "npz"),
    "half": (WHOLE[: len(WHOLE) // 2], "zip"),
    "all but a byte": (WHOLE[:-1], "zip"),
    "a short array": (zipped(image=npy(IMAGE)[:-7], label=npy(LABEL)), "360 bytes"),
    "a short header": (zipped(image=npy(IMAGE)[:40], label=npy(LABEL)), "header"),
    "no header": (zipped(image=b"", label=npy(LABEL)), "image"),
    "no array": (zipped(image=b"\xff\xd8\xff\xe0 a photograph", label=npy(LABEL)), "image"),
    "no array of labels": (zipped(image=npy(IMAGE), label=b"0,1,2,3,0,1"), "label"),
    "a bad header": (
        zipped(image=npy(IMAGE).replace(b"{'descr'", b"['descr'"), label=npy(LABEL)),
        "header",
    ),
    "an unknown type": (
        zipped(image=npy(IMAGE).replace(b"'|u1'", b"'|?9'"), label=npy(LABEL)),
        "type",
    ),
}


@pytest.mark.parametrize("content, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path, other, content, message):
    bad = tmp_path / "broken.npz"
    bad.write_bytes(content)
    refused(bad, message, str(bad), other)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_anywhere_is_refused_or_harmless(tmp_path, compression):
    """Each byte of a file turned over, and the file cut off at each: the same data, or one line
    with the path."""
    small = dict(image=GOOD["image"][:2, :2], label=GOOD["label"][:2])
    other = save(tmp_path / "small.npz", image=OTHER["image"][:, :2], label=OTHER["label"])
    whole = zipped(compression, **{name: npy(array) for name, array in small.items()})
    bad = tmp_path / "damaged.npz"
    wrong = []
    for at in range(len(whole)):
        for damage, content in (
            ("cut off", whole[:at]),
            ("turned over", whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]),
        ):
            bad.write_bytes(content)
            try:
                data = load("arrays", str(bad), other)
                if not all(np.array_equal(data.pool.all()[name], small[name]) for name in small):
                    wrong.append(f"{damage} at {at}: other data")
            except ValueError as error:
                if str(bad) not in str(error) or len(str(error).splitlines()) != 1:
                    wrong.append(f"{damage} at {at}: {error!r}")
            except Exception as error:
                wrong.append(f"{damage} at {at}: {error!r}")
    assert not wrong, f"{len(wrong)} of {2 * len(whole)}: " + "; ".join(wrong[:6])


def test_a_missing_file_is_refused(tmp_path, good):
    for missing in (tmp_path / "none.npz", tmp_path):
        refused(missing, "no such file", str(missing), good)
        refused(missing, "no such file", good, str(missing))


def test_the_pool_must_be_named(good):
    for paths in (("", ""), ("", good)):
        with pytest.raises(ValueError, match="data.path=.*data.eval_path="):
            load("arrays", *paths)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["image", "label"])
def test_pickled_objects_are_refused_and_not_executed(tmp_path, other, name):
    mark = tmp_path / "executed"
    arrays = {**GOOD, name: np.array([Payload(mark)] * 6, object)}
    bad = save(tmp_path / "evil.npz", **arrays)
    refused(bad, "(?i)object|pickle", bad, other)
    refused(bad, "(?i)object|pickle", other, bad)
    assert not mark.exists()
    with np.load(bad, allow_pickle=True) as file:  # that the payload works
        file[name]
    assert mark.exists()


@pytest.mark.parametrize("label", [9, 10**6, 10**9])
def test_more_classes_than_images_are_a_mistake(tmp_path, good, label):
    """They would take gigabytes; and one class an image is none."""
    labels = OTHER["label"].copy()
    labels[1] = label
    bad = save(tmp_path / "bad.npz", image=OTHER["image"], label=labels)
    said = rf"label {label} of image 1 would make {label + 1} classes, and there are 9 images"
    refused(bad, said, bad, good)
    refused(bad, said, good, bad)
    labels[1] = 8
    assert load("arrays", good, save(bad, image=OTHER["image"], label=labels)).classes == 9


def test_class_numbers_that_no_image_has_are_said(tmp_path, good):
    """Images of either side count; a folder's classes have their names."""
    labels = OTHER["label"].copy()
    labels[1] = 8
    gaps = save(tmp_path / "gaps.npz", image=OTHER["image"], label=labels)
    data = load("arrays", good, gaps)
    have = {*GOOD["label"].tolist(), *labels.tolist()}
    lacking = [str(number) for number in range(9) if number not in have]
    (line,) = class_warnings(data)
    assert f"{len(lacking)} of 9 classes have no image: {', '.join(lacking[:5])}" in line
    (line,) = class_warnings(data, most=2)
    assert f": {', '.join(lacking[:2])} and {len(lacking) - 2} more;" in line
    assert class_warnings(load("digits")) == []


def test_the_two_files_must_have_images_of_one_shape(tmp_path, good):
    small = save(tmp_path / "small.npz", image=OTHER["image"][:, :4], label=OTHER["label"])
    refused(small, r"\(5, 4, 3\).*\(4, 4, 3\)", good, small)
    refused(good, r"\(5, 4, 3\).*\(4, 4, 3\)", good, small)


def test_evaluation_images_that_are_in_the_pool_are_counted_and_refused(tmp_path, good):
    """With another label too, and each of several equal ones."""
    images = np.concatenate(
        [OTHER["image"], GOOD["image"][[2]], GOOD["image"][[5]], GOOD["image"][[5]]]
    )
    mixed = save(tmp_path / "mixed.npz", image=images, label=np.zeros(6, int))
    with pytest.raises(
        ValueError,
        match="^3 of 6 evaluation images are in the pool too: number 3 is the pool's number 2;",
    ):
        load("arrays", good, mixed)
    with pytest.raises(ValueError, match="^6 of 6 evaluation images"):
        load("arrays", good, good)
