"""SIGTERM and SIGINT: they end the program at once, or stop a run after it has saved."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 3.0  # seconds; most that is computed is done sooner

# What a forked process does first, as those of a target's own pool: else its signals, written into
# the pipe that it shares, would stop this one.
IN_CHILDREN: list[Callable[[], None]] = []


def _in_child() -> None:
    for forget in reversed(IN_CHILDREN):
        forget()


os.register_at_fork(after_in_child=_in_child)


@contextmanager
def end_on_signals() -> Iterator[None]:
    """The first signal ends the program, with one line and the status that a shell gives it; also
    amid an import or a call into compiled code. For the time before a run has anything to save."""

    def end(number: int) -> None:
        os.write(2, b"qmx: stopped before anything was begun\n")
        os._exit(128 + number)

    with _watched(end):
        yield


@contextmanager
def stop_on_signals(tell: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """A function that says whether a signal came; the second one ends the program at once. On
    leaving, signals do what they did before.

    Args:
      tell: called with a line for the user where the program has not stopped `PATIENCE` seconds
        after a signal, as amid a clustering.
    """
    seen: list[int] = []
    line = "stops as soon as what it computes now is done; a second signal ends it at once"
    late = threading.Timer(PATIENCE, tell, [line])
    late.daemon = True

    def note(number: int) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)
        late.start()

    try:
        with _watched(note):
            yield lambda: bool(seen)
    finally:
        late.cancel()


@contextmanager
def _watched(react: Callable[[int], None]) -> Iterator[None]:
    """Call `react` with each signal, in a thread of its own: a thread learns of a signal while the
    program compiles; a handler only when that is over."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    handlers = {
        number: signal.signal(number, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT)
    }

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in handlers:  # each signal that Python handles is written there
                react(number[0])

    def forget() -> None:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set by Python

    before = signal.set_wakeup_fd(writer)
    IN_CHILDREN.append(forget)
    thread = threading.Thread(target=watch, name="watch for signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        IN_CHILDREN.remove(forget)
        forget()
        os.close(writer)  # which ends the thread
        thread.join()
        os.close(reader)
