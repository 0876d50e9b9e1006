"""Servers that answer what no server should: malformed, endless, or a byte now and then."""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from faulty_server import FaultyServer, Handler, Request, times
from store_cases import QUICK, Folder, announced

from gcahng.data.stores.http import HttpStore
from gcahng.errors import DataError

HEAD = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/100000\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def raw(*blocks: bytes, again: float = 0.0, until: threading.Event | None = None) -> Callable[[Handler, Request], bool]:
    """Send bytes as they are; the last block anew every `again` seconds until the event, if there is one."""

    def fault(handler: Handler, request: Request) -> bool:
        for block in blocks:
            handler.wfile.write(block)
        while until is not None and not until.wait(again):
            handler.wfile.write(blocks[-1])
        handler.close_connection = True
        return True

    return fault


@pytest.mark.parametrize(
    "blocks",
    [
        (b"HTTP/1.1 206 Partial Content\r\nX: ", b"a"),
        (b"HTTP/1.1 100 Continue\r\n\r\n",),
        (CHUNKED + b"a;", b"a"),
        (CHUNKED + b"5\r\n01234\r\n0\r\n", b"X: y\r\n"),
    ],
    ids=["headers", "interim answers", "a chunk's size", "trailers"],
)
def test_trickles_beside_the_body(server: FaultyServer, folder: Folder, blocks: tuple[bytes, ...]) -> None:
    """Each of these keeps a connection busy, and brings nothing."""
    over = threading.Event()
    server.fault = raw(*blocks, again=0.02, until=over)
    store = announced(server.url, folder, replace(QUICK, tries=1, read_timeout_s=1.5))
    try:
        with pytest.raises(DataError, match=r"1 try, the last one: too slow: [05] bytes in"):
            store.read("s1.tar", 0, 10)
    finally:
        over.set()


def test_a_fault_after_the_last_byte(server: FaultyServer, folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    """What is left to ask for is nothing, which no range can say: a server would send the whole file."""
    server.fault = times(1, raw(CHUNKED + b"a\r\n0123456789\r\n"))
    store = announced(server.url, folder)
    assert store.read("s1.tar", 0, 10) == b"0123456789"
    assert server.ranges("s1.tar") == {(0, 9): 1}
    assert store.ranged is True
    assert not caplog.records


@pytest.mark.parametrize("number", [b"\xb2", b"9" * 5000, b"-5", b""], ids=["a power", "long", "negative", "none"])
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 Busy\r\nRetry-After: %s\r\n\r\n",
        b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/%s\r\n\r\n0123456789",
        b"HTTP/1.1 416 No\r\nContent-Range: bytes */%s\r\n\r\n",
    ],
    ids=["wait", "total", "unsatisfied"],
)
def test_numbers_that_are_none(server: FaultyServer, folder: Folder, answer: bytes, number: bytes) -> None:
    server.fault = raw(answer % number)
    with pytest.raises(DataError, match="HTTP status|answer's range"):
        announced(server.url, folder).read("s1.tar", 0, 10)
    with pytest.raises(DataError, match="HTTP status|does not tell the file's size"):
        HttpStore(server.url, QUICK).size("s1.tar")


@pytest.mark.parametrize("length", [b"\xb2", b"9" * 5000, b"-5"])
def test_a_length_that_is_none(server: FaultyServer, folder: Folder, length: bytes) -> None:
    server.fault = raw(b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n" % length + folder.content["s1.tar"])
    assert announced(server.url, folder).read("s1.tar", 5, 10) == folder.content["s1.tar"][5:15]
    with pytest.raises(DataError, match="does not tell the file's size"):
        HttpStore(server.url, QUICK).size("s1.tar")


def test_malformed_headers_show_no_token(
    server: FaultyServer, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    """urllib3 warns of them with the whole URL."""
    caplog.set_level(logging.DEBUG)
    server.fault = raw(HEAD + b"no colon\r\n\r\n" + folder.content["s1.tar"][:10])
    store = announced(f"{server.url}?token=secret", folder)
    assert store.read("s1.tar", 0, 10) == folder.content["s1.tar"][:10]
    assert "Failed to parse headers" in caplog.text
    assert "GET /set/s1.tar?***" in caplog.text
    assert "secret" not in caplog.text


def test_an_endless_file(server: FaultyServer, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcahng.data.stores.remote._LARGEST_UNKNOWN", 1 << 20)
    over = threading.Event()
    server.fault = raw(b"HTTP/1.1 200 OK\r\n\r\n", bytes(1 << 18), until=over)
    try:
        with pytest.raises(DataError, match="`manifest.json` .* has more than 1048576 bytes"):
            HttpStore(server.url, QUICK).whole("manifest.json")
    finally:
        over.set()
    assert len(server.requests) == 1
