"""A real web server of one folder on this machine, with ranges and with faults on request."""

import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Request:
    """One GET, as the server saw it; names of headers in lower case."""

    name: str
    range: tuple[int, int] | None
    headers: dict[str, str]
    path: str


@dataclass
class FaultyServer:
    """What the server serves and what it did. `fault` is called with each request and its handler.

    A fault may use the handler to answer (see the functions below) and return True, or return False for a plain
    answer.
    """

    folder: Path
    url: str = ""
    fault: Callable[["Handler", Request], bool] | None = None
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str) -> int:
        """Requests for a file."""
        return sum(request.name == name for request in self.requests)

    def ranges(self, name: str) -> Counter[tuple[int, int] | None]:
        """How often each range of a file was asked for."""
        return Counter(request.range for request in self.requests if request.name == name)


class Handler(BaseHTTPRequestHandler):
    """Serves files of `server.state.folder`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: FaultyServer

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer with a file or a range of it."""
        name = self.path.partition("?")[0].rsplit("/", 1)[-1]
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        asked = (int(match[1]), int(match[2])) if match else None
        request = Request(name, asked, {key.lower(): value for key, value in self.headers.items()}, self.path)
        with self.state.lock:
            self.state.requests.append(request)
        try:
            if self.state.fault is None or not self.state.fault(self, request):
                self.plain(request)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def content(self, request: Request) -> bytes | None:
        """The file's bytes."""
        path = self.state.folder / request.name
        return path.read_bytes() if path.is_file() else None

    def head(self, status: int, length: int, **headers: str) -> None:
        """Status line and headers."""
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def plain(self, request: Request) -> None:
        """What a faultless server answers."""
        content = self.content(request)
        if content is None:
            self.head(404, 0)
        elif request.range is None:
            self.head(200, len(content))
            self.wfile.write(content)
        elif request.range[0] >= len(content):
            self.head(416, 0, Content_Range=f"bytes */{len(content)}")
        else:
            first, last = request.range[0], min(request.range[1], len(content) - 1)
            self.head(206, last - first + 1, Content_Range=f"bytes {first}-{last}/{len(content)}")
            self.wfile.write(content[first : last + 1])

    def partial(self, request: Request) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of the plain answer, for faults that change it."""
        content = self.content(request)
        assert content is not None
        if request.range is None:
            return 200, content, {}
        first, last = request.range[0], min(request.range[1], len(content) - 1)
        return 206, content[first : last + 1], {"Content_Range": f"bytes {first}-{last}/{len(content)}"}


def status(code: int, **headers: str) -> Callable[[Handler, Request], bool]:
    """Answer with a status and no content."""

    def fault(handler: Handler, request: Request) -> bool:
        handler.head(code, 0, **headers)
        return True

    return fault


def cut(handler: Handler, request: Request) -> bool:
    """Announce the whole length, send a half, close."""
    code, body, headers = handler.partial(request)
    handler.head(code, len(body), **headers)
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True
    return True


def reset(handler: Handler, request: Request) -> bool:
    """Send a half and reset the connection."""
    cut(handler, request)
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    return True


def silent(handler: Handler, request: Request) -> bool:
    """Take the request and never answer."""
    time.sleep(1.5)
    handler.close_connection = True
    return True


def slow(handler: Handler, request: Request) -> bool:
    """One byte every 50 ms: never silent, never done."""
    code, body, headers = handler.partial(request)
    handler.head(code, len(body), **headers)
    for i in range(min(len(body), 60)):
        handler.wfile.write(body[i : i + 1])
        handler.wfile.flush()
        time.sleep(0.05)
    handler.close_connection = True
    return True


def wrong_range(handler: Handler, request: Request) -> bool:
    """Say in Content-Range that the bytes are others."""
    code, body, headers = handler.partial(request)
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers["Content_Range"])
    assert match
    first, last, total = (int(part) for part in match.groups())
    handler.head(code, len(body), Content_Range=f"bytes {first + 1}-{last + 1}/{total}")
    handler.wfile.write(body)
    return True


def wrong_length(handler: Handler, request: Request) -> bool:
    """Announce more bytes than Content-Range says, and send them."""
    code, body, headers = handler.partial(request)
    handler.head(code, len(body) + 9, **headers)
    handler.wfile.write(body + bytes(9))
    return True


def too_long(handler: Handler, request: Request) -> bool:
    """Send more than was asked for, in chunks, so that no length tells."""
    code, body, headers = handler.partial(request)
    handler.send_response(code)
    handler.send_header("Transfer-Encoding", "chunked")
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    for block in (body, b"and more"):
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
    handler.wfile.write(b"0\r\n\r\n")
    return True


def flipped(handler: Handler, request: Request) -> bool:
    """Send the right number of wrong bytes."""
    code, body, headers = handler.partial(request)
    handler.head(code, len(body), **headers)
    handler.wfile.write(bytes(byte ^ 1 for byte in body))
    return True


def no_ranges(handler: Handler, request: Request) -> bool:
    """Answer with the whole file, whatever was asked for."""
    request.range = None
    return False


def times(count: int, fault: Callable[[Handler, Request], bool]) -> Callable[[Handler, Request], bool]:
    """The fault for the first requests, plain answers after."""
    left = [count]
    lock = threading.Lock()

    def limited(handler: Handler, request: Request) -> bool:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                return False
        return fault(handler, request)

    return limited


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are part of the tests."""


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    """A running server of a folder, on a free port of this machine."""
    state = FaultyServer(folder)
    server = _Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"state": state}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/set"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
