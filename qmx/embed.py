"""Features of a folder of photos by an encoder that qmx wrote.

    python -m qmx.embed runs/photos/pretrain/moco-seed0/encoder.safetensors PHOTOS features.npz

OUT is .npz ("names", "features" f32[n, F]), .parquet (needs pyarrow; "name", "features") or .csv
(name, then the numbers). Photos are found in PHOTOS and below it, whatever their folders are, in
the order of their names, and are shown to the encoder as those were that it was trained on. A photo
that cannot be read is named and left out.
"""

import argparse
import csv
import io
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from qmx.data.folder import hidden
from qmx.data.photos import decode, formats, in_threads, shown
from qmx.encoders import Loaded, encode, load_encoder
from qmx.files import write_arrays, write_bytes, write_text
from qmx.progress import progress, say

SUFFIXES = tuple(
    suffix for suffix, name in Image.registered_extensions().items() if name in formats()
)
CHUNK = 1024  # photos in memory at a time
FORMATS = (".npz", ".parquet", ".csv")


def found(folder: Path) -> list[Path]:
    """Files of a folder that are named as images, without hidden ones; ValueError if there is
    none."""
    files, seen = list[Path](), set[str]()
    for place, below, names in os.walk(folder, followlinks=True):
        # A link may lead to a folder above it.
        real = os.path.realpath(place)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        files += [Path(place, name) for name in names if not hidden(name)]
        links = {name for name in below if Path(place, name).is_symlink()}
        shown_ones = {name for name in below if not hidden(name)}
        below[:] = [*sorted(shown_ones - links), *sorted(shown_ones & links)]
    files = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: no photo is in it, or below it")
    return files


def prepared(encoder: Loaded, path: Path) -> np.ndarray:
    """A photo as the encoder takes it, uint8[H, W, C]."""
    height, width, channels = encoder.shape
    image = decode(path.read_bytes(), str(path))
    if height == width:
        pixels = shown(image, encoder.facts["resize"] or height, height)
    else:
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def features(encoder: Loaded, files: list[Path]) -> tuple[list[Path], np.ndarray]:
    """The files that can be read, and their features f32[n, F]."""
    read, rows = list[Path](), []
    with progress("embed", len(files)) as shown_progress:
        for start in range(0, len(files), CHUNK):
            some = files[start : start + CHUNK]
            images = np.zeros((len(some), *encoder.shape), np.uint8)
            wrong: dict[int, str] = {}

            def one(row: int, i: int, images=images, wrong=wrong) -> None:
                try:
                    images[row] = prepared(encoder, files[i])
                except (ValueError, OSError) as error:
                    wrong[row] = str(error)

            in_threads(one, np.arange(start, start + len(some)))
            for row in sorted(wrong):
                say(f"left out: {wrong[row]}")
            good = [row for row in range(len(some)) if row not in wrong]
            if good:
                rows.append(encode(encoder, images[good]))
                read += [some[row] for row in good]
            shown_progress.update(start + len(some))
    if not rows:
        raise ValueError("no photo could be read")
    return read, np.concatenate(rows)


def check_names(files: list[Path], out: Path) -> None:
    """Raise ValueError for a name that a text file cannot hold."""
    for path in files:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{str(path)!r} has a name that is no UTF-8, which {out.suffix} cannot hold; rename"
                " it, or write .npz"
            ) from None


def write(out: Path, names: list[str], rows: np.ndarray) -> None:
    """Write names and features, whole or not at all."""
    if out.suffix == ".npz":
        write_arrays(out, names=np.array(names), features=rows)
    elif out.suffix == ".csv":
        text = io.StringIO()
        csv.writer(text).writerows([name, *row] for name, row in zip(names, rows, strict=True))
        write_text(out, text.getvalue())
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
        file = io.BytesIO()
        pq.write_table(pa.table({"name": names, "features": columns}), file)
        write_bytes(out, file.getvalue())


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        "python -m qmx.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("encoder", type=Path, help="a .safetensors file that qmx wrote")
    parser.add_argument("folder", type=Path, help="photos, in it and below it")
    parser.add_argument("out", type=Path, help="to write: .npz, .parquet or .csv")
    args = parser.parse_args(argv)
    try:
        if args.out.suffix not in FORMATS or not args.out.parent.is_dir():
            raise ValueError(
                f"cannot write {args.out}; give a name that ends with {', '.join(FORMATS)} in a"
                " directory that exists"
            )
        if args.out.suffix == ".parquet":
            import pyarrow.parquet  # noqa: F401
        encoder, files = load_encoder(args.encoder), found(args.folder)
        if args.out.suffix != ".npz":
            check_names(files, args.out)
        files, rows = features(encoder, files)
        names = [str(path.relative_to(args.folder)) for path in files]
        write(args.out, names, rows)
    except ModuleNotFoundError as error:
        print(f"embed: .parquet needs {error.name}: pip install pyarrow", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print("embed:", *str(error).split(), file=sys.stderr)
        return 2
    print(f"wrote {rows.shape[0]} x {rows.shape[1]} features to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
