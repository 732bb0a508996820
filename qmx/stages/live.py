"""The report while a run goes on."""

import time
from collections.abc import Callable

from qmx.progress import say
from qmx.sharding import from_first

EVERY = 10.0  # seconds between the end of one report and the next, at least
SHARE = 0.02  # of a run's time that its reports may take, where one takes long


def live(write: Callable[[], object]) -> Callable[[], None]:
    """A function that calls `write`, unless it did so a moment ago. A failure is told, once, and
    stops no run.

    All processes must call it at the same places, and `write` too.
    """
    due, told = 0.0, False

    def page() -> None:
        nonlocal due, told
        began = time.monotonic()
        if not from_first(lambda: began >= due):
            return
        try:
            write()
        except Exception as error:  # whatever it is: the students cost more than a page
            if not told:
                say(f"warning: the report of what is done so far cannot be written: {error}")
            told = True
        seconds = time.monotonic() - began
        due = began + seconds + max(EVERY, seconds / SHARE)

    return page
