"""Address and token of a served target. No secret is written down."""

import os
import re
from ipaddress import ip_address
from urllib.parse import urlsplit


def check_address(url: str, token_env: str = "", headers_env: tuple[str, ...] = ()) -> None:
    """Raise ValueError for a bad address, or one that would reveal a secret; repeats no secret."""
    names = [name for header in headers_env for name in _checked(header)[:1]]
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise ValueError(
            "target.url must be http:// or https:// with a host, as in"
            " https://models.example.org:8443"
        )
    if "@" in parts.netloc:
        raise ValueError(
            "target.url holds a user's name or password, which would be written down; leave them"
            " out and name an environment variable with a token in target.token_env"
        )
    if parts.query or parts.fragment:
        raise ValueError(
            "target.url goes on after ? or #, where secrets would be written down; leave that out"
        )
    # Only capitals, so that a token given in place of the name is hardly ever taken for a name.
    if token_env and not re.fullmatch("[A-Z_][A-Z0-9_]*", token_env):
        raise ValueError(
            "target.token_env must be the name of an environment variable in capitals, as in "
            "QMX_TARGET_TOKEN, and not the token"
        )
    secret = [token_env] if token_env else [name for name in names if name.lower() != "host"]
    if secret and parts.scheme == "http" and not loopback(host):
        raise ValueError(
            f"target.url http://{host} would send the token of {secret[0]} in clear text; use"
            " https://"
        )


def _checked(header: str) -> tuple[str, str]:
    """(name, variable) of "Name:VARIABLE"; ValueError if it is none."""
    name, _, variable = header.partition(":")
    if not re.fullmatch("[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or not re.fullmatch(
        "[A-Z_][A-Z0-9_]*", variable.strip()
    ):
        raise ValueError(
            "target.headers_env takes words like X-Api-Key:MY_KEY: the name of a header, and of the"
            " environment variable, in capitals, that has its value"
        )
    return name, variable.strip()


def headers_of(headers_env: tuple[str, ...]) -> dict[str, str]:
    """Headers by name, their values from environment variables.

    Raises:
      ValueError: a word is not "Name:VARIABLE"; there is no such variable, or its value cannot be a
        header's. The value is not repeated.
    """
    found = {}
    for name, variable in map(_checked, headers_env):
        value = os.environ.get(variable, "").strip()
        if not value or not re.fullmatch("[ -~]+", value):
            what = "holds characters that no header has" if value else "is not set, or empty"
            raise ValueError(
                f"target.headers_env {name}:{variable}: the environment variable {variable} {what};"
                " export it"
            )
        found[name] = value
    return found


def secrets(token_env: str, headers_env: tuple[str, ...] = ()) -> tuple[str, ...]:
    """All values that no message may show: the token's, and those of the headers but Host."""
    headers = headers_of(headers_env)
    return (bearer(token_env), *(headers[name] for name in headers if name.lower() != "host"))


def bearer(token_env: str) -> str:
    """The token in an environment variable; "" if no variable is named.

    Raises:
      ValueError: there is no such variable, or its value cannot be a token; the value is not
        repeated.
    """
    if not token_env:
        return ""
    token = os.environ.get(token_env, "").strip()
    if not token:
        raise ValueError(
            f"target.token_env {token_env}: there is no such environment variable, or it is empty; "
            "export it"
        )
    # Else an error of the HTTP library would show it.
    if not re.fullmatch("[!-~]+", token):
        raise ValueError(
            f"target.token_env {token_env} holds characters that no token has, as spaces or line"
            " ends"
        )
    return token


def loopback(host: str) -> bool:
    """True for a name or number of this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
