"""Signals that stop a run after it has saved."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM or SIGINT came; the second one ends the program at
    once. On leaving, signals do what they did before."""
    seen: list[int] = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if seen:
                os._exit(128 + number[0])  # as a shell reports it
            seen.append(number[0])

    # A thread learns of a signal while the program compiles; a handler only when that is over.
    handlers = {
        number: signal.signal(number, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    before = signal.set_wakeup_fd(writer)
    thread = threading.Thread(target=watch, name="watch for signals", daemon=True)
    thread.start()
    try:
        yield lambda: bool(seen)
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set by Python
        os.close(writer)  # which ends the thread
        thread.join()
        os.close(reader)
