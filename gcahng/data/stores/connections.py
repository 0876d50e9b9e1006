"""Connections to web servers whose answers end in time, and which log no secrets."""

import io
import logging
from collections.abc import Callable
from http.client import HTTPResponse
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import make_headers, parse_url

from gcahng.data.stores.retry import Pace, RetrySettings
from gcahng.data.stores.urls import redact

_CONNECTIONS = 16


def connection_pool(proxy: str, settings: RetrySettings) -> urllib3.PoolManager:
    """Connections to any number of hosts.

    Args:
        proxy: URL of the proxy, empty for none.
        settings: How slow an answer may be.
    """
    if proxy:
        headers = make_headers(proxy_basic_auth=parse_url(proxy).auth)
        manager: urllib3.PoolManager = urllib3.ProxyManager(proxy, maxsize=_CONNECTIONS, proxy_headers=headers)
    else:
        manager = urllib3.PoolManager(maxsize=_CONNECTIONS)
    answer = {"response_class": staticmethod(_answer_class(settings))}
    manager.pool_classes_by_scheme = {
        "http": type(
            "_Pool", (urllib3.HTTPConnectionPool,), {"ConnectionCls": type("_Plain", (HTTPConnection,), answer)}
        ),
        "https": type(
            "_PoolTls", (urllib3.HTTPSConnectionPool,), {"ConnectionCls": type("_Tls", (HTTPSConnection,), answer)}
        ),
    }
    return manager


def _answer_class(settings: RetrySettings) -> Callable[..., HTTPResponse]:
    return lambda *args, **kwargs: _PacedAnswer(Pace(settings), *args, **kwargs)


class _PacedAnswer(HTTPResponse):
    """An answer whose headers, body and trailers together keep the pace.

    A socket's time limit begins anew with every byte: headers, or the frame around chunks, that trickle in never
    exceed it.
    """

    def __init__(self, pace: Pace, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._received = 0
        self.fp.close()
        raw = sock.makefile("rb", buffering=0)
        self.fp = io.BufferedReader(_PacedBytes(raw, lambda: pace.check(self._received)))

    def read1(self, n: int = -1) -> bytes:
        block = super().read1(n)
        self._received += len(block)
        return block


class _PacedBytes(io.RawIOBase):
    """A socket's bytes; `check` is called before each receipt and may raise."""

    def __init__(self, raw: io.RawIOBase, check: Callable[[], None]) -> None:
        self._raw = raw
        self._check = check

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._check()
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Redacted(logging.Filter):
    """Takes the secrets of URLs out of messages, and the traceback, which repeats them."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args, record.exc_info = redact(record.getMessage()), (), None
        return True


for _name in ("urllib3.connection", "urllib3.connectionpool"):  # both log whole URLs, one of them as a warning
    logging.getLogger(_name).addFilter(_Redacted())
