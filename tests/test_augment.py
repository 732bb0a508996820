"""The views of an image, against Pillow, torch, scipy, colorsys and numpy."""

import colorsys
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from PIL import Image, ImageEnhance, ImageFilter

from qmx import augment
from qmx.augment import (
    adjust_hue,
    blend,
    colour_jitter,
    crop_and_resize,
    crop_box,
    gaussian_blur,
    grey,
    make_view,
    plain_view,
    weak_view,
)

LEVEL = 1 / 255  # one step of uint8
LUMA = np.array([0.299, 0.587, 0.114])
RAW = {"mean": (0, 0, 0), "std": (1, 1, 1)}
WHOLE = {"crop_scale": (1, 1), "crop_ratio": (1, 1)}  # of a square image
STILL = {"jitter_p": 0, "grey_p": 0, "blur_p": 0, "flip_p": 0}
# a right implementation fails a test of a distribution this seldom, whatever the key.
UNLIKELY = 1e-6


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height, width):
    """A colour image without fine detail and without saturated colours, uint8."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(7 * x + 2 * y), np.cos(5 * y - 3 * x), np.sin(4 * x * y + 1)]
    return np.uint8(np.round(127 + 90 * np.stack(waves, -1)))


def pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def unpillow(image):
    array = np.asarray(image, np.float64) / 255
    return array if array.ndim == 3 else array[..., None]


@functools.lru_cache
def quick(function, static=()):
    """jit without the compiler's optimisations, as everything here compiles far longer than it
    runs."""
    return jax.jit(
        function, static_argnums=static, compiler_options={"xla_backend_optimization_level": 0}
    )


def crop(image, box, size):
    return quick(crop_and_resize, 2)(
        jnp.asarray(image, jnp.float32), jnp.array(box, jnp.float32), size
    )


cached_view = functools.lru_cache(make_view)  # the tests that share a view share its compilation


def views(view, images, seed=0, **batch):
    """What the view makes of a batch of uint8 images, as numpy."""
    return np.asarray(quick(view)(jax.random.key(seed), {"image": jnp.asarray(images), **batch}))


def repeat(image, count):
    return np.broadcast_to(image, (count, *image.shape))


def assert_share(happened, p):
    """As many as a binomial of probability p gives, within five standard deviations."""
    happened = np.asarray(happened)
    assert abs(happened.mean() - p) <= 5 * math.sqrt(p * (1 - p) / happened.size), (
        happened.mean(),
        p,
    )


def assert_uniform(values, low, high):
    values = np.asarray(values, np.float64)
    assert low - 1e-3 <= values.min() and values.max() <= high + 1e-3
    assert scipy.stats.kstest(values, "uniform", (low, high - low)).pvalue > UNLIKELY


def assert_same_distribution(values, wanted):
    """The mean and the quantiles. Ties, as of whole pixels, only make the second more lenient."""
    error = 5 * math.hypot(
        np.std(values) / math.sqrt(len(values)), np.std(wanted) / math.sqrt(len(wanted))
    )
    assert abs(np.mean(values) - np.mean(wanted)) <= error
    assert scipy.stats.ks_2samp(values, wanted, method="asymp").pvalue > UNLIKELY


# References that are slow and plain.


def reference_boxes(count, height, width, scale, ratio, seed=0):
    """torchvision's RandomResizedCrop.get_params, as (top, left, height, width)."""
    rng = np.random.default_rng(seed)

    def one():
        for _ in range(10):
            area = height * width * rng.uniform(*scale)
            aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
        w, h = width, height
        if width / height < ratio[0]:
            h = round(w / ratio[0])
        elif width / height > ratio[1]:
            w = round(h * ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w

    return np.array([one() for _ in range(count)])


def reference_hue(image, shift):
    def turn(pixel):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((h + shift) % 1, s, v)

    return np.apply_along_axis(turn, -1, image)


def reference_jitter(image, factors, shift, order):
    colour = image.shape[-1] == 3
    for op in order:
        luma = (image @ LUMA)[..., None] if colour else image
        if op == 3:
            image = reference_hue(image, shift) if colour else image
        else:
            other = (np.zeros_like(image), np.full_like(image, luma.mean()), luma)[op]
            image = np.clip(other + factors[op] * (image - other), 0, 1)
    return image


# Crop and resize.

BOXES = [  # (top, left, height, width), size
    ((0, 0, 40, 56), 16),  # the whole image, shrunk
    ((3, 5, 30, 41), 24),  # shrunk a little
    ((0, 20, 39, 36), 7),  # shrunk much, at an edge
    ((10, 11, 12, 9), 32),  # enlarged
    ((33, 49, 7, 7), 64),  # enlarged much, in a corner
    ((8, 0, 4, 56), 16),  # enlarged in height, shrunk in width
    ((17, 23, 1, 1), 5),  # one pixel
    ((12, 30, 16, 16), 16),  # only cut out
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("box, size", BOXES)
def test_crop_matches_pillow(box, size, channels):
    """Pillow's crop, then resize with antialias; Pillow rounds twice to uint8."""
    image = noise(40, 56, channels)
    top, left, height, width = box
    wanted = (
        pillow(image)
        .crop((left, top, left + width, top + height))
        .resize((size, size), Image.Resampling.BILINEAR)
    )
    got = crop(image / 255, box, size)
    assert got.shape == (size, size, channels)
    np.testing.assert_allclose(got, unpillow(wanted), atol=1.5 * LEVEL)


@pytest.mark.parametrize("box, size", BOXES)
def test_crop_matches_torch(box, size):
    """torch's antialiased bilinear interpolation of the cut-out pixels, in float32."""
    image = np.float32(noise(40, 56) / 255)
    top, left, height, width = box
    cut = torch.from_numpy(image[top : top + height, left : left + width]).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(
        cut, (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    got = crop(image, box, size)
    np.testing.assert_allclose(got, wanted[0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_crop_of_the_whole_image_is_the_image():
    """At its own size an image is not resampled, and neither is a part of it."""
    image = np.float32(noise(32, 32) / 255)
    got = crop(image, (0, 0, 32, 32), 32)
    np.testing.assert_array_equal(got, image)
    got = crop(image, (5, 9, 20, 20), 20)
    np.testing.assert_array_equal(got, image[5:25, 9:29])


def test_crop_does_not_look_past_its_box():
    """What lies outside the box has no influence, not even on the edge of a resized crop."""
    image = noise(24, 24) / 255
    other = 1 - image
    other[4:14, 6:20] = image[4:14, 6:20]
    for size in (5, 11, 40):
        np.testing.assert_array_equal(*(crop(x, (4, 6, 10, 14), size) for x in (image, other)))


# The box.


DRAWN = 10_000
boxes_of = jax.vmap(crop_box, (0, None, None, None))


def draw_boxes(count, *of, seed=0):
    """The first so many boxes of `DRAWN`: one program for all sizes, scales and ratios."""
    keys = jax.random.split(jax.random.key(seed), DRAWN)
    height, width, scale, ratio = of
    given = np.float32([[height, width], scale, ratio])
    return np.asarray(quick(boxes_of)(keys, *given))[:count]


@pytest.mark.parametrize(
    "height, width, scale, ratio",
    [
        (224, 224, (0.2, 1), (3 / 4, 4 / 3)),
        (375, 500, (0.08, 1), (3 / 4, 4 / 3)),
        (32, 32, (0.2, 1), (3 / 4, 4 / 3)),
        (90, 210, (0.2, 1), (3 / 4, 4 / 3)),  # several tries fail, and sometimes all of them
        (120, 80, (0.3, 0.5), (0.5, 1)),
    ],
)
def test_crop_box_has_the_distribution_of_torchvision(height, width, scale, ratio):
    """Share of the area, aspect ratio, sides and place over many draws."""
    count = 10_000
    got = np.float64(draw_boxes(count, height, width, scale, ratio))
    wanted = reference_boxes(count, height, width, scale, ratio)
    for column in range(4):
        assert_same_distribution(got[:, column], wanted[:, column])
    for of_box in (
        lambda box: box[:, 2] * box[:, 3] / (height * width),
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] + box[:, 2] / 2,
        lambda box: box[:, 1] + box[:, 3] / 2,
    ):
        assert_same_distribution(of_box(got), of_box(wanted))


@pytest.mark.parametrize("height, width", [(64, 48), (375, 500), (7, 9)])
def test_crop_box_is_inside_the_image(height, width):
    """Whole pixels, inside, with an area and a ratio in their ranges but for the rounding of the
    sides."""
    scale, ratio = (0.2, 1), (3 / 4, 4 / 3)
    top, left, h, w = draw_boxes(5000, height, width, scale, ratio).T
    for values in (top, left, h, w):
        np.testing.assert_array_equal(values, np.round(values))
    assert h.min() >= 1 and w.min() >= 1 and top.min() >= 0 and left.min() >= 0
    assert (top + h).max() <= height and (left + w).max() <= width
    # The sides before rounding are within half a pixel.
    assert np.all((h + 0.5) * (w + 0.5) >= scale[0] * height * width)
    assert np.all((h - 0.5) * (w - 0.5) <= scale[1] * height * width)
    assert np.all((w + 0.5) / (h - 0.5) >= ratio[0]) and np.all((w - 0.5) / (h + 0.5) <= ratio[1])


def test_crop_box_reaches_every_place():
    """Each top and left from 0 to the last that fits is drawn equally often."""
    boxes = draw_boxes(8000, 12, 12, (0.25, 0.25), (1, 1))
    np.testing.assert_array_equal(boxes[:, 2:], 6)
    for column in range(2):
        assert (
            scipy.stats.chisquare(np.bincount(np.int64(boxes[:, column]), minlength=7)).pvalue
            > UNLIKELY
        )
    pairs = np.bincount(np.int64(7 * boxes[:, 0] + boxes[:, 1]), minlength=49)
    assert scipy.stats.chisquare(pairs).pvalue > UNLIKELY


@pytest.mark.parametrize(
    "height, width, scale, wanted",
    [
        (10, 200, (0.2, 1), (0, 93, 10, 13)),
        (200, 10, (0.2, 1), (93, 0, 13, 10)),
        (9, 10, (1.3, 1.3), (0, 0, 9, 10)),  # no box of such an area fits; the ratio does
    ],
)
def test_crop_box_falls_back_to_the_centre(height, width, scale, wanted):
    """Where no try fits, the largest central box within the ratio, as torchvision's, for every
    key."""
    boxes = draw_boxes(100, height, width, scale, (3 / 4, 4 / 3))
    np.testing.assert_array_equal(boxes, np.broadcast_to(wanted, boxes.shape))
    np.testing.assert_array_equal(
        reference_boxes(1, height, width, scale, (3 / 4, 4 / 3))[0], wanted
    )


# Geometry of a view, read off an image whose colours are its coordinates.


def coordinates(side):
    """uint8[side, side, 3]: red is the place along the width and green along the height, over 256,
    exactly."""
    assert 256 % side == 0
    centre = (np.arange(side) + 0.5) * (256 / side)
    red, green = np.meshgrid(centre, centre)
    return np.uint8(np.stack([red, green, np.full_like(red, 153)], -1))


def read_boxes(out):
    """(top, left, height, width) of each view of `coordinates`, in shares of the image, and whether
    it is mirrored.

    Exact where nothing is shrunk; the middle half is read, as an enlarged crop is flat at its
    edges.
    """
    size = out.shape[1]
    first, last = size // 4, 3 * size // 4
    ramps = np.float64(out) * 255 / 256
    x, y = ramps[..., 0].mean(1), ramps[..., 1].mean(2)
    slopes = [(line[:, last] - line[:, first]) / (last - first) for line in (y, x)]
    mirrored = slopes[1] < 0
    starts = [
        line[:, first] - (first + 0.5) * slope for line, slope in zip((y, x), slopes, strict=True)
    ]
    left = np.where(mirrored, starts[1] + size * slopes[1], starts[1])
    return np.stack([starts[0], left, size * slopes[0], size * abs(slopes[1])], -1), mirrored


def test_crop_is_drawn_in_the_pixels_of_the_original():
    """On a squashed canvas the box has whole pixels, area and ratio of the original image."""
    count, side, height, width = 400, 64, 120, 400
    size = np.float32([[height, width]] * count)
    view = cached_view(side, **STILL, **RAW)
    boxes, _ = read_boxes(views(view, repeat(coordinates(side), count), size=size))
    boxes *= [height, width, height, width]
    np.testing.assert_allclose(boxes, np.round(boxes), atol=0.05)
    wanted = reference_boxes(10_000, height, width, (0.2, 1), (3 / 4, 4 / 3))
    for column in range(4):
        assert_same_distribution(np.round(boxes[:, column]), wanted[:, column])
    assert_same_distribution(
        np.round(boxes[:, 2]) * np.round(boxes[:, 3]), wanted[:, 2] * wanted[:, 3]
    )


def test_crop_of_a_squashed_canvas_looks_like_the_crop_of_the_original():
    """The view agrees with Pillow's crop of the image before it was squashed to 256 by 256."""
    count, height, width, size = 8, 180, 420, 64
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width])[:, None, None]
    waves = 127 + 80 * np.sin(6 * x) * np.cos(5 * y)
    original = [Image.fromarray(np.float32(channel)) for channel in (256 * x, 256 * y, waves)]
    canvas = np.stack(
        [channel.resize((256, 256), Image.Resampling.BILINEAR) for channel in original], -1
    )
    canvas = np.uint8(np.round(np.clip(canvas, 0, 255)))
    sizes = np.float32([[height, width]] * count)
    out = views(make_view(size, **STILL, **RAW), repeat(canvas, count), size=sizes)

    boxes, _ = read_boxes(out)
    boxes = np.round(boxes * [height, width, height, width]).astype(int)
    assert len(np.unique(boxes, axis=0)) == count
    for (top, left, h, w), got in zip(boxes, out, strict=True):
        cut = [
            channel.crop((left, top, left + w, top + h)).resize(
                (size, size), Image.Resampling.BILINEAR
            )
            for channel in original
        ]
        np.testing.assert_allclose(got, np.stack(cut, -1) / 255, atol=0.015)


def test_every_example_has_a_size_of_its_own():
    """The boxes of one batch are whole pixels of four different images; a whole image is found
    again."""
    sizes = np.float32([[30, 90], [64, 64], [500, 333], [41, 70]] * 100)
    boxes, _ = read_boxes(
        views(cached_view(64, **STILL, **RAW), repeat(coordinates(64), 400), size=sizes)
    )
    boxes *= sizes[:, [0, 1, 0, 1]]
    np.testing.assert_allclose(boxes, np.round(boxes), atol=0.05)
    view = make_view(16, crop_scale=(1, 1), crop_ratio=(3, 3), **STILL, **RAW)
    out = views(
        view, repeat(noise(16, 16), 4), size=np.float32([[30, 90], [1, 3], [7, 21], [100, 300]])
    )
    np.testing.assert_allclose(out, repeat(noise(16, 16) / 255, 4), atol=1e-4)


# Colour.


def test_grey_matches_pillow():
    """The luma of Pillow's mode "L"; a grey image stays what it is."""
    image = noise(32, 32)
    got = grey(jnp.asarray(image) / 255)
    assert got.shape == (32, 32, 1)
    np.testing.assert_allclose(got, unpillow(pillow(image).convert("L")), atol=LEVEL)
    np.testing.assert_allclose(got[..., 0], image / 255 @ LUMA, atol=1e-6)
    single = jnp.asarray(noise(8, 8, 1)) / 255
    np.testing.assert_array_equal(grey(single), single)


BLENDS = [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]


@pytest.mark.parametrize("factor", [0, 0.35, 0.6, 1, 1.25, 1.4, 1.8])
@pytest.mark.parametrize("op, enhance", BLENDS)
def test_blends_match_pillow(op, enhance, factor):
    """Brightness, contrast and saturation; Pillow rounds the other image and cuts the result to
    uint8."""
    image = np.concatenate([noise(16, 24), smooth(16, 24)])
    x = np.float32(image / 255)
    luma = np.float32(x @ LUMA)[..., None]
    other = (np.zeros_like(x), np.full_like(x, luma.mean()), np.tile(luma, 3))[op]
    wanted = unpillow(enhance(pillow(image)).enhance(factor))
    np.testing.assert_allclose(quick(blend)(x, other, np.float32(factor)), wanted, atol=1.5 * LEVEL)
    factors = np.ones(3, np.float32)
    factors[op] = factor
    got = quick(colour_jitter)(x, factors, np.float32(0), np.arange(4))
    np.testing.assert_allclose(got, wanted, atol=1.5 * LEVEL)


def hard_colours():
    """Primaries, ties of two channels, greys, black, white, and colours that are almost grey;
    f32[8, 8, 3]."""
    corners = list(itertools.product([0, 0.5, 1], repeat=3))
    almost = [(0.5, 0.5, 0.5 + LEVEL), (0.5 + LEVEL, 0.5, 0.5), (LEVEL, 0, 0), (1, 1 - LEVEL, 1)]
    random = np.random.default_rng(0).uniform(size=(64 - len(corners) - len(almost), 3))
    return np.float32(np.concatenate([corners, almost, random]).reshape(8, 8, 3))


@pytest.mark.parametrize("shift", [-0.5, -0.4, -0.1, 0, 0.03, 0.1, 1 / 3, 0.5])
def test_hue_matches_colorsys(shift):
    """Pixel by pixel the hue of Python's own HSV."""
    image = hard_colours()
    got = quick(adjust_hue)(image, np.float32(shift))
    np.testing.assert_allclose(got, reference_hue(image, shift), atol=2e-5)


@pytest.mark.parametrize("steps", [-60, -25, 0, 7, 25, 100])
def test_hue_matches_pillow(steps):
    """The hue of Pillow's HSV, whose 256 steps are as coarse as 6/255 of a channel."""
    image = noise(32, 32)
    hue, saturation, value = pillow(image).convert("HSV").split()
    turned = Image.fromarray(np.uint8((np.int64(hue) + steps) % 256))
    wanted = unpillow(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))
    error = np.abs(
        np.asarray(quick(adjust_hue)(np.float32(image / 255), np.float32(steps / 255))) - wanted
    )
    assert error.max() < 13 * LEVEL and error.mean() < 3 * LEVEL


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_applies_the_four_in_every_order(channels):
    """All 24 orders, one operation after another, each clipped; strong factors, so that the order
    matters."""
    image = hard_colours()[..., :channels]
    orders = np.array(list(itertools.permutations(range(4))))
    factors, shift = np.float32([1.4, 1.7, 0.4]), 0.15
    got = quick(jax.vmap(colour_jitter, (None, None, None, 0)))(
        jnp.asarray(image), jnp.array(factors), jnp.float32(shift), jnp.asarray(orders)
    )
    wanted = np.stack(
        [reference_jitter(np.float64(image), factors, shift, order) for order in orders]
    )
    np.testing.assert_allclose(got, wanted, atol=3e-5)
    if channels == 3:  # the test can tell: brightness or hue, moved, changes the outcome
        assert (
            np.abs(wanted[:, None] - wanted[None]).max((2, 3, 4))[np.triu_indices(24, 1)].mean()
            > 0.05
        )


def test_jitter_leaves_what_it_must():
    """Factors of 1 and no shift change nothing; saturation and hue change nothing in a grey
    image."""

    def jitter(image, factors, shift):
        return quick(colour_jitter)(
            image, np.float32(factors), np.float32(shift), np.array([2, 0, 3, 1])
        )

    image = hard_colours()
    single = image[..., :1]
    triple = np.tile(single, 3)
    np.testing.assert_allclose(jitter(image, (1, 1, 1), 0), image, atol=1e-6)
    np.testing.assert_allclose(jitter(single, (1, 1, 0.2), 0.3), single, atol=1e-6)
    np.testing.assert_allclose(jitter(triple, (1, 1, 0.2), 0.3), triple, atol=1e-6)


# Blur.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1, 2])
@pytest.mark.parametrize("shape", [(24, 30), (5, 9)])  # the second is smaller than the radius
def test_blur_matches_scipy(shape, sigma, channels):
    """A Gaussian cut off at the radius, the edge repeated."""
    image, radius = noise(*shape, channels) / 255, 8
    wanted = scipy.ndimage.gaussian_filter(
        image, (sigma, sigma, 0), mode="nearest", truncate=radius / sigma
    )
    got = quick(gaussian_blur, 2)(np.float32(image), np.float32(sigma), radius)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.5, 1, 2])
def test_blur_matches_pillow(sigma):
    """The same strength as Pillow's GaussianBlur, which takes boxes on uint8 for it."""
    image = np.kron(noise(8, 8), np.ones((6, 6, 1), np.uint8))
    wanted = unpillow(pillow(image).filter(ImageFilter.GaussianBlur(sigma)))
    error = np.abs(
        np.asarray(quick(gaussian_blur, 2)(np.float32(image / 255), np.float32(sigma), 8)) - wanted
    )
    assert error.max() < 8 * LEVEL and error.mean() < 1.5 * LEVEL


# The whole view: what happens how often.


def affine_colours():
    """An image in which grey, blur, flip and jitter can all be told apart.

    One colour in four brightnesses, b = step * (left or right) + check * (even or odd): jitter
    moves them all together, a_c b + b_c for channel c, so it cannot change check / step.
    """
    y, x = np.mgrid[:8, :8]
    brightness = 10 + 3 * (x >= 4) + (x + y) % 2
    return np.uint8(brightness[..., None] * [9, 7, 5])


def read_operations(out):
    """Whether each view of `affine_colours` is grey, blurred, mirrored, and changed in brightness
    (see below)."""
    luma = out @ LUMA
    step = luma[:, :, 4:].mean((1, 2)) - luma[:, :, :4].mean((1, 2))
    signs = (-1.0) ** np.add.outer(np.arange(8), np.arange(8) + 1)
    check = 2 * (luma * signs).mean((1, 2))
    original = (affine_colours() / 255 @ LUMA).mean()
    is_grey = np.ptp(out, -1).max((1, 2)) < 1e-5
    is_blurred = np.abs(np.abs(check / step) - 1 / 3) > 1e-3
    return is_grey, is_blurred, step < 0, np.abs(luma.mean((1, 2)) - original) > 1e-5


def test_default_recipe_happens_as_often_as_published():
    """MoCo v2: jitter 0.8, grey 0.2, blur 0.5, flip 0.5, independently of each other."""
    count = 10_000
    # A blur of less than half a pixel would not be seen.
    view = make_view(8, **WHOLE, **RAW, blur_sigma=(0.5, 2.0))
    is_grey, is_blurred, is_mirrored, is_changed = read_operations(
        views(view, repeat(affine_colours(), count))
    )
    is_jittered = is_changed[~is_blurred]  # a blur changes the mean too
    for happened, p in ((is_grey, 0.2), (is_blurred, 0.5), (is_mirrored, 0.5), (is_jittered, 0.8)):
        assert_share(happened, p)
    for one, other, p in (
        (is_grey, is_blurred, 0.1),
        (is_grey, is_mirrored, 0.1),
        (is_blurred, is_mirrored, 0.25),
        (is_jittered, is_grey[~is_blurred], 0.16),
        (is_jittered, is_mirrored[~is_blurred], 0.4),
    ):
        assert_share(one & other, p)


@pytest.mark.parametrize(
    "name, index", [("grey_p", 0), ("blur_p", 1), ("flip_p", 2), ("jitter_p", 3)]
)
def test_each_operation_alone(name, index):
    """With the probability of one at 0.3 and of the others at 0, it happens to 0.3, and they to
    none."""
    count = 2000
    view = make_view(8, **WHOLE, **RAW, blur_sigma=(0.5, 2.0), **(STILL | {name: 0.3}))
    out = views(view, repeat(affine_colours(), count))
    operations = read_operations(out)
    untouched = np.abs(out - affine_colours() / 255).max((1, 2, 3)) < 1e-6
    assert_share(operations[index], 0.3)
    np.testing.assert_array_equal(untouched, ~operations[index])
    for other in {0, 1, 2} - {index}:
        assert not operations[other].any()


def test_probability_of_one_always_happens():
    """The other end: jitter, grey and flip in every view; 1 is as good as 1.0, as 0 is: it makes
    the same program."""
    images, programs = repeat(affine_colours(), 500), []
    for one in (1.0, 1):
        view = make_view(8, **WHOLE, **RAW, jitter_p=one, grey_p=one, blur_p=0, flip_p=one)
        programs.append(str(jax.make_jaxpr(view)(jax.random.key(0), {"image": images})))
    assert programs[0] == programs[1]
    is_grey, is_blurred, is_mirrored, is_changed = read_operations(views(view, images))
    assert is_grey.all() and is_mirrored.all() and not is_blurred.any() and is_changed.mean() > 0.99


# The whole view: how strong.


@pytest.mark.parametrize(
    "strengths, low, high",
    [
        ({}, (0.6, 0.6, 0.6, -0.1), (1.4, 1.4, 1.4, 0.1)),
        ({"jitter": (0.3, 1.5, 0.2, 0.05)}, (0.7, 0, 0.8, -0.05), (1.3, 2.5, 1.2, 0.05)),
    ],
)
def test_jitter_draws(strengths, low, high, monkeypatch):
    """Factors uniform in 1 - s .. 1 + s but not below 0, hue in -s .. s, all 24 orders."""
    place = np.array([64, 16, 4, 1])

    def show_draws(image, factors, hue_shift, order):
        return image.at[0, 0].set(factors).at[0, 1].set(jnp.stack([hue_shift, order @ place, -1]))

    monkeypatch.setattr(augment, "colour_jitter", show_draws)
    view = make_view(8, **RAW, **strengths, **(STILL | {"jitter_p": 0.8}))
    out = views(view, repeat(affine_colours(), 6000))
    happened = out[:, 0, 1, 2] < 0
    assert_share(happened, 0.8)
    draws = np.concatenate([out[:, 0, 0], out[:, 0, 1, :2]], 1)[happened].T
    for drawn, *ends in zip(draws, low, high, strict=False):
        assert_uniform(drawn, *ends)
    codes, counts = np.unique(draws[4], return_counts=True)
    np.testing.assert_array_equal(
        codes, sorted(np.array(order) @ place for order in itertools.permutations(range(4)))
    )
    assert scipy.stats.chisquare(counts).pvalue > UNLIKELY
    correlation = np.corrcoef(draws)[np.triu_indices(5, 1)]
    assert np.abs(correlation).max() < 6 / math.sqrt(draws.shape[1])


def test_blur_is_uniform_in_its_range():
    """The standard deviation, read off a single white pixel: 0.1 .. 2 pixels, whenever a blur
    happens."""
    image = np.zeros((17, 17, 3), np.uint8)
    image[8, 8] = 255
    out = views(make_view(17, **WHOLE, **RAW, **(STILL | {"blur_p": 0.5})), repeat(image, 1500))[
        ..., 0
    ]
    # Two neighbours of a Gaussian are as exp(-1 / (2 sigma^2)); below 0.3 the second is all but
    # nothing.
    ratio = np.clip(np.float64(out[:, 8, 9]) / out[:, 8, 8], 1e-30, None)
    sigma = np.sqrt(-0.5 / np.log(ratio))
    seen = sigma > 0.3
    assert_share(seen, 0.5 * 1.7 / 1.9)
    assert_uniform(sigma[seen], 0.3, 2)
    # As much along one axis as the other.
    np.testing.assert_allclose(out, out.transpose(0, 2, 1), atol=1e-6)
    np.testing.assert_allclose(out.sum((1, 2)), 1, atol=1e-3)


def test_blur_of_a_view_matches_scipy():
    """A given standard deviation, cut off no nearer than at four of them."""
    image = noise(32, 32)
    view = make_view(32, **WHOLE, **RAW, blur_sigma=(1.3, 1.3), **(STILL | {"blur_p": 1.0}))
    wanted = scipy.ndimage.gaussian_filter(image / 255, (1.3, 1.3, 0), mode="nearest", truncate=8)
    np.testing.assert_allclose(views(view, image[None])[0], wanted, atol=2e-4)


# The whole view: order of the operations.


def test_contrast_is_taken_of_the_crop():
    """Jitter comes after the crop: contrast leaves the crop's mean grey where it is, not the
    image's."""
    image = repeat(np.uint8(0.5 * coordinates(16) + 60), 32)
    crops = views(cached_view(16, **RAW, **STILL), image)
    out = views(make_view(16, jitter=(0, 0.4, 0, 0), **RAW, **(STILL | {"jitter_p": 1.0})), image)
    means = (crops @ LUMA).mean((1, 2))
    np.testing.assert_allclose((out @ LUMA).mean((1, 2)), means, atol=1e-4)
    assert np.std(means) > 0.01 and np.abs(out - crops).max((1, 2, 3)).mean() > 0.02


def test_grey_comes_after_jitter():
    """The view is the luma of the jittered image; MoCo v1 had it the other way about."""
    image = repeat(smooth(16, 16), 32)
    jittered = views(make_view(16, **RAW, **(STILL | {"jitter_p": 1.0})), image)
    both = views(make_view(16, **RAW, **(STILL | {"jitter_p": 1.0, "grey_p": 1.0})), image)
    np.testing.assert_allclose(both, np.repeat((jittered @ LUMA)[..., None], 3, -1), atol=1e-5)


def test_flip_mirrors_left_and_right():
    """All views mirrored are the views not mirrored, columns turned about."""
    image = repeat(noise(16, 16), 32)
    plain = views(cached_view(16, **RAW, **STILL), image)
    mirrored = views(make_view(16, **RAW, **(STILL | {"flip_p": 1.0})), image)
    np.testing.assert_allclose(mirrored, plain[:, :, ::-1], atol=1e-6)


def test_view_is_normalised():
    """Less the mean, by the standard deviation, of each channel; the defaults are ImageNet's."""
    image = noise(8, 8)
    wanted = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(
        views(make_view(8, **WHOLE, **STILL), image[None])[0], wanted, atol=1e-5
    )
    wanted = (image / 255 - [0.1, 0.2, 0.3]) / [0.5, 1, 2]
    view = make_view(8, **WHOLE, **STILL, mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2))
    np.testing.assert_allclose(views(view, image[None])[0], wanted, atol=1e-5)


# The whole view: keys.


def test_two_keys_are_two_views():
    """Two keys, as of query and key or of two epochs, differ in every example; one does not."""
    images = np.stack([noise(16, 16, seed=i) for i in range(32)])
    one, two, again = (views(cached_view(16), images, seed) for seed in (0, 1, 0))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max((1, 2, 3)).min() > 1e-3


def test_examples_of_a_batch_are_drawn_apart():
    """No two views of one image, repeated over the batch, are alike."""
    out = views(cached_view(16), repeat(noise(16, 16), 32))
    apart = np.abs(out[:, None] - out[None]).max((2, 3, 4)) + np.eye(32)
    assert apart.min() > 1e-3


def test_both_views_come_from_the_same_image():
    """The index of an image, carried in its grey, comes out of both views at its place."""
    index = np.random.default_rng(0).permutation(256)
    images = np.broadcast_to(np.uint8(index)[:, None, None, None], (256, 8, 8, 3))
    # Without brightness a plain grey stays as it is.
    view = make_view(8, jitter=(0, 0.4, 0.4, 0.1), **RAW)
    for seed in (0, 1):
        read = 255 * views(view, images, seed)
        np.testing.assert_allclose(read, images, atol=0.1)


def test_view_of_an_example_depends_on_its_place_and_key_alone():
    """Neither the other images nor how many they are changes it."""
    images = np.stack([noise(16, 16, seed=i) for i in range(32)])
    others = np.roll(images, 1, 0)
    others[0], others[3] = 0, images[3]  # all change places but the fourth
    view = cached_view(16)
    out = views(view, images)
    np.testing.assert_allclose(views(view, others)[3], out[3], atol=1e-6)
    np.testing.assert_allclose(views(view, images[:8]), out[:8], atol=1e-5)
    # The image goes where its place's draws send it: elsewhere it looks different.
    assert np.abs(views(view, others)[2] - out[1]).max() > 1e-3


@pytest.mark.parametrize(
    "view", [weak_view(16), pytest.param(cached_view(16), marks=pytest.mark.slow)]
)
def test_view_is_the_same_without_jit(view):
    """Compiled or op by op, up to rounding."""
    images = np.stack([noise(16, 16, seed=i) for i in range(31)] + [smooth(16, 16)])
    out = view(jax.random.key(3), {"image": jnp.asarray(images)})
    np.testing.assert_allclose(views(view, images, 3), out, atol=1e-4)


def test_size_of_the_canvas_is_the_default_size():
    """Without batch["size"] the crop is drawn in the canvas's own pixels."""
    images = repeat(noise(16, 24), 8)
    view = cached_view(16, **RAW, **STILL)
    np.testing.assert_allclose(
        views(view, images), views(view, images, size=np.float32([[16, 24]] * 8)), atol=1e-6
    )


# Shapes and extremes.


def test_grey_images_stay_grey_images():
    """f32[B, S, S, 1] of uint8[B, H, W, 1], within 0..1 before the normalisation."""
    images = np.stack([noise(20, 28, 1, seed=i) for i in range(16)])
    out = views(make_view(12, mean=(0,), std=(1,)), images)
    assert out.shape == (16, 12, 12, 1) and out.dtype == np.float32
    assert out.min() >= -1e-5 and out.max() <= 1 + 1e-5 and np.ptp(out) > 0.2


def test_extreme_images_are_finite():
    """All black, all white, one saturated colour, black against white: no division by zero."""
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    red, halves = black.copy(), black.copy()
    red[..., 0], halves[:, 8:] = 255, 255
    kinds = np.stack([black, white, red, halves])
    out = views(make_view(16, **RAW, jitter=(0.8, 0.8, 0.8, 0.5)), np.repeat(kinds, 64, 0)).reshape(
        4, 64, 16, 16, 3
    )
    assert np.isfinite(out).all() and out.min() >= -1e-5 and out.max() <= 1 + 1e-5
    np.testing.assert_allclose(out[0], 0, atol=1e-5)  # black can only stay black
    # White becomes one grey.
    np.testing.assert_allclose(out[1].min((1, 2, 3)), out[1].max((1, 2, 3)), atol=1e-5)


def test_thin_images_are_finite():
    """Images of one pixel's height or width, on a canvas, and a view larger than the canvas."""
    sizes = np.float32([[1, 300], [300, 1], [1, 1], [2, 3]])
    out = views(make_view(24, **RAW), repeat(noise(16, 20), 4), size=sizes)
    assert out.shape == (4, 24, 24, 3) and out.dtype == np.float32
    assert np.isfinite(out).all() and out.min() >= -1e-5 and out.max() <= 1 + 1e-5


# The two other views.


def test_weak_view_only_crops_and_flips():
    """Colours stay, half are mirrored, the crop is torchvision's default of 0.08 .. 1."""
    count, side = 1000, 64
    out = views(weak_view(side), repeat(coordinates(side), count))
    out = out * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]
    np.testing.assert_allclose(out[..., 2], 0.6, atol=1e-5)  # no jitter, no grey
    # No blur: the ramps are straight to the last quarter.
    np.testing.assert_allclose(np.diff(out[:, 16:48], 2, axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(np.diff(out[:, :, 16:48], 2, axis=2), 0, atol=1e-5)
    boxes, mirrored = read_boxes(out)
    assert_share(mirrored, 0.5)
    boxes *= side
    np.testing.assert_allclose(boxes, np.round(boxes), atol=0.01)
    wanted = reference_boxes(10_000, side, side, (0.08, 1), (3 / 4, 4 / 3))
    for column in range(4):
        assert_same_distribution(np.round(boxes[:, column]), wanted[:, column])


def test_plain_view_is_the_normalised_image():
    """Exact, of any height and width, and the same for every key."""
    images = np.stack([noise(10, 14, seed=i) for i in range(3)])
    wanted = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    one, two = views(plain_view(), images, 0), views(plain_view(), images, 1)
    np.testing.assert_allclose(one, wanted, atol=1e-5)
    np.testing.assert_array_equal(one, two)
    single = noise(6, 6, 1)
    got = views(plain_view((0.5,), (0.25,)), single[None])[0]
    np.testing.assert_allclose(got, (single / 255 - 0.5) / 0.25, atol=1e-5)


def test_plain_view_of_another_size():
    """Resized as Pillow does it, which rounds to whole levels."""
    image = np.random.default_rng(0).integers(0, 256, (37, 52, 3), np.uint8)
    got = views(plain_view((0, 0, 0), (1, 1, 1), size=16), image[None])[0] * 255
    want = Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)
    assert got.shape == (16, 16, 3) and np.abs(got - np.asarray(want)).max() < 1.01
    same = views(plain_view((0, 0, 0), (1, 1, 1), size=37), image[None, :, :37])[0] * 255
    np.testing.assert_allclose(same, image[:, :37], atol=1e-4)


@pytest.mark.parametrize(
    "view", [pytest.param(make_view(12), marks=pytest.mark.slow), weak_view(12), plain_view()]
)
def test_views_in_double_precision(view):
    """Where jax is set to it: the same draws, and every product after them in float64, whose sums
    hardly round."""
    images = np.stack([noise(12, 12, seed=i) for i in range(4)])
    single = views(view, images)
    with jax.enable_x64(True):
        lowered = jax.jit(view).lower(jax.random.key(0), {"image": images})
        double = lowered.compile()(jax.random.key(0), {"image": images})
    assert double.dtype == np.float64
    assert not [
        line for line in lowered.as_text().splitlines() if "dot_general" in line and "f32" in line
    ]
    np.testing.assert_allclose(double, single, atol=1e-4)
