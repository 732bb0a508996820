"""Photos: decoding, the canvas and what is shown against torchvision's geometry, and folders of
them."""

import io
import os
import struct
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile
from test_data import keys, load

from qmx.data import batches
from qmx.data.folder import listing
from qmx.data.photos import canvas, decode, in_threads, oddities, shown

RNG = np.random.default_rng(0)
REAL = os.environ.get("QMX_TEST_DATA", "")
needs_data = pytest.mark.skipif(
    not REAL, reason="QMX_TEST_DATA names no folder with imagenet_samples/ and others"
)


def photo(width, height, mode="RGB", seed=0):
    """A smooth image with some noise."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    bands = [
        127 + 90 * np.sin(x * a + y * b) + rng.normal(0, 9, x.shape)
        for a, b in rng.uniform(1, 4, (3, 2))
    ]
    return Image.fromarray(np.clip(np.stack(bands, -1), 0, 255).astype(np.uint8)).convert(mode)


def encoded(image, kind="JPEG", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def turned(orientation, image=None):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image or photo(40, 30), exif=exif)


def tree(root, files):
    """Write {relative name: bytes or (width, height)}; returns the folder's path."""
    for number, (name, content) in enumerate(files.items()):
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            content if isinstance(content, bytes) else encoded(photo(*content, seed=number))
        )
    return str(root)


# Decoding

SIXTEEN = Image.fromarray(RNG.integers(0, 65536, (6, 5)).astype(np.uint16))
CLEAR = photo(9, 8).quantize(16)
CLEAR.info["transparency"] = 3


@pytest.mark.parametrize(
    "data",
    [
        encoded(photo(9, 8)),
        encoded(photo(9, 8, "L")),
        encoded(photo(9, 8, "CMYK")),
        encoded(photo(9, 8), "PNG"),
        encoded(photo(9, 8, "RGBA"), "PNG"),
        encoded(CLEAR, "PNG"),
        encoded(photo(9, 8, "LA"), "PNG"),
        encoded(photo(9, 8, "1"), "PNG"),
        encoded(photo(9, 8), "BMP"),
        encoded(photo(9, 8), "WEBP"),
        encoded(photo(9, 8), "TIFF"),
        encoded(photo(9, 8), progressive=True),
        turned(6),
    ],
    ids=range(13),
)
def test_whatever_pillow_reads_is_what_its_rgb_says(data):
    """Bit for bit what torchvision's loader gives, whatever the file is called; and no turning."""
    image = decode(data, "n01440764/odd.JPEG")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(
        np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_to_8(kind):
    """65535 becomes 255; Pillow alone clips at 255, which is nearly all white."""
    values = np.linspace(0, 65535, 30 * 20).reshape(20, 30).astype(np.uint16)
    image = np.asarray(decode(encoded(Image.fromarray(values), kind), "x"))
    assert image.shape == (20, 30, 3) and image.min() == 0 and image.max() == 255
    np.testing.assert_array_equal(
        image, np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, 2)
    )
    assert oddities(encoded(Image.fromarray(values), kind), "x") == ("16-bit greyscale",)


@pytest.mark.parametrize("top", [1, 255, 65535])
def test_floats_and_32_bits_are_refused_by_name(top):
    """Their range stands in no file."""
    values = np.linspace(0, top, 20).reshape(4, 5)
    for kind, words in ((np.float32, "floating-point"), (np.int32, "32-bit")):
        data = encoded(Image.fromarray(values.astype(kind)), "TIFF")
        with pytest.raises(
            ValueError, match=f"^n01/deep.tif: {words} pixels, 0 .. {top}, .*with 8 bits$"
        ):
            decode(data, "n01/deep.tif")


def test_exif_does_not_turn_an_image():
    """torchvision's loader leaves it as it is stored, so the target was trained on that."""
    assert decode(turned(6), "x").size == decode(turned(1), "x").size == (40, 30)
    np.testing.assert_array_equal(
        np.asarray(decode(turned(8), "x")), np.asarray(decode(turned(1), "x"))
    )


def chunk(name, content):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


WHOLE = encoded(photo(90, 80))
BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    + chunk(b"IEND", b"")
)
UNREADABLE = {
    "empty": (b"", "the file is empty"),
    "cut off": (WHOLE[: len(WHOLE) // 2], "truncated"),
    "cut off by a little": (WHOLE[:-200], "truncated"),
    "only its start": (WHOLE[:2], ""),
    "text": (b"404 not found", "not an image"),
    "zeros": (bytes(1000), "not an image"),
    "a PNG cut off": (encoded(photo(90, 80), "PNG")[:900], ""),
    "a bomb": (BOMB, "decompression bomb"),
    "a PNG with a wrong sum": (encoded(photo(9, 8), "PNG").replace(b"IDAT", b"IDaT"), ""),
}


@pytest.mark.parametrize("data, message", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_refused_by_name(data, message):
    with pytest.raises(ValueError, match="^n01/bad.JPEG: .*" + message) as error:
        decode(data, "n01/bad.JPEG")
    assert len(str(error.value).splitlines()) == 1 and "BytesIO" not in str(error.value)


def test_no_other_program_is_started(monkeypatch):
    """Pillow gives EPS to Ghostscript, whatever the file is called."""

    def started(*_, **__):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match="^cat.jpg: not an image that Pillow can read"):
        decode(data, "cat.jpg")
    with pytest.raises(AssertionError):  # else this would show nothing
        Image.open(io.BytesIO(data)).load()


def test_no_memory_is_no_damage(monkeypatch):
    """It is raised as it is: the photo may be sound."""

    def load(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        decode(WHOLE, "good.jpg")


def test_damage_anywhere_is_refused_or_decoded():
    """Nothing but ValueError, whichever byte is wrong."""
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP"):
        whole = encoded(photo(20, 16), kind)
        for at in range(0, len(whole), max(len(whole) // 60, 1)):
            for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
                try:
                    decode(data, "bad")
                except ValueError as error:
                    assert str(error).startswith("bad: ")


@pytest.mark.parametrize(
    "data, found",
    [
        (encoded(photo(9, 8)), ()),
        (encoded(photo(9, 8, "L")), ("greyscale",)),
        (encoded(photo(9, 8, "CMYK")), ("CMYK",)),
        (encoded(photo(9, 8), "PNG"), ("PNG named JPEG",)),
        (turned(0), ()),
        (turned(1), ()),
        (turned(9), ()),
        (turned(6), ("EXIF-rotated, used as stored",)),
        (encoded(SIXTEEN, "PNG"), ("16-bit greyscale", "PNG named JPEG")),
        (encoded(photo(9, 8, "RGBA"), "PNG"), ("RGBA", "PNG named JPEG")),
        (turned(3, photo(9, 8, "L")), ("greyscale", "EXIF-rotated, used as stored")),
    ],
)
def test_odd_files_are_told(data, found):
    assert oddities(data, "n01/x.JPEG") == found


# What is shown. Expected sizes and places are torchvision 0.29.2's own, recorded from its resize
# and center_crop.

# (width, height), resize, crop, resized (width, height), padding (l, t, r, b), top and left of the
# crop.
GEOMETRY = [
    ((500, 375), 256, 224, (341, 256), None, (16, 58)),
    ((375, 500), 256, 224, (256, 341), None, (58, 16)),
    ((256, 256), 256, 224, (256, 256), None, (16, 16)),
    ((257, 300), 256, 224, (256, 298), None, (37, 16)),
    ((300, 257), 256, 224, (298, 256), None, (16, 37)),
    ((75, 56), 256, 224, (342, 256), None, (16, 59)),
    ((2400, 1600), 256, 224, (384, 256), None, (16, 80)),
    ((1, 40), 256, 224, (256, 10240), None, (5008, 16)),
    ((40, 1), 256, 224, (10240, 256), None, (16, 5008)),
    ((1000, 997), 256, 224, (256, 256), None, (16, 16)),
    ((333, 500), 256, 225, (256, 384), None, (80, 16)),
    ((256, 341), 256, 224, (256, 341), None, (58, 16)),
    ((256, 341), 256, 225, (256, 341), None, (58, 16)),
    ((500, 375), 32, 41, (42, 32), (0, 4, 0, 5), (0, 0)),
    ((375, 500), 31, 48, (31, 41), (8, 3, 9, 4), (0, 0)),
    ((100, 100), 50, 100, (50, 50), (25, 25, 25, 25), (0, 0)),
    ((7, 9), 4, 3, (4, 5), None, (1, 0)),
]


@pytest.mark.parametrize("size, resize, crop, resized, padding, place", GEOMETRY)
def test_what_is_shown_is_torchvisions_resize_and_crop(size, resize, crop, resized, padding, place):
    image = photo(*size)
    got = shown(image, resize, crop)
    want = image.resize(resized, Image.Resampling.BILINEAR)
    if padding:
        whole = Image.new(
            "RGB", (resized[0] + padding[0] + padding[2], resized[1] + padding[1] + padding[3])
        )
        whole.paste(want, padding[:2])
        want = whole
    top, left = place
    assert got.dtype == np.uint8 and got.shape == (crop, crop, 3)
    np.testing.assert_array_equal(got, np.asarray(want.crop((left, top, left + crop, top + crop))))


def test_a_photo_that_is_long_and_thin():
    """Its middle is shown, in memory for that; up to 32 times as long as wide, all is as
    torchvision has it."""
    image = photo(40, 3)
    row = np.asarray(image)[:, 18:22].mean()
    tracemalloc.start()
    long = Image.new("RGB", (1, 9000), (10, 20, 30))
    long.paste((200, 100, 50), (0, 4400, 1, 4600))
    got = shown(long, 256, 224)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    np.testing.assert_array_equal(got[112], np.tile((200, 100, 50), (224, 1)))
    assert shown(image, 8, 8).mean() == pytest.approx(row, abs=30)


def test_the_canvas_is_the_whole_photo():
    image = photo(50, 30)
    pixels, size = canvas(image, 32)
    assert size == (30, 50) and pixels.shape == (32, 32, 3)
    np.testing.assert_array_equal(
        pixels, np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    )
    np.testing.assert_array_equal(canvas(photo(32, 32), 32)[0], np.asarray(photo(32, 32)))


# Threads


def test_rows_are_each_done_once_by_several_threads():
    seen, threads = [], set()

    def work(row, i):
        seen.append((row, i))
        threads.add(threading.get_ident())
        time.sleep(0.002)

    in_threads(work, np.arange(40) * 3)
    assert sorted(seen) == [(row, row * 3) for row in range(40)]
    assert len(threads) > 1 or os.cpu_count() == 1
    in_threads(work, np.arange(0))


def test_the_first_error_of_a_thread_is_raised_and_the_rest_is_left():
    done = []

    def work(row, i):
        if i == 5:
            raise ValueError("photo 5 is bad")
        time.sleep(0.002)
        done.append(i)

    with pytest.raises(ValueError, match="photo 5 is bad"):
        in_threads(work, np.arange(4000))
    assert len(done) < 1000


# Folders


@pytest.fixture
def folders(tmp_path):
    """A pool of two classes and an evaluation folder of the same."""
    pool = tree(
        tmp_path / "train",
        {
            "n02/b.JPEG": (60, 40),
            "n02/a.png": (30, 45),
            "n01/x_2.jpeg": (33, 33),
            "n01/x_10.JPEG": (47, 31),
            "n01/read.txt": b"no photo",
        },
    )
    return pool, tree(tmp_path / "val", {"n01/v1.JPEG": (50, 30), "n02/v2.JPEG": (35, 60)})


def test_a_listing_is_in_torchvisions_order(tmp_path):
    """Classes sorted, files by code point folder by folder, other files ignored, links followed."""
    pool = tree(
        tmp_path / "pool",
        {
            name: b"1" * size
            for name, size in {
                "b/2.JPEG": 2,
                "b/10.JPEG": 1,
                "b/a.txt": 0,
                "b/Z.PnG": 3,
                "b/sub/1.webp": 1,
                "b/sub-x/0.bmp": 1,
                "b/sub/deep/1.tif": 1,
                "B/x.jpg": 0,
                "a b/\u00e4.ppm": 1,
                "loose.JPEG": 1,
                "a b/x.jpg.gz": 1,
            }.items()
        },
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y.pgm").write_bytes(b"1")
    (Path(pool) / "c").symlink_to(tmp_path / "elsewhere")
    photos, sizes = listing(pool)
    assert photos.class_names == ("B", "a b", "b", "c")
    assert photos.names == (
        "B/x.jpg",
        "a b/\u00e4.ppm",
        "b/10.JPEG",
        "b/2.JPEG",
        "b/Z.PnG",
        "b/sub/1.webp",
        "b/sub-x/0.bmp",
        "b/sub/deep/1.tif",
        "c/y.pgm",
    )
    np.testing.assert_array_equal(photos.labels, [0, 1, 2, 2, 2, 2, 2, 2, 3])
    assert photos.labels.dtype == np.int32 and sizes.tolist() == [0, 1, 1, 2, 3, 1, 1, 1, 1]
    assert photos.load(3) == b"11" and photos.title(3) == f"{pool}/b/2.JPEG"


def test_the_digest_of_a_listing_is_of_names_and_sizes(tmp_path):
    files = {"a/1.JPEG": b"12", "b/2.JPEG": b"3"}
    digests = [
        listing(tree(tmp_path / str(k), variant))[0].digest
        for k, variant in enumerate(
            [
                files,
                {**files, "b/2.JPEG": b"4", "b/note.txt": b"5"},
                {**files, "b/2.JPEG": b"44"},
                {**files, "b/3.JPEG": b"4"},
                {"a/1.JPEG": b"12", "b/3.JPEG": b"3"},
            ]
        )
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 4


def test_a_folder_is_a_data_set(folders):
    """Canvases with their sizes for training, torchvision's pixels to show, labels and names."""
    data = load("folder", *folders, canvas=16, resize=24, crop=20)
    assert (data.classes, data.shape, data.class_names) == (2, (20, 20, 3), ("n01", "n02"))
    assert data.mean == (0.485, 0.456, 0.406) and data.std == (0.229, 0.224, 0.225)
    assert data.name.endswith("/train") and len(data.digest) == 64
    assert (
        data.pool.names == ("n01/x_10.JPEG", "n01/x_2.jpeg", "n02/a.png", "n02/b.JPEG")
        and data.pool.size == 4
    )
    assert data.evaluation.names == ("n01/v1.JPEG", "n02/v2.JPEG")
    np.testing.assert_array_equal(data.pool.labels, [0, 0, 1, 1])
    for part, root in ((data.pool, folders[0]), (data.evaluation, folders[1])):
        ids = np.arange(part.size)[::-1]
        rows, pixels = part.read(ids), part.shown(ids)
        assert {n: (a.dtype, a.shape[1:]) for n, a in rows.items()} == {
            "image": (np.uint8, (16, 16, 3)),
            "label": (np.int32, ()),
            "size": (np.float32, (2,)),
        }
        for row, i in enumerate(ids):
            image = Image.open(Path(root) / part.names[i]).convert("RGB")
            np.testing.assert_array_equal(rows["image"][row], canvas(image, 16)[0])
            np.testing.assert_array_equal(rows["size"][row], image.size[::-1])
            np.testing.assert_array_equal(pixels[row], shown(image, 24, 20))
        np.testing.assert_array_equal(rows["label"], part.labels[ids])


def test_the_digest_knows_the_files_and_the_sizes(folders):
    digests = {
        load("folder", *folders, **more).digest
        for more in (
            {},
            dict(canvas=128),
            dict(resize=232),
            dict(crop=200),
            dict(mean=(0.5, 0.5, 0.5)),
        )
    }
    assert len(digests) == 5
    tree(folders[1], {"n02/more.JPEG": (20, 20)})
    assert load("folder", *folders).digest not in digests


def test_photos_reach_the_device(folders):
    data = load("folder", *folders, canvas=16)
    got = list(batches(data.pool, 4, steps=3, seed=0))
    assert (
        len(got) == 3 and got[0]["image"].shape == (4, 16, 16, 3) and got[0]["size"].shape == (4, 2)
    )
    assert sorted(np.asarray(got[0]["size"])[:, 0]) == [31, 33, 40, 45]


def test_a_broken_photo_ends_the_training_with_its_name_and_the_cure(folders):
    Path(folders[0], "n02/b.JPEG").write_bytes(WHOLE[:900])
    pool = load("folder", *folders, canvas=16).pool
    for read in (pool.read, pool.shown):
        with pytest.raises(
            ValueError, match=r"n02/b.JPEG: .*truncated.*data.leave_out=FILE.*/train/n02/b.JPEG$"
        ) as error:
            read(np.arange(4))
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match="n02/b.JPEG"):
        list(batches(pool, 4, steps=3, seed=0))
    Path(folders[0], "n02/b.JPEG").unlink()
    with pytest.raises(ValueError, match="n02/b.JPEG: No such file"):
        pool.read(np.arange(4))


def refused(message, *words, **more):
    with pytest.raises(ValueError, match=message) as error:
        load("folder", *words, **more)
    assert len(str(error.value).splitlines()) == 1


def test_folders_that_are_none_are_refused(tmp_path, folders):
    pool, evaluation = folders
    (tmp_path / "bare").mkdir()
    (tmp_path / "file").touch()
    for at in (0, 1):

        def both(path, at=at):
            return (path, evaluation) if at == 0 else (pool, path)

        refused(r"none: no such folder", *both(tmp_path / "none"))
        refused(r"file: not a folder", *both(tmp_path / "file"))
        refused(r"bare: no photos in it; .*FOLDER/CLASS.*FOLDER/NAME", *both(tmp_path / "bare"))
    refused("data.path=.*data.eval_path=", "", evaluation)


def test_empty_class_folders_are_named(folders):
    Path(folders[0], "n05").mkdir()
    tree(folders[0], {"n04/x.txt": b""})
    refused("train: no image in class folder n04, n05;", *folders)


def test_classes_that_differ_are_named(folders):
    tree(folders[1], {"n09/1.JPEG": (9, 9)})
    refused("1 class folders of .*val are not in .*train: n09;", *folders)
    tree(folders[0], {f"m0{k}/1.JPEG": (9, 9) for k in range(5)})
    refused("5 class folders of .*train are not in .*val: m00, m01, m02 and 2 more;", *folders)


def test_one_folder_cannot_be_both(folders):
    pool, evaluation = folders
    Path(pool).parent.joinpath("link").symlink_to(pool)
    for paths in (
        (pool, pool),
        (pool, f"{pool}/"),
        (pool, f"{pool}/n01"),
        (str(Path(pool).parent), pool),
        (pool, Path(pool).parent / "link"),
    ):
        refused("are one folder, or one is inside the other", *paths)


def test_photos_of_other_formats_are_counted(folders, capsys):
    """What browsers and phones save, and torchvision's ImageFolder does not read."""
    for name in ("n01/a.jfif", "n01/deep/b.HEIC", "n02/c.gif"):
        tree(folders[0], {name: WHOLE})
    capsys.readouterr()
    assert load("folder", *folders).pool.size
    assert "3 photos are not used, for their names end with none of .jpg" in capsys.readouterr().err


def test_hidden_files_and_folders_are_skipped_and_counted(folders, capsys):
    """What macOS, Windows, notebooks and zip programs leave is neither a photo nor a class."""
    before = load("folder", *folders)
    for name in (
        "n01/._x_2.jpeg",
        "n01/.ipynb_checkpoints/x_2-checkpoint.jpeg",
        ".ipynb_checkpoints/x.jpeg",
        "__MACOSX/n01/._x.jpeg",
        "n02/Thumbs.db",
        ".DS_Store",
    ):
        tree(folders[0], {name: WHOLE})
    capsys.readouterr()
    data = load("folder", *folders)
    assert capsys.readouterr().err.strip() == (
        f"{folders[0]}: 6 hidden files and folders are skipped: .DS_Store, .ipynb_checkpoints,"
        " __MACOSX and 3 more"
    )
    assert data.class_names == before.class_names and data.pool.names == before.pool.names
    assert data.digest == before.digest


def test_a_link_to_nothing_is_named(folders):
    Path(folders[0], "n01/gone.JPEG").symlink_to("nowhere")
    refused("n01/gone.JPEG: a link to a file that is not there", *folders)


@pytest.mark.parametrize("name", ["canvas", "resize", "crop"])
def test_sizes_that_are_none_are_refused(folders, name):
    refused(f"data.{name} 0 ", *folders, **{name: 0})


# Real photos


@needs_data
def test_real_photos_decode_as_pillow_has_them(tmp_path):
    """126 ImageNet photos with grey, EXIF-turned, tiny and huge ones among them; the expected sizes
    by hand."""
    found = {}
    for path in sorted(Path(REAL, "imagenet_samples", "images").iterdir()):
        image = decode(path.read_bytes(), path.name)
        short, long = sorted(image.size)
        other = int(256 * long / short)
        resized = image.resize(
            (256, other) if image.size[0] == short else (other, 256), Image.Resampling.BILINEAR
        )
        left, top = (round((side - 224) / 2) for side in resized.size)
        np.testing.assert_array_equal(
            shown(image, 256, 224),
            np.asarray(resized.crop((left, top, left + 224, top + 224))),
            path.name,
        )
        for odd in oddities(path.read_bytes(), path.name):
            found[odd] = found.get(odd, 0) + 1
    assert found == {"greyscale": 10, "EXIF-rotated, used as stored": 1}


@needs_data
def test_a_real_folder_is_a_data_set():
    root = Path(REAL, "imagenette224")
    data = load("folder", root / "train", root / "val")
    assert (data.pool.size, data.evaluation.size, data.classes, data.name) == (
        1000,
        500,
        10,
        "imagenette224/train",
    )
    np.testing.assert_array_equal(np.bincount(data.pool.labels), [100] * 10)
    rows = data.pool.read(np.arange(0, 1000, 50))
    assert np.all(rows["size"] == 224) and rows["image"].shape == (20, 256, 256, 3)


def test_keys_are_a_configs_own():
    """The helper of these tests has the keys of a config's `data`, and no others."""
    from qmx.settings import base

    assert set(keys("digits")) <= set(base().data)
