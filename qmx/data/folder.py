"""Photos in one folder for each class, the layout of ImageNet and torchvision's ImageFolder; or
without labels, in one folder."""

import hashlib
import os
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from qmx.data.sources import Photos
from qmx.progress import say

# Torchvision's.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Of systems and editors, beside all whose names begin with a dot.
HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini")
# Photos as well, which are not read: as torchvision, by their names.
UNREAD = (".jfif", ".jpe", ".gif", ".jp2", ".avif", ".heic", ".heif", ".jxl")
LISTING_THREADS = 16  # a listing mostly waits, above all on network file systems


def read_file(root: str, i: int, name: str) -> bytes:
    """One file of a folder."""
    try:
        with open(os.path.join(root, name), "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{root}/{name}: {error.strerror or error}") from None


def hidden(name: str) -> bool:
    """True for a file or folder that users do not see as theirs: "._x.jpg", "__MACOSX"."""
    return name.startswith(".") or name in HIDDEN


def walk(
    path: str, prefix: str, skipped: list[str], unread: list[str]
) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yield (folder, [(photo, bytes), ...]) for a folder and all below; names get `prefix`.

    The names of hidden files and folders are added to `skipped`, those of photos of other formats
    to `unread`.
    """
    files = []
    with os.scandir(path) as entries:
        for entry in entries:
            if hidden(entry.name):
                skipped.append(f"{prefix}/{entry.name}")
            elif entry.is_dir():
                yield from walk(entry.path, f"{prefix}/{entry.name}", skipped, unread)
            elif entry.name.lower().endswith(EXTENSIONS):
                files.append((f"{prefix}/{entry.name}", size_of(entry)))
            elif entry.name.lower().endswith(UNREAD):
                unread.append(f"{prefix}/{entry.name}")
    yield prefix, files


def size_of(file: os.DirEntry | str) -> int:
    """Bytes of a file; ValueError for a link to nothing."""
    try:
        return os.stat(file).st_size
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(file)}: a link to a file that is not there") from None


def listing(path: str) -> tuple[Photos, np.ndarray]:
    """The photos of a folder and their sizes in bytes, i64[n].

    Classes are the subfolders in sorted order; files come class by class, folder by folder, sorted
    by code point: the order of torchvision's ImageFolder (0.29). Other files are ignored. Hidden
    files and folders are skipped, which ImageFolder does not do, and one line says how many. A
    folder without subfolders has photos without labels. The digest is over the relative names and
    the sizes in bytes, and not over the contents.

    Raises:
      ValueError: no such folder, neither class folders nor photos, or a class without photos.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{path}: {'not a folder' if root.exists() else 'no such folder'}")
    try:
        with os.scandir(root) as entries:
            everything = sorted((entry.name, entry.is_dir()) for entry in entries)
        skipped = [name for name, _ in everything if hidden(name)]
        inside = [entry for entry in everything if not hidden(entry[0])]
        classes = tuple(name for name, is_folder in inside if is_folder)
        unread = [name for name, _ in inside if name.lower().endswith(UNREAD)]
        loose = [name for name, _ in inside if name.lower().endswith(EXTENSIONS)]
        if not classes and not loose:
            raise ValueError(
                f"{path}: no photos in it; they are looked for as FOLDER/CLASS/NAME.JPEG, or"
                " without labels as FOLDER/NAME.JPEG"
            )
        with ThreadPoolExecutor(LISTING_THREADS) as threads:
            folders = list(
                threads.map(
                    lambda name: sorted(walk(os.path.join(path, name), name, skipped, unread)),
                    classes,
                )
            )
    except OSError as error:
        raise ValueError(f"{error.filename or path}: {error.strerror or error}") from None
    files = [
        [file for _, of_folder in of_class for file in sorted(of_folder)] for of_class in folders
    ]
    empty = [name for name, of_class in zip(classes, files, strict=True) if not of_class]
    if empty:
        raise ValueError(
            f"{path}: no image in class folder {first_few(empty)}; remove it, or fill it"
        )
    if not classes:
        files = [[(name, size_of(os.path.join(path, name))) for name in loose]]
    elif loose:
        say(
            f"{path}: {len(loose)} photos beside the class folders are not used: {first_few(loose)}"
        )
    if skipped:
        say(
            f"{path}: {len(skipped)} hidden files and folders are skipped:"
            f" {first_few(sorted(skipped))}"
        )
    if unread:
        say(
            f"{path}: {len(unread)} photos are not used, for their names end with none of"
            f" {' '.join(EXTENSIONS)}: {first_few(sorted(unread))}; convert them"
        )
    names = tuple(name for of_class in files for name, _ in of_class)
    sizes = np.array([size for of_class in files for _, size in of_class], np.int64)
    numbers = np.arange(len(classes), dtype=np.int32)
    labels = np.repeat(numbers, [len(of_class) for of_class in files]) if classes else numbers
    lines = "".join(f"{name}\0{size}\n" for name, size in zip(names, sizes.tolist(), strict=True))
    photos = Photos(
        path.rstrip("/") or path,
        partial(read_file, path),
        names,
        labels,
        classes,
        hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest(),
        shlex.quote(path),
        sizes,
    )
    return photos, sizes


def first_few(names: list[str], most: int = 3) -> str:
    """The first few of many names, for a message of one line."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def photos(path: str, eval_path: str) -> tuple[str, Photos, Photos]:
    """(name, pool, evaluation photos) of two folders with the same classes, or without labels on
    one side or both. Without `eval_path` there are no evaluation photos.

    Raises:
      ValueError: see `listing`; the classes differ; one folder lies within the other.
    """
    if not path:
        raise ValueError(
            "data.source=folder needs a folder of photos: data.path=POOL; and to evaluate on,"
            " another one: data.eval_path=EVALUATION"
        )
    if not eval_path:
        none = np.zeros(0, np.int64)
        nothing = Photos("no evaluation folder", partial(read_file, ""), (), none, (), "", "", none)
        return "/".join(Path(path).resolve().parts[-2:]), listing(path)[0], nothing
    here, there = Path(path).resolve(), Path(eval_path).resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"data.path {path} and data.eval_path {eval_path} are one folder, or one is"
            " inside the other; evaluate on images outside the pool"
        )
    (pool, _), (evaluation, _) = listing(path), listing(eval_path)
    for (one, first), (other, second) in (
        ((pool, path), (evaluation, eval_path)),
        ((evaluation, eval_path), (pool, path)),
    ):
        lacking = sorted(set(one.class_names) - set(other.class_names))
        if lacking and other.class_names:
            raise ValueError(
                f"{len(lacking)} class folders of {first} are not in {second}:"
                f" {first_few(lacking)}; both must have the same classes"
            )
    return "/".join(here.parts[-2:]), pool, evaluation
