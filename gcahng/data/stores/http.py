"""Shards on a web server, read by ranged GET requests."""

import base64
import logging
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from ssl import SSLCertVerificationError
from urllib.parse import urljoin
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import Timeout

from gcahng.data.stores.connections import connection_pool
from gcahng.data.stores.per_process import PerProcess
from gcahng.data.stores.remote import Blocks, RemoteStore
from gcahng.data.stores.retry import PermanentFault, RetrySettings, TemporaryFault
from gcahng.data.stores.urls import WebFolder, redact

log = logging.getLogger(__name__)

_BLOCK = 1 << 18
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_NUMBER = r"([0-9]{1,18})"
_CONTENT_RANGE = re.compile(rf"bytes\s+{_NUMBER}-{_NUMBER}/(?:{_NUMBER}|\*)", re.IGNORECASE)
_UNSATISFIED = re.compile(rf"bytes\s+\*/{_NUMBER}", re.IGNORECASE)
_DIGITS = re.compile(_NUMBER)
# Others of 400 to 499 stay what they are, however often one asks.
_MAY_PASS = (408, 425, 429)
_STAYS = (501, 505)
_REPAIRS = {
    401: "Check the user, the password or the token of the URL: signed URLs expire.",
    403: "Check the token of the URL (signed URLs expire) and the permissions of the folder.",
    404: "Check the URL: it must name the folder that holds manifest.json, uploaded whole.",
    410: "Check the URL: it must name the folder that holds manifest.json, uploaded whole.",
}
_CHECK_SERVER = "Check the URL and what the server serves there."


class HttpStore(RemoteStore):
    """Files of one http(s) folder, over one pool of connections per process.

    The URL's query goes to every file, its user and password to its own host only. Proxies are taken from the
    environment (`http_proxy`, `https_proxy`, `no_proxy`).

    Args:
        url: URL of the folder.
        retry: How patiently the server is asked.
    Raises:
        ConfigError: `url` is no http(s) URL.
    """

    def __init__(self, url: str, retry: RetrySettings | None = None) -> None:
        self._folder = WebFolder.parse(url)
        super().__init__(self._folder.shown(), self._folder.file(""), retry or RetrySettings())
        self._pools: PerProcess[dict[str, urllib3.PoolManager]] = PerProcess(dict)

    def close(self) -> None:
        for pool in (self._pools.made() or {}).values():
            pool.clear()
        self._pools.forget()

    def _size_once(self, name: str) -> int:
        # Not HEAD: signed URLs allow GET alone.
        response = self._open(name, "bytes=0-0")
        try:
            if response.status == 206:
                total = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
                if total and total[3]:
                    return int(total[3])
            elif response.status == 416:  # an empty file
                empty = _UNSATISFIED.fullmatch(response.headers.get("Content-Range", "").strip())
                if not empty:
                    raise _status_fault(response)
                return int(empty[1])
            elif response.status == 200:
                length = _DIGITS.fullmatch(response.headers.get("Content-Length", "").strip())
                if length:
                    return int(length[1])
            else:
                raise _status_fault(response)
            raise PermanentFault("the server does not tell the file's size", _CHECK_SERVER)
        finally:
            response.close()

    def _stream_once(self, name: str, offset: int, length: int | None) -> Blocks:
        response = self._open(name, None if length is None else f"bytes={offset}-{offset + length - 1}")
        try:
            skip = 0
            if length is not None and response.status == 206:
                self._check_range(name, response, offset, length)
            elif response.status == 200:
                self._check_whole(name, response, ranged=length is not None)
                skip = offset
            else:
                raise self._fault(name, response)
            yield from self._body(response, skip, length)
        finally:
            response.close()  # a connection with an answer half read is of no further use

    def _body(self, response: urllib3.BaseHTTPResponse, skip: int, length: int | None) -> Blocks:
        """Bytes from `skip` on, `length` of them where the answer is the whole file and more was not asked for."""
        received = 0
        stop = skip + length if length is not None and response.status == 200 else None
        while stop is None or received < stop:
            try:
                # One call returns what one read of the socket brings, so that slow bytes are noticed.
                block = response.read1(_BLOCK)
            except HTTPError as error:
                raise TemporaryFault(_reason(error)) from None
            if not block:
                break
            start = received
            received += len(block)
            wanted = block[max(0, skip - start) : None if stop is None else stop - start]
            if wanted:
                yield wanted

    def _open(self, name: str, byte_range: str | None) -> urllib3.BaseHTTPResponse:
        """The answer to a GET of a file, redirects followed. Its body is yet to be read."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": byte_range} if byte_range else {})
        url = self._folder.file(name)
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._request(url, headers)
            target = response.headers.get("Location")
            if response.status not in _REDIRECTS or not target:
                return response
            response.close()
            try:
                target = urljoin(url, target)
                scheme = urllib3.util.parse_url(target).scheme
            except ValueError:  # urllib3's LocationParseError is one, too
                raise PermanentFault(
                    f"redirected to {redact(target)[:200]!r}, which is no URL", _CHECK_SERVER
                ) from None
            if scheme not in ("http", "https") or (scheme == "http" and url.startswith("https:")):
                raise PermanentFault(f"redirected to {redact(target)}, which is not https", _CHECK_SERVER)
            url = target
        raise PermanentFault(f"more than {_MAX_REDIRECTS} redirects", _CHECK_SERVER)

    def _request(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        parts = urllib3.util.parse_url(url)
        if self._folder.user and (parts.scheme, parts.netloc) == self._folder.origin:
            user = base64.b64encode(self._folder.user.encode()).decode()
            headers = {**headers, "Authorization": f"Basic {user}"}
        try:
            return self._pool(parts.scheme or "", parts.host or "").request(
                "GET",
                url,
                headers=headers,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
                timeout=Timeout(connect=self.retry.connect_timeout_s, read=self.retry.read_timeout_s),
            )
        except HTTPError as error:
            inner = _innermost(error)
            if isinstance(inner, SSLCertVerificationError):
                repair = "Check the server's certificate and this machine's clock."
                raise PermanentFault(_reason(error), repair) from None
            raise TemporaryFault(_reason(error)) from None

    def _pool(self, scheme: str, host: str) -> urllib3.PoolManager:
        proxy = "" if proxy_bypass(host) else getproxies().get(scheme, "")
        pools = self._pools.get()
        if proxy not in pools:
            pools[proxy] = connection_pool(proxy, self.retry)
        return pools[proxy]

    def _check_range(self, name: str, response: urllib3.BaseHTTPResponse, offset: int, length: int) -> None:
        self.ranged = True
        _check_encoding(response)
        told = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(told.strip())
        if match and match[3]:
            self._check_total(name, int(match[3]))
        if not match or (int(match[1]), int(match[2])) != (offset, offset + length - 1):
            raise TemporaryFault(f"expected the bytes {offset}-{offset + length - 1}, the answer's range is {told!r}")
        size = response.headers.get("Content-Length")
        if size is not None and size != str(length):
            raise TemporaryFault(f"expected {length} bytes, the answer announces {size}")

    def _check_whole(self, name: str, response: urllib3.BaseHTTPResponse, ranged: bool) -> None:
        _check_encoding(response)
        if not ranged:
            return
        size = _DIGITS.fullmatch(response.headers.get("Content-Length", "").strip())
        if size:
            self._check_total(name, int(size[1]))
        if self.ranged is None:
            log.warning(
                "The server of %s sends whole files where parts are asked for: reads of single samples are slow until "
                "a shard is in the cache. Use a server with support for ranges (nginx, Apache, an object store).",
                self.location,
            )
        self.ranged = False

    def _fault(self, name: str, response: urllib3.BaseHTTPResponse) -> Exception:
        if response.status == 416:
            told = _UNSATISFIED.fullmatch(response.headers.get("Content-Range", "").strip())
            if told:
                self._check_total(name, int(told[1]))
        return _status_fault(response)


def _innermost(error: HTTPError) -> BaseException:
    """What urllib3's error was made of."""
    inner: BaseException = error
    while isinstance(inner, HTTPError) and (cause := inner.__cause__ or inner.__context__):
        inner = cause
    return inner


def _reason(error: HTTPError) -> str:
    """What went wrong, without secrets."""
    inner = _innermost(error)
    if isinstance(inner, TimeoutError):
        return f"no answer in time ({type(error).__name__})"
    return redact(f"{type(inner).__name__}: {inner}")[:300]


def _check_encoding(response: urllib3.BaseHTTPResponse) -> None:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() not in ("identity", ""):
        raise PermanentFault(f"the server sends it encoded ({encoding})", "Turn compression off for this folder.")


def _status_fault(response: urllib3.BaseHTTPResponse) -> Exception:
    status = response.status
    reason = f"HTTP status {status} {response.reason or ''}".strip()
    if status in _MAY_PASS or (status >= 500 and status not in _STAYS):
        return TemporaryFault(reason, _retry_after_s(response.headers.get("Retry-After")))
    return PermanentFault(reason, _REPAIRS.get(status, _CHECK_SERVER))


def _retry_after_s(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header: a number or a date."""
    if value is None:
        return None
    if _DIGITS.fullmatch(value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
