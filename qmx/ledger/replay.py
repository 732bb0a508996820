"""A ledger's traffic: the requests to a target in the order in which they were made.

The ledger holds no times. Requests are numbered as they are made, and answers lie in the order in
which they came, so that the order is known and the clock is not.
"""

import json
from pathlib import Path
from typing import NamedTuple

from qmx.ledger.accounts import MANY, RECORDED
from qmx.ledger.content import named
from qmx.ledger.file import Damaged, File, looked_into


class Request(NamedTuple):
    """One request, as the target's owner would have seen it."""

    batch: int  # its place among the target's, from 1 on
    purpose: str
    retry: bool  # it repeats one that failed
    views: int  # images sent
    # "answered"; "failed", or refused; "none", lost with its process; "recorded", nothing was sent
    # and the owner's table had the answers
    outcome: str
    # SHA-256 of each image, see `pixel_digests`, as they were sent; those without an answer come
    # last. Fewer than `views` where the ledger does not know them, as of a batch that failed.
    images: list[bytes]
    keys: list[bytes]  # of each, see `keys_of`


class NotOne(ValueError):
    """No target of a ledger matches, or several do."""


def traffic(path: Path, target: str = "") -> list[Request]:
    """Every request to one target, the first one first.

    An answer that was bought for the report and used for training later is put back where it came
    from. An image that was asked about again for a richer answer is where this answer came from.

    Args:
      target: the digest or name of a target, or its beginning; needed if the ledger has several.

    Raises:
      ValueError: the file is no ledger.
      NotOne: no target, or several targets match.
      Damaged: a row is not as it was written.
    """
    with looked_into(path) as file:
        name = _target(file, target)
        requests = file.run(
            "SELECT id, purpose, views, retry, answered, failed FROM requests WHERE target = ? AND"
            " purpose != ? ORDER BY id",
            [name, RECORDED],
        )
        if not all(isinstance(row[1], str) and {*map(type, row[2:])} == {int} for row in requests):
            raise Damaged(path, "a request is not as it was written")
        images = _images(file, name, requests)
    found: list[Request] = []
    after: Request | None = None
    for number, purpose, views, retry, answered, failed in reversed(requests):
        pairs = images[number]
        if not pairs and after and after.retry and after.views == views:
            pairs = list(zip(after.images, after.keys, strict=True))  # the same batch again
        outcome = "answered" if answered else "failed" if failed else "none"
        if not views:
            if not pairs:
                continue  # it was made to give answers another purpose
            outcome = "recorded"
        split = [image for image, _ in pairs], [key for _, key in pairs]
        after = Request(0, purpose, bool(retry), views, outcome, *split)
        found.append(after)
    return [one._replace(batch=i) for i, one in enumerate(reversed(found), start=1)]


def _images(file: File, target: str, requests: list[tuple]) -> dict[int, list[tuple[bytes, bytes]]]:
    """(image, key) of everything that each request asked about, in its order."""
    of: dict[int, list[tuple[int, bytes, bytes]]] = {row[0]: [] for row in requests}
    sent = {number: views for number, _, views, *_ in requests}
    moved = list[tuple[int, tuple[int, bytes, bytes]]]()
    # Refused ones have no row among the answers: they come last.
    for table, place in (("answers", "row"), ("refused", "9e18")):
        for rows in file.stream(
            f"SELECT request, {place}, image, key FROM {table} JOIN requests ON request = id WHERE"
            f" target = ? AND purpose != ? ORDER BY {table}.rowid",
            [target, RECORDED],
            MANY,
        ):
            for number, at, image, key in rows:
                if not (isinstance(image, bytes) and isinstance(key, bytes)):
                    raise Damaged(file.path, "an answer is not as it was written")
                one = (int(at), image, key)
                if sent[number]:
                    of[number].append(one)
                else:
                    moved.append((number, one))
    # A request of no views was made to give answers another purpose: they belong to the requests
    # that sent more than they have now, in the order of both.
    room = iter(
        [
            number
            for number, _, views, _, answered, _ in requests
            if answered
            for _ in range(views - len(of[number]))
        ]
    )
    for number, one in moved:
        of[next(room, number)].append(one)
    return {number: [one[1:] for one in sorted(some)] for number, some in of.items()}


def _target(file: File, beginning: str) -> str:
    """The one target of a ledger whose digest or name begins so."""
    names = [
        name for (name,) in file.run("SELECT target FROM requests GROUP BY 1 ORDER BY MIN(id)")
    ]
    if not all(isinstance(name, str) for name in names):
        raise Damaged(file.path, "the name of a target is not a text")
    chosen = named(names, beginning)
    if len(chosen) != 1:
        raise NotOne(
            f"{file.path} has {len(chosen)} targets that begin with {beginning!r}; give"
            f" --target=BEGINNING of one of: {', '.join(chosen or names) or 'none'}"
        )
    return chosen[0]


def lines(requests: list[Request]) -> list[str]:
    """JSON of each request: "batch", "time" (always null), "purpose", "retry", "outcome", "views",
    and the digests "images" in hexadecimal."""
    return [
        json.dumps(
            {
                "batch": one.batch,
                "time": None,
                "purpose": one.purpose,
                "retry": one.retry,
                "outcome": one.outcome,
                "views": one.views,
                "images": [image.hex() for image in one.images],
            }
        )
        for one in requests
    ]


def extent(path: Path) -> dict[str, int]:
    """Numbers of requests and answers in a ledger, by which one tells that it has grown."""
    with looked_into(path) as file:
        tables = "requests", "answers"
        return {name: file.run(f"SELECT COUNT(*) FROM {name}")[0][0] for name in tables}
