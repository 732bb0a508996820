"""The name by which the ledger knows the target, and what the workdir says of it."""

from contextlib import nullcontext
from itertools import count
from typing import Any

from qmx.files import SUMS, Unreadable, read_json, read_sealed, write_sealed
from qmx.ledger.accounts import answered_targets
from qmx.ledger.file import looked_into
from qmx.sharding import from_first
from qmx.stages.outside import NEW, SAME
from qmx.stages.run import Run

NAMES, VERDICTS = "target.json", "trial.json"  # in the workdir


def known_as(run: Run, result: dict) -> dict:
    """The result of the stage with the digest by which the ledger knows this target.

    Raises:
      ValueError: the ledger has answers of another one alone, and the user did not say which of the
        two this is. One that is trained here is another whenever it is trained another way.
    """
    found, given = result["sha256"], run.config.target.kind != "train"

    def name() -> str:
        told = read_name(run)
        if told.get("found") == found and "known_as" in told:
            # As NEW: a name that a call took which did not end, as one that was killed, is kept.
            begun = told.get("new") and not verdict(run, told["known_as"])
            if run.update != NEW or begun or run.only not in ("all", "target"):
                return told["known_as"]
        ledger = run.workdir / "ledger.sqlite"
        with looked_into(ledger) if ledger.exists() else nullcontext() as file:
            paid = answered_targets(file) if file else {}
        # What a digest does not tell, as other weights behind one version, a number does.
        own = [name for name in paid if name == found or name.startswith(f"{found}#")]
        known = own[-1] if own else found
        if given and run.update == NEW:
            taken = {*paid, *([told["known_as"]] if verdict(run, told.get("known_as")) else ())}
            names = (f"{found}#{number}" if number > 1 else found for number in count(1))
            known = next(name for name in names if name not in taken)
        elif given and paid and not own:
            last, answers = [*paid.items()][-1]
            if run.update != SAME:
                raise ValueError(
                    f"the target {result['name']} is not what it was when {ledger} got its"
                    f" {answers} answers; --update={SAME} goes on with them, --update={NEW} asks"
                    " it everything"
                )
            known = last
        new = {"new": True} if run.update == NEW else {}
        write_sealed(run.workdir / NAMES, {"found": found, "known_as": known, **new})
        return known

    return {**result, "sha256": from_first(name), "found": found}


def read_name(run: Run) -> dict[str, Any]:
    """The content of "target.json", which has the target's name in the ledger; {} if there is
    nothing to read."""
    try:
        return read_sealed(run.workdir / NAMES)
    except Unreadable:
        return {}


def end_new(run: Run) -> None:
    """Note that a call that said --update=new-target has ended: the next one that says so means
    another model again."""

    def note() -> None:
        if (told := read_name(run)).pop("new", None):
            write_sealed(run.workdir / NAMES, told)

    from_first(note)


def verdict(run: Run, known_as: str | None) -> str | None:
    """The words of a trial against a target, "" if there are none; None if it was not passed yet.
    In the first process."""
    try:
        return read_sealed(run.workdir / VERDICTS).get(known_as or "")
    except Unreadable:
        return None


def all_asked(run: Run, known_as: str) -> bool:
    """True if the stage query of a target is done."""
    query = run.workdir / "query"
    try:
        return (query / SUMS).exists() and read_json(query / "inputs.json")["target"] == known_as
    except Unreadable:
        return False
