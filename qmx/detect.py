"""Would a detector have noticed an audit? PRADA and a two-sample test over its traffic.

    python -m qmx.detect WORKDIR [--honest=IMAGES] [--encoder=FILE]

Replays the questions that all attacks of a run asked the target, in the order of its ledger, and
prints after how many queries each detector would have alarmed first; on the same images in random
orders; and on honest traffic. Writes WORKDIR/detection.json, which the next report reads. Asks the
target nothing.

Honest traffic is an npz with "image", or a folder of photos, which --honest names; without it, the
run's evaluation images. Its images have the class of the nearest image with an answer.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qmx.checkpoint import file_digest
from qmx.data import Dataset, Source, load
from qmx.detection import ALPHA, DELTA, pixels, watch
from qmx.encoders import encode, load_encoder
from qmx.files import Unreadable, read_arrays, read_json, read_sealed, write_json
from qmx.ledger import Ledger, keys_of
from qmx.ledger.replay import NotOne, extent, traffic
from qmx.progress import progress
from qmx.report import safe
from qmx.report.evidence import detection_note, detection_table
from qmx.report.tables import aligned

CHUNK = 256  # images in memory at a time
MOST = 2000  # queries, and honest images: a few seconds; later alarms come late
FILE = "detection.json"
Rows = Callable[[np.ndarray], np.ndarray]  # uint8[n, H, W, C] -> f32[n, D]


def detect(
    workdir: Path,
    honest: str = "",
    encoder: str = "",
    *,
    delta: float = DELTA,
    alpha: float = ALPHA,
    most: int = MOST,
) -> dict[str, Any]:
    """Watch the traffic of a run; returns what `FILE` holds.

    Args:
      honest: an npz or a folder; "" is the evaluation images.
      encoder: a file of `qmx.load_encoder`; "" is standardised pixels.
      delta, alpha: see `qmx.detection`.
      most: images of the traffic, and of the honest traffic, that are looked at.

    Raises:
      ValueError: what is missing or does not fit, in one line.
    """
    ledger = workdir / "ledger.sqlite"
    try:
        config = read_json(workdir / "config.json")["data"]
        target = read_sealed(workdir / "target.json")["known_as"]
        keys = read_arrays(workdir / "query" / "keys.npz")
        inputs = read_json(workdir / "query" / "inputs.json")
        ledger.stat()
    except (Unreadable, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{workdir} has no answers to replay ({error}); run qmx there") from None
    data = load(**config)
    place = {key.tobytes(): i for key, i in zip(keys["train"], keys["ids"], strict=True)}
    try:
        requests = [one for one in traffic(ledger, target) if one.purpose != "report"]
    except NotOne:
        requests = []
    asked = [key for one in requests if one.outcome != "failed" for key in one.keys]
    there = [key for key in asked if key in place][:most]
    if not there:
        raise ValueError(f"{ledger} has no questions of an attacker; run qmx there")
    ids = np.array([place[key] for key in there])
    names = {name: inputs[name] for name in ("target", "preprocessing")}
    for start in range(0, len(ids), CHUNK):
        some = slice(start, start + CHUNK)
        if keys_of(data.pool.shown(ids[some]), **names) != there[some]:
            raise ValueError(
                f"the images of {config['path'] or data.name} are not those, or not in the order,"
                f" that {workdir} asked about; run qmx there again, with --update"
            )
    of = _features(data, encoder)
    rows = _rows(data.pool, ids, of)
    shown = np.arange(len(keys["report"]))[:: -(-len(keys["report"]) // most) or 1]
    evaluation = keys.get("evaluation", np.arange(len(keys["report"])))[shown]
    known = _rows(data.evaluation, evaluation, of)
    with Ledger(ledger, target=target) as book:
        answers = book.read_keys(there, "label").argmax(1)
        known_answers = book.read_keys([keys["report"][i].tobytes() for i in shown], "label")
    regular, classes, source = known, known_answers.argmax(1), "the evaluation set"
    if honest:
        from sklearn.neighbors import KNeighborsClassifier

        others = _others(config, data, honest, most)
        regular, source = _rows(others, np.arange(others.size), of), Path(honest).name
        nearest = KNeighborsClassifier(1, algorithm="brute")
        nearest.fit(np.concatenate([rows, known]), np.concatenate([answers, classes]))
        classes = nearest.predict(regular)
    said = (
        f"{Path(encoder).name}, sha256 {file_digest(encoder)[:16]}"
        if encoder
        else "standardised pixels"
    )
    return {
        "traffic": {"queries": len(there), "left_out": len(asked) - len(there)},
        "honest": {"images": len(regular), "source": source},
        "features": f"{said}, {rows.shape[1]} numbers",
        "detectors": watch(rows, answers, regular, classes, delta=delta, alpha=alpha),
        "ledger": extent(ledger),
    }


def _features(data: Dataset, encoder: str) -> Rows:
    """The function from images to features; ValueError for an encoder of other images."""
    if not encoder:
        return partial(pixels, mean=data.mean, std=data.std)
    loaded = load_encoder(encoder)
    if loaded.shape != data.shape:
        raise ValueError(f"{encoder} takes images of {loaded.shape}; the run's are {data.shape}")
    return partial(encode, loaded)


def _rows(source: Source, ids: np.ndarray, of: Rows) -> np.ndarray:
    """Features of some images of a source, f32[n, D]."""
    parts = []
    with progress("features", len(ids)) as shown:
        for start in range(0, len(ids), CHUNK):
            parts.append(of(source.shown(ids[start : start + CHUNK])))
            shown.update(min(start + CHUNK, len(ids)))
    return np.concatenate(parts)


def _others(config: dict[str, Any], data: Dataset, honest: str, most: int) -> Source:
    """Images that the user names, shown as the run's are; ValueError if they are of another
    shape."""
    kind = "folder" if Path(honest).is_dir() else "arrays"
    own = {"source": kind, "path": honest, "eval_path": "", "leave_out": "", "cache": ""}
    others = load(**{**config, **own, "mean": (), "std": (), "limit": most})
    if others.shape != data.shape:
        raise ValueError(f"{honest} has images of {others.shape}; the run's are {data.shape}")
    return others.pool


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        "python -m qmx.detect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", type=Path, help="of a run whose target was asked")
    parser.add_argument("--honest", default="", help="an npz, or a folder of photos")
    parser.add_argument("--encoder", default="", help="a .safetensors file that qmx wrote")
    parser.add_argument("--delta", type=float, default=DELTA, help="PRADA's bound for W")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="the test's level")
    parser.add_argument("--most", type=int, default=MOST, help="images that are looked at")
    args = parser.parse_args(argv)
    try:
        if not (0 < args.delta <= 1 and 0 < args.alpha < 1 and args.most >= 1):
            raise ValueError("--delta and --alpha are shares above 0, and --most is above 0")
        limits = {"delta": args.delta, "alpha": args.alpha, "most": args.most}
        found = detect(args.workdir, args.honest, args.encoder, **limits)
        write_json(args.workdir / FILE, found)
    except (ValueError, LookupError, OSError) as error:
        print("detect:", *str(error).split(), file=sys.stderr)
        return 2
    shown = safe.texts(found, safe.plain)
    table = detection_table(shown)
    assert table is not None
    print(f"{table.title}\n\n{aligned(table)}\n\n{detection_note(shown)}")
    print(f"{args.workdir / FILE} holds this for the next report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
