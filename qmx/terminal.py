"""Lines on standard out and standard error, also where nobody reads them."""

import os
import sys
import unicodedata

DONE, MISTAKE = 0, 2  # exit statuses


def printable(text: str) -> str:
    """Text whose control characters, terminal escapes and marks of direction are question marks."""
    shown = (c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" for c in text)
    return "".join(c if known else "?" for c, known in zip(text, shown, strict=True))


def tell(message: str) -> None:
    """One line on standard error, from any process. A run goes on where nobody can read it."""
    if sys.stderr is None:  # closed before the program began
        return
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except (OSError, ValueError):  # its reader has gone, its disk is full, or it was closed
        sys.stderr = open(os.devnull, "w")


def show(text: str) -> int:
    """Print on standard out; returns the status. Whoever read it may have gone."""
    text = printable(text)
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError as error:  # as ± in ASCII
            print(text.encode(error.encoding, "replace").decode(error.encoding), flush=True)
    except OSError as error:
        # Else Python would try again at its end, and complain.
        sys.stdout = open(os.devnull, "w")
        if not isinstance(error, BrokenPipeError):
            return fail(f"standard out cannot be written: {error.strerror}", MISTAKE)
    return DONE


def explain(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 2000 else text[:2000] + " ..."


def fail(message: str, status: int) -> int:
    """One line on standard error; returns the status."""
    tell(f"qmx: {message}")
    return status
