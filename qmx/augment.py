"""Views of an image, cut on the device inside the jitted step.

Every operation works on one image, f32[H, W, C] in 0..1 with C = 1 or 3, and takes its random
draws as arguments; `make_view` draws them with one key per example and maps over the batch. Results
are those of torchvision on PIL images, as MoCo and SimSiam used them, but without the rounding to
uint8 between operations.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qmx.contract import Batch, View

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Of a view's random numbers, each by a key of its own.
DRAWS = ("crop", "jitter_p", "factors", "hue", "order", "grey_p", "blur_p", "sigma", "flip_p")


def crop_box(
    rng: jax.Array, size: jax.Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
    """The box of a random resized crop: f32[4] = (top, left, height, width), whole pixels.

    Ten draws of an area in `scale` and an aspect ratio in `ratio` (uniform in the logarithm). The
    first that fits is placed at random. If none fits: the largest central box within `ratio`.
    Source: torchvision's `RandomResizedCrop.get_params`.

    Args:
      size: f32[2], the image's height and width.
      scale: share of the area, smallest and largest.
      ratio: width / height, smallest and largest.
    """
    height, width = size[0], size[1]
    area_key, ratio_key, place_key = jax.random.split(rng, 3)
    area = (
        height
        * width
        * jax.random.uniform(area_key, (10,), jnp.float32, minval=scale[0], maxval=scale[1])
    )
    low, high = jnp.log(jnp.array(ratio))
    aspect = jnp.exp(jax.random.uniform(ratio_key, (10,), jnp.float32, low, high))
    w, h = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = jnp.argmax(fits)

    whole = width / height
    central_w = jnp.where(whole > ratio[1], jnp.round(height * ratio[1]), width)
    central_h = jnp.where(whole < ratio[0], jnp.round(width / ratio[0]), height)
    any_fits = fits.any()
    h = jnp.where(any_fits, h[first], central_h)
    w = jnp.where(any_fits, w[first], central_w)
    # Whole pixels 0 .. height - h, each equally likely.
    u = jax.random.uniform(place_key, (2,), jnp.float32)
    top = jnp.where(any_fits, jnp.floor(u[0] * (height - h + 1)), jnp.floor((height - h) / 2))
    left = jnp.where(any_fits, jnp.floor(u[1] * (width - w + 1)), jnp.floor((width - w) / 2))
    return jnp.stack([top, left, h, w])


def resize_weights(start: jax.Array, length: jax.Array, pixels: int, out: int) -> jax.Array:
    """Bilinear weights with antialias, f32[out, pixels], of the stretch [start, start + length).

    They are a triangle as wide as the shrinkage, cut off at the ends and normalised, as in Pillow
    after a crop. `jax.image.scale_and_translate` reads pixels beyond the ends.
    """
    scale = length / out
    centre = start + (jnp.arange(out) + 0.5) * scale - 0.5
    pixel = jnp.arange(pixels)
    weight = jnp.maximum(0, 1 - jnp.abs(pixel - centre[:, None]) / jnp.maximum(scale, 1))
    slack = 1e-3  # so that 127.99999 counts as 128; the stretch always keeps one pixel
    inside = (pixel > start - 1 + slack) & (pixel < start + length - slack)
    weight = jnp.where(inside, weight, 0)
    return weight / weight.sum(1, keepdims=True)


def crop_and_resize(image: jax.Array, box: jax.Array, size: int) -> jax.Array:
    """Resize `box` = (top, left, height, width) of f32[H, W, C] to f32[size, size, C]."""
    rows = resize_weights(box[0], box[2], image.shape[0], size)
    columns = resize_weights(box[1], box[3], image.shape[1], size)
    # In full float32: a GPU would use TF32, whose 10 bits are too few for a pixel's value.
    return jnp.einsum("yh,hwc,xw->yxc", rows, image, columns, precision="highest")


def grey(image: jax.Array) -> jax.Array:
    """Luma as Pillow's mode "L" (ITU-R 601), f32[H, W, 1]; a grey image is returned as it is."""
    return image if image.shape[-1] == 1 else image @ jnp.array([[0.299], [0.587], [0.114]])


def blend(image: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
    """factor * image + (1 - factor) * other, clipped to 0..1. Pillow's `Image.blend`."""
    return jnp.clip(factor * image + (1 - factor) * other, 0, 1)


def adjust_hue(image: jax.Array, shift: jax.Array) -> jax.Array:
    """Turn the hue by `shift` (in turns, -0.5..0.5) in HSV. Smith 1978, as in torchvision."""
    r, g, b = image[..., 0], image[..., 1], image[..., 2]
    value, low = image.max(-1), image.min(-1)
    chroma = value - low
    safe = jnp.where(chroma == 0, 1, chroma)
    hue = jnp.where(
        value == r, (g - b) / safe, jnp.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    hue = jnp.mod(hue / 6 + shift, 1.0)
    # Channel n of HSV -> RGB is value - chroma * clip(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6.
    k = jnp.mod(jnp.array([5.0, 3.0, 1.0]) + 6 * hue[..., None], 6.0)
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def colour_jitter(
    image: jax.Array, factors: jax.Array, hue_shift: jax.Array, order: jax.Array
) -> jax.Array:
    """Brightness, contrast, saturation and hue in a given order. torchvision's `ColorJitter`.

    Args:
      factors: f32[3], of brightness (a blend with black), contrast (a blend with the mean grey) and
        saturation (a blend with the grey image); 1 changes nothing.
      hue_shift: in turns.
      order: i32[4], a permutation: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    """

    def blends(image: jax.Array, first: jax.Array | int, last: jax.Array | int) -> jax.Array:
        for slot in range(4):
            op = order[slot]
            luma = grey(image)
            other = jnp.where(op == 0, 0.0, jnp.where(op == 1, luma.mean(), luma))
            active = (slot >= first) & (slot < last)
            image = jnp.where(active, blend(image, other, factors[jnp.minimum(op, 2)]), image)
        return image

    # Under vmap a switch computes every branch. So the expensive one, the hue, stands outside it,
    # between the blends before it and those after.
    hue_slot = jnp.argmax(order == 3)
    image = blends(image, 0, hue_slot)
    if image.shape[-1] == 3:
        image = adjust_hue(image, hue_shift)
    return blends(image, hue_slot + 1, 4)


def blur_weights(sigma: jax.Array, pixels: int, radius: int) -> jax.Array:
    """A Gaussian as a matrix f32[pixels, pixels]; beyond the edge the edge pixel is repeated."""
    offsets = jnp.arange(-radius, radius + 1)
    taps = jnp.exp(-0.5 * jnp.square(offsets / jnp.maximum(sigma, 1e-3)))  # sigma 0: no blur
    source = jnp.clip(jnp.arange(pixels)[:, None] + offsets, 0, pixels - 1)
    return jnp.einsum("t,itj->ij", taps / taps.sum(), jax.nn.one_hot(source, pixels))


def gaussian_blur(image: jax.Array, sigma: jax.Array, radius: int) -> jax.Array:
    """A separable Gaussian blur as two matrix products; taps beyond `radius` pixels are cut off."""
    rows = blur_weights(sigma, image.shape[0], radius)
    columns = blur_weights(sigma, image.shape[1], radius)
    # In full float32, as in `crop_and_resize`.
    return jnp.einsum("yh,hwc,xw->yxc", rows, image, columns, precision="highest")


def make_view(
    size: int,
    *,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
    jitter_p: float = 0.8,
    grey_p: float = 0.2,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    blur_p: float = 0.5,
    flip_p: float = 0.5,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> View:
    """A random view; the defaults are MoCo v2's recipe in its order (SimSiam's is the same).

    Random resized crop, colour jitter, grey, blur, flip, normalisation. Each example has its own
    key, so a view depends only on the example's place in the global batch. A probability of 0
    leaves the operation out. Source: Chen et al. 2020 (MoCo v2); the reference's
    `main_moco.py`, `--aug-plus`.

    Args:
      size: S, side of the view in pixels.
      crop_scale, crop_ratio: see `crop_box`.
      jitter: strengths of brightness, contrast, saturation and hue, see `colour_jitter`; the first
        three factors are uniform in 1 - s .. 1 + s (not below 0), the hue in -s .. s.
      blur_sigma: standard deviation in pixels, uniform between the two.
      mean, std: of each channel, for the normalisation, in 0..1.

    Returns:
      view(rng, batch) -> f32[B, S, S, C]. It reads batch["image"], uint8[B, H, W, C]. With a
      canvas it also reads batch["size"], f32[B, 2], the original height and width; the crop is
      drawn in original pixels.
    """
    strengths = jnp.array(jitter[:3])
    radius = int(-(-4 * blur_sigma[1] // 1))  # four standard deviations

    def one(rng: jax.Array, image: jax.Array, original: jax.Array) -> jax.Array:
        keys = dict(zip(DRAWS, jax.random.split(rng, len(DRAWS)), strict=True))

        def happens(name: str, p: float) -> jax.Array:
            return jax.random.bernoulli(keys[name], jnp.float32(p))

        canvas = jnp.array(image.shape[:2], jnp.float32)
        # Double precision from here on, if jax is set to it. All draws stay float32, so that they
        # are the same in both.
        box = crop_box(keys["crop"], original, crop_scale, crop_ratio).astype(float)
        x = crop_and_resize(image / 255.0, box * jnp.tile(canvas / original, 2), size)
        if jitter_p:
            factors = jax.random.uniform(
                keys["factors"],
                (3,),
                jnp.float32,
                minval=jnp.maximum(0, 1 - strengths),
                maxval=1 + strengths,
            )
            shift = jax.random.uniform(
                keys["hue"], (), jnp.float32, minval=-jitter[3], maxval=jitter[3]
            )
            order = jax.random.permutation(keys["order"], 4)
            x = jnp.where(happens("jitter_p", jitter_p), colour_jitter(x, factors, shift, order), x)
        if grey_p:
            x = jnp.where(happens("grey_p", grey_p), grey(x), x)
        if blur_p:
            sigma = jax.random.uniform(
                keys["sigma"], (), jnp.float32, minval=blur_sigma[0], maxval=blur_sigma[1]
            )
            sigma = sigma.astype(float)
            x = jnp.where(happens("blur_p", blur_p), gaussian_blur(x, sigma, radius), x)
        if flip_p:
            x = jnp.where(happens("flip_p", flip_p), x[:, ::-1], x)
        return x

    def view(rng: jax.Array, batch: Batch) -> jax.Array:
        image = batch["image"]
        check_images(image, mean)
        sizes = batch.get(
            "size", jnp.tile(jnp.array(image.shape[1:3], jnp.float32), (len(image), 1))
        )
        x = jax.vmap(one)(jax.random.split(rng, len(image)), image, sizes)
        return normalize(x, mean, std)

    return view


def weak_view(size: int, *, crop_scale: tuple[float, float] = (0.08, 1.0), **keywords: Any) -> View:
    """Random resized crop and flip only, as in supervised training; `flip_p`, `mean` and `std` as
    in `make_view`."""
    return make_view(size, crop_scale=crop_scale, jitter_p=0, grey_p=0, blur_p=0, **keywords)


def plain_view(
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD, size: int = 0
) -> View:
    """The whole image, normalised, for evaluations. The key is not used.

    Args:
      size: the side of the square that the image is resized to, as in `make_view`; 0 leaves it.
    """

    def view(rng: jax.Array, batch: Batch) -> jax.Array:
        del rng
        check_images(batch["image"], mean)
        images = batch["image"] / 255.0
        if size and images.shape[1:3] != (size, size):
            box = jnp.array([0.0, 0.0, *images.shape[1:3]])
            images = jax.vmap(lambda image: crop_and_resize(image, box, size))(images)
        return normalize(images, mean, std)

    return view


def check_images(images: jax.Array, mean: Sequence[float]) -> None:
    """Raise ValueError unless images are uint8[B, H, W, C] with a mean for each channel. Floats
    in 0..1 would be taken for nearly black."""
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != len(mean):
        raise ValueError(
            f"images are {images.dtype}{list(images.shape)}; a view takes uint8[B, H, W, C] in"
            f" 0..255, with C = {len(mean)} as mean and std have"
        )


def normalize(x: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(x - mean) / std for each channel; f32[..., C] in 0..1 -> f32[..., C].

    Raises:
      ValueError: mean or std does not have C channels.
    """
    if not len(mean) == len(std) == x.shape[-1]:
        raise ValueError(
            f"images have {x.shape[-1]} channels, mean {len(mean)} and std {len(std)}; give one for"
            " each"
        )
    return (x - jnp.array(mean, float)) / jnp.array(std, float)
