"""Look into a ledger.

  python -m qmx.ledger summary FILE
      the targets whose answers it holds, the number of answers, and the queries spent on them
  python -m qmx.ledger verify FILE [--out=FILE.recovered]
      check that the file is as it was written; if not, save the whole answers in a new file
  python -m qmx.ledger export FILE OUT.npz|OUT.parquet [--target=BEGINNING]
      the answers of one target as a table, see qmx/ledger/table.py
  python -m qmx.ledger replay FILE [OUT.jsonl] [--target=BEGINNING]
      the requests to one target in the order in which they were made, one JSON line each: its
      number, its purpose and outcome, and the SHA-256 of each image; a ledger holds no times

  python -m qmx.ledger forget FILE [--target=BEGINNING]
      forget which images the target refused, so that a run asks about them again

FILE is only read, but by forget. Exit status: 0 done, and the file is whole; 1 it is damaged; 2 a
mistake, which one line explains.
"""

import argparse
import shlex
import sqlite3
import sys
from functools import cache
from pathlib import Path
from typing import NoReturn

from qmx.files import write_text
from qmx.ledger import refused
from qmx.ledger import table as recorded
from qmx.ledger.accounts import account
from qmx.ledger.content import count_classes, named
from qmx.ledger.file import Damaged, looked_into, opened
from qmx.ledger.replay import lines, traffic
from qmx.ledger.verify import problems, recover
from qmx.progress import progress

WHOLE, DAMAGED, MISTAKE = 0, 1, 2  # exit statuses


class Parser(argparse.ArgumentParser):
    """Parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{message}; --help shows how", MISTAKE))


@cache
def parser() -> Parser:
    """Of the command line."""
    made = Parser(
        prog="python -m qmx.ledger",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name in ("summary", "verify", "export", "replay", "forget"):
        command = commands.add_parser(
            name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("file", type=Path)
        if name == "verify":
            command.add_argument("--out", type=Path)
        if name == "export":
            command.add_argument("out", type=Path)
        if name == "replay":
            command.add_argument("out", type=Path, nargs="?")
        if name in ("export", "replay", "forget"):
            command.add_argument("--target")
    return made


def main(argv: list[str]) -> int:
    """Run one command, and return the exit status."""
    args = parser().parse_args(argv)
    try:
        if not args.file.is_file():
            raise ValueError(f"{args.file}: no such file")
        if args.command == "summary":
            print(summary(args.file))
            return WHOLE
        if args.command == "verify":
            return verify(args.file, args.out or args.file.with_name(args.file.name + ".recovered"))
        if args.command == "replay":
            return replay(args.file, args.out, args.target or "")
        if args.command == "forget":
            return forget(args.file, args.target or "")
        return export(args.file, args.out, args.target)
    except Damaged as error:
        return fail(str(error), DAMAGED)
    except (ValueError, OSError, sqlite3.Error) as error:
        return fail(str(error), MISTAKE)


def summary(path: Path) -> str:
    """Describe the answers of a ledger and the account of each target."""
    with looked_into(path) as file:
        kinds = file.run(
            "SELECT target, preprocessing, purpose, access, dtype, MIN(LENGTH(scores)), COUNT(*)"
            " FROM answers JOIN scores USING (row) JOIN requests ON request = id GROUP BY 1, 2, 3,"
            " 4, 5 ORDER BY 1, 2, 3"
        )
        lines = [f"{path}, {path.stat().st_size / 1e6:.1f} MB"]
        for (target,) in file.run("SELECT target FROM requests GROUP BY target ORDER BY MIN(id)"):
            asked = account(file, target)
            used = ", ".join(f"{count} for {purpose}" for purpose, count in asked.purposes.items())
            lines += [f"target {target}"]
            lines += [
                f"  {count} answers for {purpose}: {access} of {_classes(path, size, dtype)}"
                f" classes in {dtype}; preprocessing {preprocessing}"
                for owner, preprocessing, purpose, access, dtype, size, count in kinds
                if owner == target
            ]
            lines += [
                (
                    f"  asked: {asked.images} distinct images ({used}), {asked.views} views,"
                    f" {asked.calls} calls"
                ),
                (
                    f"  {asked.failed} sent in requests that failed ({asked.retried} sent again), "
                    f"{asked.unanswered} without an answer"
                ),
            ]
            if asked.refused:
                lines.append(
                    f"  {asked.refused} images refused: {'; '.join(refused.first(file, target))}"
                )
    return "\n".join(lines)


def _classes(path: Path, size: object, dtype: object) -> int:
    if (number := count_classes(size, dtype)) is None:
        raise Damaged(path, f"an answer has {size} bytes of {dtype!r}")
    return number


def forget(path: Path, target: str) -> int:
    """Forget the refused images of the target of this digest or name, or of those that begin so."""
    looked_into(path).close()  # another program's database gets no tables of ours
    with opened(path) as file:
        names = [name for (name,) in file.run("SELECT DISTINCT target FROM requests")]
        meant = named([*map(str, names)], target)
        number = sum(refused.forget(file, name) for name in names if str(name) in meant)
    print(f"{number} images without an answer will be asked about again")
    return WHOLE


def verify(path: Path, out: Path) -> int:
    """Check a ledger. If it is damaged, recover the answers that are whole."""
    with progress(f"check {path.name}", 100, unit="per cent") as shown:
        lines = problems(path, lambda done, total: shown.update(100 * done // total))
    if not lines:
        print(f"{path} is whole")
        return WHOLE
    print("\n".join([f"{path} is damaged", *(f"  {line}" for line in lines)]))
    with progress(f"recover {path.name}", 100, unit="per cent") as shown:
        back = recover(path, out, lambda done, total: shown.update(100 * done // total))
    share = 100 * back.answers / max(back.of, 1)
    print(
        f"{back.answers} of {back.of} answers of which there are traces ({share:.2f} %) are as they"
        f" were written; they are in {back.path}, and {path} is as it was"
    )
    # SQLite would write what is in the old log into the new file.
    log, old, new = (shlex.quote(str(each)) for each in (f"{path}-wal", path, back.path))
    print(
        f"the requests on record brought {back.asked} answers; a run asks for what is missing, once"
        f" the new file is in its place: rm -f {log} && mv {new} {old}"
    )
    if back.lost_requests:
        print(
            f"{back.lost_requests} of them lost the record of their request; they count for train"
        )
    return DAMAGED


def export(path: Path, out: Path, target: str | None) -> int:
    """Write the answers of one target as a table."""
    recorded.check_kind(out)
    table, views = recorded.from_ledger(path, target)
    recorded.save(out, table)
    print(
        f"{len(table.image)} answers of {table.scores.shape[1]} classes, target {table.target}, are"
        f" in {out}"
    )
    if views:
        print(
            f"{views} answers to views of other images were left out; a table holds images as"
            " they are"
        )
    return WHOLE


def replay(path: Path, out: Path | None, target: str) -> int:
    """Write the traffic of one target, to standard out if there is no file for it."""
    if out and out.exists():
        raise FileExistsError(f"{out} is there already; move it away or give another name")
    requests = traffic(path, target)
    text = "".join(f"{line}\n" for line in lines(requests))
    if out:
        write_text(out, text)
    else:
        print(text, end="")
    images = sum(len(one.images) for one in requests)
    print(
        f"{len(requests)} requests with {images} images"
        + (f" are in {out}" if out else "")
        + "; the ledger holds no times, and 'batch' is their order",
        file=sys.stdout if out else sys.stderr,
    )
    return WHOLE


def fail(message: str, status: int) -> int:
    """Print one line on standard error, and return the status."""
    # A message may repeat parts of a damaged file.
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    print(f"qmx: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
