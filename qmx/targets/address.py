"""Address and token of a served target. No secret is written down."""

import os
import re
from ipaddress import ip_address
from urllib.parse import urlsplit


def check_address(url: str, token_env: str = "") -> None:
    """Raise ValueError for a bad address, or one that would reveal a secret; repeats no secret."""
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
    if token_env and parts.scheme == "http" and not _loopback(host):
        raise ValueError(
            f"target.url http://{host} would send the token of {token_env} in clear text; use"
            " https://"
        )


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


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
