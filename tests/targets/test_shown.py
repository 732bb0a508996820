"""What a target is shown: the numbers of other libraries, and nothing that is guessed."""

import numpy as np
import pytest
import torch
from PIL import Image

from qmx.targets.shown import Shown, image_shape, name, prepare, resolved

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 12, 9, 3), np.uint8)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def shown(images=IMAGES, dtype="", sizes=(), **keys):
    return prepare(images, resolved(Shown(**keys), images.shape[1:], dtype, list(sizes)))


def test_as_they_are():
    """Nothing said and nothing asked for: the very pixels, under the old name."""
    found = resolved(Shown(), (12, 9, 3), "", [])
    assert prepare(IMAGES, found) is IMAGES and name(found) == "as-is"


def test_as_torchvision():
    """ToTensor and Normalize, in torch's own arithmetic, within a rounding."""
    got = shown(dtype="float32", layout="nchw", scale=1, mean=MEAN, std=STD)
    x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float().div(255)
    want = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6, atol=1e-6)


def test_as_keras():
    """0..1, -1..1 and 0..255, in the axes' own order."""
    x = IMAGES.astype(np.float32)
    np.testing.assert_allclose(shown(dtype="float32", scale=1), x / 255, rtol=1e-6)
    both = shown(dtype="float32", scale=1, mean=(0.5,), std=(0.5,))
    np.testing.assert_allclose(both, x / 127.5 - 1, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(shown(dtype="float32", scale=255), x)
    assert shown(dtype="float16", scale=1).dtype == np.float16
    caffe = shown(dtype="float32", scale=255, mean=(123.68, 116.779, 103.939))
    np.testing.assert_allclose(caffe, x - np.array([123.68, 116.779, 103.939], "f"), atol=1e-4)


@pytest.mark.parametrize("how", ["nearest", "bilinear", "bicubic", "lanczos", "box"])
def test_of_another_size(how):
    """Pillow's resizing, of colour and of grey."""
    resample = Image.Resampling[how.upper()]
    got = shown(size=20, interpolation=how)
    want = [np.asarray(Image.fromarray(image).resize((20, 20), resample)) for image in IMAGES]
    np.testing.assert_array_equal(got, np.stack(want))
    grey = IMAGES[..., :1]
    want = Image.fromarray(grey[2, ..., 0]).resize((5, 5), resample)
    np.testing.assert_array_equal(shown(grey, size=5, interpolation=how)[2, ..., 0], want)


def test_channels():
    grey = IMAGES[..., :1]
    np.testing.assert_array_equal(shown(grey, channels=3), np.repeat(grey, 3, -1))
    luma = np.asarray(Image.fromarray(IMAGES[1]).convert("L"))
    np.testing.assert_array_equal(shown(channels=1)[1, ..., 0], luma)


def test_the_layout_is_what_fits():
    """The shape that the target says decides, if one alone fits; the user's word stands."""
    assert resolved(Shown(), (12, 9, 3), "", [-1, 3, 12, 9]).layout == "nchw"
    assert resolved(Shown(), (12, 9, 3), "", [-1, 12, 9, 3]).layout == "nhwc"
    assert resolved(Shown(), (12, 9, 3), "", [-1, -1, -1, -1]).layout == "nhwc"
    assert resolved(Shown(layout="nchw"), (3, 3, 3), "", [-1, 3, 3, 3]).layout == "nchw"
    assert image_shape(Shown(layout="nchw", size=7, channels=1), (12, 9, 3)) == (1, 7, 7)


@pytest.mark.parametrize(
    ("keys", "dtype", "sizes", "message"),
    [
        ({}, "float32", [], r"takes float32.*scale=1 for 0..1.*0.485.*-1..1.*scale=255"),
        ({"dtype": "float32"}, "", [], "nobody says in what numbers"),
        ({"scale": 1.0}, "uint8", [], "takes uint8; leave them out$"),
        ({"scale": 1.0}, "", [], "leave them out, or set target.shown.dtype=float32$"),
        ({"mean": MEAN}, "", [], "takes uint8"),
        ({}, "", [-1, 224, 224, 3], r"shape \[-1, 224, 224, 3\] and images are shown as \[-1, 12"),
        ({"layout": "nhwc"}, "", [-1, 3, 12, 9], "target.shown.size, .channels and .layout"),
        ({"scale": 1.0, "std": (1.0, 2.0)}, "float32", [], r"std \(1.0, 2.0\) must have 3 numbers"),
    ],
)
def test_refused(keys, dtype, sizes, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolved(Shown(**keys), (12, 9, 3), dtype, sizes)
    assert len(str(caught.value).splitlines()) == 1


def test_names_tell_all_apart():
    """No two ways share a name: it is in the ledger's keys."""
    ways = [
        resolved(Shown(**keys), (12, 9, 3), "", [])
        for keys in (
            {},
            {"layout": "nchw"},
            {"size": 20},
            {"size": 20, "interpolation": "bicubic"},
            {"channels": 1},
            {"dtype": "float32", "scale": 1.0},
            {"dtype": "float16", "scale": 1.0},
            {"dtype": "float32", "scale": 255.0},
            {"dtype": "float32", "scale": 1.0, "mean": MEAN},
            {"dtype": "float32", "scale": 1.0, "std": STD},
            {"dtype": "float32", "scale": 1.0, "mean": MEAN, "std": STD},
        )
    ]
    assert len({name(way) for way in ways}) == len(ways)
