"""Progress of a run for people: a bar in a terminal, lines in a file. All on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qmx.sharding import first
from qmx.terminal import tell

LINE_SECONDS = 10  # between the lines of one stage where there is no terminal


def say(message: str) -> None:
    """One line for the user, from the first process."""
    if first():
        tell(message)


class Progress:
    """Progress of one stage. `update(done, text)`; the rate is in `unit`s, `per_step` a step."""

    def __init__(self, name: str, total: int, per_step: int, unit: str, bar: Any = None):
        self.name, self.total, self.per_step, self.unit, self.bar = name, total, per_step, unit, bar
        self.task = bar.add_task(name, total=total, text="compiling") if bar else None
        self.started = self.said = time.monotonic()
        self.first: int | None = None
        self.text = ""

    def update(self, done: int, text: str = "") -> None:
        """Say that `done` steps of the total are done."""
        now = time.monotonic()
        if self.first is None:  # the first step holds the compilation; the rate starts after it
            self.first, self.started = done, now
        self.text = text
        if self.bar:
            self.bar.update(self.task, completed=done, text=f"{self._rate(done, now)} {text}")
        elif now - self.said > LINE_SECONDS and done < self.total:
            self.said = now
            steps = done - (self.first or 0)
            rest = (self.total - done) * (now - self.started)
            left = f", {rest / steps:.0f} s left" if steps else ""
            say(f"{self.name}: {done}/{self.total} {self._rate(done, now)} {text}{left}")

    def _rate(self, done: int, now: float) -> str:
        steps = done - (self.first or 0)
        return (
            f"{steps * self.per_step / max(now - self.started, 1e-9):.0f} {self.unit}/s"
            if steps
            else ""
        )


def counted(noun: str, total: int) -> Callable[[bool], None]:
    """A function that is told of each of `total` things whether it was done now, or found done; it
    says how many there are and how long the rest may take, every `LINE_SECONDS` at most."""
    began = said = time.monotonic()
    place = made = 0

    def count(now: bool) -> None:
        nonlocal place, made, said, began
        place += 1
        if not now and not made:
            began = time.monotonic()
        made += now
        clock = time.monotonic()
        if made and place < total and clock - said > LINE_SECONDS:
            said = clock
            say(
                f"{noun} {place} of {total}, {about((total - place) * (clock - began) / made)} left"
            )

    return count


def about(seconds: float) -> str:
    """A time for people: "about 40 s", "about 4 min", "about 2.5 h"."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


@contextmanager
def progress(name: str, total: int, per_step: int = 1, unit: str = "images") -> Iterator[Progress]:
    """Show the progress of a stage; afterwards one line says what it took.

    Args:
      name: of the stage.
      total: steps.
      per_step: how many `unit`s one step is, for the rate.
    """
    began = time.monotonic()
    if sys.stderr is not None and sys.stderr.isatty() and first():
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            shown = Progress(name, total, per_step, unit, bar)
            yield shown
    else:
        shown = Progress(name, total, per_step, unit)
        yield shown
    seconds = time.monotonic() - began
    if per_step > 1 or seconds > 1:  # a training, or something that one waited for
        noun = "steps" if per_step > 1 else unit
        say(f"{name}: {total} {noun} in {seconds:.1f} s {shown.text}".rstrip())
