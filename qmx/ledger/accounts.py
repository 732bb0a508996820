"""Accounts of what was asked, and of the part that counts against the budget."""

from typing import NamedTuple

from qmx.ledger import refused
from qmx.ledger.file import Damaged, File

PURPOSES = ("train", "select", "report")
RECORDED = "recorded"  # purpose of answers that the owner handed out, until they are used
# Images that count against the budget: an image without an answer was asked about, too.
PAID = " UNION ALL ".join(
    f"SELECT image FROM {table} WHERE request IN "
    f"(SELECT id FROM requests WHERE target = ?1 AND purpose NOT IN ('report', '{RECORDED}'))"
    for table in ("answers", "refused")
)
MANY = 65536  # rows that are looked at together


class BudgetSpent(Exception):
    """The next request would exceed the budget. Nothing of it was sent."""


class Account(NamedTuple):
    """Counts of what one target was asked so far."""

    calls: int  # images sent in answered requests; an image sent twice counts twice
    images: int  # distinct images with an answer
    views: int  # distinct pixel arrays with an answer; several views may show one image
    # Images sent in requests without an outcome: in flight, or lost when a process was killed.
    unanswered: int
    failed: int  # images sent in requests that failed, or whose answer could not be used
    retried: int  # images sent again in requests that repeated a failed one
    # Distinct images by the purpose of their first answer; "report" gives way to the others.
    purposes: dict[str, int]
    # Images that the target refused, or whose scores were not finite; they are not asked again.
    refused: int = 0


# Python's sets count distinct images: for a million rows they take a fifth of the time of SQLite's
# COUNT(DISTINCT).


def paid(file: File, target: str) -> set[bytes]:
    """Distinct images asked about for "train" and "select", by their `pixel_digests`."""
    return {image for rows in file.stream(PAID, [target], MANY) for (image,) in rows}


def asked(file: File, target: str) -> int:
    """Images, or views of them, that a target answered or refused."""
    return sum(
        file.run(
            f"SELECT COUNT(*) FROM {table} WHERE request IN"
            " (SELECT id FROM requests WHERE target = ?)",
            [target],
        )[0][0]
        for table in ("answers", "refused")
    )


def sent(file: File, target: str) -> tuple[int, int, int, int]:
    """Images sent in requests to one target: answered, unanswered, failed, and sent again; read
    without its answers, which may be a million."""
    calls, unanswered, failed, retried = file.run(
        "SELECT COALESCE(SUM(views * answered), 0), COALESCE(SUM(views * (1 - answered - failed)),"
        " 0), COALESCE(SUM(views * failed), 0), COALESCE(SUM(views * retry), 0) FROM requests WHERE"
        " target = ?",
        [target],
    )[0]
    return calls, unanswered, failed, retried


def account(file: File, target: str) -> Account:
    """Counts of what one target was asked so far."""
    calls, unanswered, failed, retried = sent(file, target)
    used: dict[str, set[bytes]] = {name: set() for name in PURPOSES}
    views = 0
    for rows in file.stream(
        "SELECT purpose, image FROM answers JOIN requests ON request = id "
        "WHERE target = ? AND purpose != ?",
        [target, RECORDED],
        MANY,
    ):
        views += len(rows)
        for purpose, image in rows:
            if purpose not in used:
                raise Damaged(file.path, f"a request has the unknown purpose {purpose!r}")
            used[purpose].add(image)
    return Account(
        calls,
        len(set().union(*used.values())),
        views,
        unanswered,
        failed,
        retried,
        {name: len(keys) for name, keys in used.items()},
        refused.count(file, target),
    )


def answered_targets(file: File) -> dict[str, int]:
    """Number of answers by target, the one that was asked last at the end; without those that are
    recorded and not used."""
    rows = file.run(
        "SELECT target, COUNT(*) FROM answers JOIN requests ON request = id WHERE purpose != ?"
        " GROUP BY target ORDER BY MAX(id)",
        [RECORDED],
    )
    return dict(rows)


def check_budget(file: File, target: str, images: set[bytes], budget: int) -> None:
    """Raise BudgetSpent if images, by their `pixel_digests`, are more than the budget has left."""
    if (
        not images
        or file.run(f"SELECT COUNT(*) FROM ({PAID})", [target])[0][0] + len(images) <= budget
    ):
        return  # a count is enough: no need to read every paid image
    known = paid(file, target)
    new = len(images - known)
    if new and len(known) + new > budget:
        raise BudgetSpent(
            f"{len(known)} of {budget} queries are spent and {new} more are asked for; "
            "nothing was sent. Raise the budget or ask for fewer images"
        )
