"""Images that were sent and got no answer: the target refuses them, or its scores are not finite.

They are written down with the reason, and are not asked about again. A run goes on without them
while they are few.
"""

from qmx.ledger import stored
from qmx.ledger.file import File
from qmx.ledger.stored import FEW

NOT_FINITE = "the scores are not finite"
SHOWN = 3  # images that a message names

OF_TARGET = "refused WHERE request IN (SELECT id FROM requests WHERE target = ?)"


class TooManyRefused(ValueError):
    """Raised where more images have no answer than the caller allows."""


def find(file: File, keys: list[bytes]) -> set[bytes]:
    """Those of the keys whose images were refused."""
    if not file.run("SELECT 1 FROM refused LIMIT 1"):
        return set()
    found, distinct = set[bytes](), sorted(set(keys))
    for start in range(0, len(distinct), FEW):
        few = distinct[start : start + FEW]
        places = ",".join("?" * len(few))
        rows = file.run(f"SELECT key FROM refused WHERE key IN ({places})", few)
        found.update(key for (key,) in rows)
    return found


def keep(file: File, request: int, key: bytes, image: bytes, why: str) -> None:
    """Write down that a request about one image was refused."""

    def write() -> None:
        file.run(
            "INSERT OR REPLACE INTO refused (key, image, request, why) VALUES (?, ?, ?, ?)",
            [key, image, request, why],
        )
        file.run("UPDATE requests SET failed = 1 WHERE id = ?", [request])

    file.together(write)


def count(file: File, target: str) -> int:
    """Number of a target's refused images."""
    return file.run(f"SELECT COUNT(*) FROM {OF_TARGET}", [target])[0][0]


def first(file: File, target: str) -> list[str]:
    """The first few refused images of a target, each with the reason."""
    rows = file.run(f"SELECT why FROM {OF_TARGET} ORDER BY request, rowid LIMIT ?", [target, SHOWN])
    return [str(why) for (why,) in rows]


def left_out(file: File, keys: set[bytes], total: int) -> str:
    """A line about refused images, of so many that were asked about."""
    some = sorted(keys)[:FEW]
    rows = file.run(
        f"SELECT why FROM refused WHERE key IN ({','.join('?' * len(some))})"
        " ORDER BY request, rowid LIMIT ?",
        [*some, SHOWN],
    )
    return (
        f"{len(keys)} of {total} images have no answer and are left out"
        f" ({_listed([str(why) for (why,) in rows], len(keys))})"
    )


def _listed(some: list[str], number: int) -> str:
    more = f"; and {number - len(some)} more" if number > len(some) else ""
    return "; ".join(some) + more


def forget(file: File, target: str) -> int:
    """Forget a target's refused images; returns their number. They will be asked about again."""
    number = count(file, target)
    file.run(f"DELETE FROM {OF_TARGET}", [target])
    return number


def check(file: File, target: str, total: int, allowed: float) -> None:
    """Raise TooManyRefused if more than the share `allowed` of `total` images have no answer.

    Args:
      total: the images that the target was asked about, and will be.
    """
    bad = count(file, target)
    if bad <= allowed * total:
        return
    cure = (
        "Raise target.max_refused to go on without them; or, once the target is mended"
        if stored.classes(file, target)
        else "It has answered none so far: a setting of it is likely to be wrong; when it is right"
    )
    raise TooManyRefused(
        f"{bad} of {total} images have no answer, and target.max_refused={allowed:g} allows"
        f" {int(allowed * total)} ({_listed(first(file, target), bad)}). {cure}, let them be asked"
        f" about again: python -m qmx.ledger forget {file.path}"
    )
