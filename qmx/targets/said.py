"""Text from outside, made fit to be shown and written down: the token is not in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

PIECE = 8  # characters of a token that are no longer shown
LONGEST = 200  # characters of what a server says
CAPITALS = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


def masked(text: str, *tokens: str) -> str:
    """`text` with *** for each token and for every piece of it, in capitals or not.

    A piece has 8 characters or more, so that a token that was cut off is not shown either. The
    token is known with its quotes and backslashes escaped, too, and as it is in an address.
    """
    for token in filter(None, tokens):
        text = _without_one(text, token)
    return text


def _without_one(text: str, token: str) -> str:
    lower, size = text.translate(CAPITALS), min(PIECE, len(token))
    doubled = token.replace("\\", "\\\\")
    forms = (
        token,
        doubled,
        doubled.replace("'", "\\'"),
        doubled.replace('"', '\\"'),
        quote(token, safe=""),
    )
    pieces = {
        form[start : start + size].translate(CAPITALS)
        for form in forms
        for start in range(len(form) - size + 1)
    }
    parts, shown, start = list[str](), 0, 0
    while start <= len(lower) - size:
        end = start
        while lower[end : end + size] in pieces:
            end += 1
        if end > start:
            parts += [text[shown:start], "***"]
            shown = start = end + size - 1
        else:
            start += 1
    return "".join([*parts, text[shown:]])


def shown(data: bytes | str, *tokens: str) -> str:
    """Words of a server in one line of printable characters, without the tokens, and then cut."""
    text = data.decode(errors="replace") if isinstance(data, bytes) else data
    line = " ".join(masked(text, *tokens).split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) < LONGEST else line[:LONGEST] + " ..."


@contextmanager
def without(*tokens: str) -> Iterator[None]:
    """In the errors that leave this block the tokens are masked, and no other error is behind them.

    Everything that a server says of itself or answers is read in such a block.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        error.args = tuple(
            masked(arg, *tokens) if isinstance(arg, str) else arg for arg in error.args
        )
        raise error from None
