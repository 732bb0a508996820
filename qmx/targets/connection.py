"""Connections to a server whose time-out covers the whole answer."""

import contextlib
import socket
import ssl
import threading
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from qmx.targets.address import loopback


class Watch:
    """Ends a connection when an answer, its headers included, is not whole after some seconds.

    A time-out of the socket alone begins anew with each byte that comes.
    """

    def __init__(self, sock: socket.socket, seconds: float):
        self.late, self._sock = False, sock
        self._timer = threading.Timer(seconds, self._end_it)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """Stop watching."""
        self._timer.cancel()

    def _end_it(self) -> None:
        self.late = True
        with contextlib.suppress(OSError):
            # As a plain socket: TLS would talk to the server once more.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)


class _Watched:
    """Part of a connection that watches over the answer."""

    def getresponse(self) -> Any:
        """The answer's status and headers; its `watch` goes on until the body is read."""
        watch = Watch(self.sock, self.timeout)  # type: ignore[attr-defined]
        try:
            response = super().getresponse()  # type: ignore[misc]
        except BaseException:
            watch.end()
            if watch.late:
                raise TimeoutError from None
            raise
        response.watch = watch
        return response


class _Http(_Watched, urllib3.connection.HTTPConnection):
    pass


class _Https(_Watched, urllib3.connection.HTTPSConnection):
    pass


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Https


WATCHED = {"http": _HttpPool, "https": _HttpsPool}


def connections(
    url: str, trusted: ssl.SSLContext | None, timeout: urllib3.Timeout
) -> urllib3.PoolManager:
    """Connections to a server, through the proxy that the environment names for it (HTTPS_PROXY,
    NO_PROXY and the like), if any; `trusted` is for TLS. Each answer has its `Watch`.

    None goes to this machine through a proxy, which is another one: a token may be sent here alone
    without TLS."""
    parts = urlsplit(url)
    host, proxy = parts.hostname or "", getproxies().get(parts.scheme)
    if not proxy or loopback(host) or proxy_bypass(host):
        found = urllib3.PoolManager(ssl_context=trusted, timeout=timeout)
        found.pool_classes_by_scheme = WATCHED
        return found
    user = urlsplit(proxy)
    login = f"{unquote(user.username)}:{unquote(user.password or '')}" if user.username else None
    headers = urllib3.make_headers(proxy_basic_auth=login)
    found = urllib3.ProxyManager(proxy, ssl_context=trusted, timeout=timeout, proxy_headers=headers)
    found.pool_classes_by_scheme = WATCHED
    return found
