"""Requests over HTTP, one attempt each and at a limited rate: a target may be slow or expensive.

Errors that are likely to pass are raised as `Unavailable`, so that the ledger asks again; others as
ValueError.
"""

import json
import logging
import re
import ssl
from collections.abc import Callable, Mapping
from urllib.request import getproxies

import urllib3

from qmx.ledger import Refused, Unavailable
from qmx.targets.address import check_address, headers_of, secrets
from qmx.targets.connection import Watch, connections
from qmx.targets.query import limiter
from qmx.targets.said import shown, without

# (method, path, body, headers) -> the body and the headers of the answer.
Send = Callable[[str, str, bytes | None, dict[str, str]], tuple[bytes, Mapping[str, str]]]

# RFC 9110, section 15, and RFC 6585 for 429. A 500 may come from a worker that died; another one
# takes the next attempt.
PASSING = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT = 600.0  # seconds; rather than wait longer, the run stops and can be run again
# Such a status is about the content of a request: with fewer images it may be answered.
CONTENT = (400, 413, 422)
LARGEST = 1 << 28  # bytes of an answer: 256 x 21,841 classes (ImageNet-21k) as JSON are half of it
LONGEST_TEXT = 1 << 16  # bytes of an error's text; MLServer sends whole tracebacks
CHUNK = 1 << 16
# In a refusal: a server that is still starting says so with any status.
STARTING = re.compile("not (yet )?ready|is loading|still loading|starting up", re.IGNORECASE)
# Words of a 500 by which a model refuses the shape or type of what it got: onnxruntime's, PyTorch's
# (convolutions, matrices, types, views), Keras's, NumPy's.
MISFIT = re.compile(
    r"INVALID_ARGUMENT|to have \d+ channels|shapes cannot be multiplied|type \(.*should be the same"
    r"|is invalid for input of size|Expected 3D .*or 4D|incompatible with the layer"
    r"|cannot reshape array",
    re.IGNORECASE,
)
MISFITS_CURE = (
    "the model does not take images that are shown so, or so many: look at target.shown.layout,"
    " .dtype, .size and .channels, and at target.batch_size"
)
MEMORY = re.compile("out of memory|RESOURCE_EXHAUSTED|allocate memory", re.IGNORECASE)
# A server without TLS, as OpenSSL 3.0 and, from 3.2 on, later ones see it.
PLAIN = re.compile("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE")
# The head of the frame of settings that a server of HTTP/2 sends first (RFC 9113, sections 3.4, 4.1
# and 6.5), as http.client quotes the line: a length of 3 bytes, a type of 4, no flags, stream 0.
HTTP2 = re.compile(r"\\x00.{1,8}?\\x04\\x00\\x00\\x00\\x00\\x00")
LATE = "a longer target.timeout waits, and a smaller target.batch_size makes smaller requests"
AGAIN = "the same request would be refused again"
CURES = {
    401: "target.token_env names the environment variable with a valid token",
    403: "target.token_env names the environment variable with a token that may ask this",
    404: "look at target.url, target.model and target.version",
    413: "a smaller target.batch_size makes smaller requests",
    501: "the server does not know such requests; leave target.version out if it is set",
}


class Unreachable(Unavailable):
    """No server is at the address."""


def client(
    url: str,
    *,
    token_env: str = "",
    headers_env: tuple[str, ...] = (),
    ca_file: str = "",
    timeout: float = 60.0,
    rate: float = 0.0,
) -> Send:
    """A function that sends one request and returns the body and headers of a 200 answer.

    The server's certificate is always verified. No redirect is followed, and nothing is sent twice.

    Args:
      url: http or https, host, and a path if there is one before the protocol's own.
      token_env: name of an environment variable; its value is sent as `Authorization: Bearer`. It
        is read again for each request, and no message shows it.
      headers_env: further headers, as "X-Api-Key:MY_KEY", "Cookie:SESSION", "Host:SITE": a name,
        and an environment variable that is treated as the token's.
      ca_file: PEM certificates to trust in place of the system's.
      timeout: seconds for the connection, and again for the whole answer with its headers.
      rate: most requests in a second; 0 is no limit.

    Raises:
      ValueError: the address is refused, or there is no such variable or file; by the function: an
        error that the next attempt would meet again.
      Unavailable: by the function: no answer, a broken one, or a status among `PASSING`.
      ConnectionError: by the function: the server asks to be left alone for more than
        `LONGEST_WAIT`.
    """
    check_address(url, token_env, headers_env)
    secrets(token_env, headers_env)
    # A plain address without a proxy needs none, and to read the system's takes a while.
    plain = url.lower().startswith("http:") and not ca_file and not getproxies()
    try:
        trusted = None if plain else ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:  # an ssl.SSLError is one
        raise ValueError(
            f"target.ca_file {ca_file} cannot be read as PEM certificates: {error}"
        ) from None
    pool = connections(url, trusted, urllib3.Timeout(connect=timeout, read=timeout))
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it repeats headers
    pause = limiter(rate)

    def send(
        method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[bytes, Mapping[str, str]]:
        hidden = secrets(token_env, headers_env)
        with without(*hidden):
            return exchange(method, path, body, headers, hidden)

    def exchange(
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        hidden: tuple[str, ...],
    ) -> tuple[bytes, Mapping[str, str]]:
        where = url.rstrip("/") + path
        allowed = headers_of(headers_env)
        if hidden[0]:
            allowed["Authorization"] = f"Bearer {hidden[0]}"
        pause()
        try:
            response = pool.request(
                method,
                where,
                body=body,
                headers={"User-Agent": "qmx", **headers, **allowed},
                retries=False,
                redirect=False,
                preload_content=False,
            )
            try:
                answer = _read(response, where, timeout)
            finally:
                # After a complete answer its connection is back in the pool, and stays open.
                response.close()
        except urllib3.exceptions.HTTPError as error:
            reason = shown(_reason(error, timeout), *hidden)
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise ValueError(
                    f"{url} has a certificate that is not trusted ({reason}); target.ca_file names"
                    " the certificates to trust"
                ) from None
            if isinstance(error, urllib3.exceptions.NewConnectionError):
                raise Unreachable(
                    f"{url} cannot be reached: {reason}; does a server run at target.url?"
                ) from None
            proxy = isinstance(error, urllib3.exceptions.ProxyError)
            if not proxy and PLAIN.search(str(error)):
                raise ValueError(
                    f"{url} does not answer in TLS; target.url takes http:// for such a port, or"
                    " the server's port for https://"
                ) from None
            if HTTP2.search(str(error)):
                raise ValueError(
                    f"{url} answers in HTTP/2, as ports for gRPC do (8001, 8081, 9000); target.url"
                    " takes the server's port for HTTP (8000, 8080)"
                ) from None
            late = f"; {LATE}" if body and "nothing came" in reason else ""
            raise Unavailable(f"{where} gave no whole answer: {reason}{late}") from None
        if response.status >= 500:
            pool.clear()  # servers in Python close it then, maybe amid the next request
        if response.status != 200:
            to = shown(response.headers.get("Location", ""), *hidden)
            message = shown(_said(answer), *hidden)
            raise _refusal(where, response.status, response.headers, to, message)
        return answer, response.headers

    return send


def _read(response: urllib3.BaseHTTPResponse, where: str, timeout: float) -> bytes:
    """The whole body. The time-out covers it all, also where a server sends a byte now and then."""
    body, watch = bytearray(), getattr(response, "watch", None)
    assert isinstance(watch, Watch)
    try:
        while chunk := response.read1(CHUNK):
            body += chunk
            if len(body) > LARGEST:
                raise ValueError(
                    f"{where} answers with more than {LARGEST >> 20} MiB; {CURES[413]}"
                )
    except urllib3.exceptions.HTTPError:
        if not watch.late:
            raise
    finally:
        watch.end()
    if watch.late:
        raise Unavailable(f"{where} did not end its answer within {timeout:g} s; {LATE}")
    return bytes(body)


def _refusal(
    where: str, status: int, headers: Mapping[str, str], location: str, message: str
) -> Exception:
    """The error for a status other than 200."""
    text = f"{where} answered {status}{f' ({message})' if message else ''}"
    if status == 500 and MISFIT.search(message):
        return Refused(f"{text}; {MISFITS_CURE}")
    if MEMORY.search(message):
        text += f"; {CURES[413]}"
    if status in PASSING or (status == 400 and STARTING.search(message)):
        wait = _retry_after(headers.get("Retry-After"))
        if wait and wait > LONGEST_WAIT:
            return ConnectionError(
                f"{text} and asks to be left alone for more than {LONGEST_WAIT / 60:g} minutes; run"
                " the same command again later"
            )
        return Unavailable(text, wait)
    if 300 <= status < 400:
        # As target.url is: what stands before /v2.
        to = re.split("/v2(?:/|$)", location.partition("?")[0].partition("#")[0])[0]
        return ValueError(
            f"{text}: it sends elsewhere, to {to}, which is not followed; if that is the right"
            " place, make it the target.url"
        )
    kind = Refused if status in CONTENT else ValueError
    return kind(f"{text}; {CURES.get(status, AGAIN)}")


def _retry_after(value: str | None) -> float | None:
    """Seconds until a Retry-After, which may be a date."""
    try:
        return None if value is None else urllib3.Retry(0).parse_retry_after(value)
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return None


def _said(body: bytes) -> str:
    """Message of a server about an error: the protocol's "error", else the start of the text, or
    the end of a traceback."""
    text = body[:LONGEST_TEXT].decode(errors="replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        lines = text.splitlines() if text.startswith("Traceback (") else []
        indented = [place for place, line in enumerate(lines) if line.startswith("  ")]
        return "\n".join(lines[indented[-1] + 1 :]) if indented else text


def _reason(error: BaseException, timeout: float) -> str:
    """The innermost cause, in a few words."""
    if isinstance(
        error,
        TimeoutError | urllib3.exceptions.ReadTimeoutError | urllib3.exceptions.ConnectTimeoutError,
    ) and not isinstance(error, urllib3.exceptions.NewConnectionError):
        return f"nothing came within {timeout:g} s"
    inner = next(
        (arg for arg in reversed(error.args) if isinstance(arg, BaseException)), error.__cause__
    )
    return (
        _reason(inner, timeout)
        if inner
        else getattr(error, "strerror", None) or str(error) or type(error).__name__
    )
