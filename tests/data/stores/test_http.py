import base64
import logging
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import faulty_server as faults
import pytest
from faulty_server import FaultyServer, Handler, Request, serve, status, times
from store_cases import IMPATIENT, QUICK, Folder, announced, make_folder, wait_until

from gcahng.data.stores import FileFacts
from gcahng.data.stores.http import HttpStore
from gcahng.data.stores.retry import RetrySettings
from gcahng.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return make_folder(tmp_path / "set", count=2)


@pytest.fixture
def server(folder: Folder) -> Iterator[FaultyServer]:
    with serve(folder.path) as server:
        yield server


def test_reads_ranges_over_one_connection(server: FaultyServer, folder: Folder) -> None:
    store = announced(server.url, folder)
    connections: set[object] = set()
    server.fault = lambda handler, _: bool(connections.add(handler.client_address))
    for offset, length in ((0, 1), (512, 70_000), (99_999, 1)):
        assert store.read("s1.tar", offset, length) == folder.content["s1.tar"][offset : offset + length]
    assert [request.range for request in server.requests] == [(0, 0), (512, 70_511), (99_999, 99_999)]
    assert len(connections) == 1
    assert store.traffic.bytes_fetched == 70_002
    assert store.ranged is True


@pytest.mark.parametrize("is_announced", [True, False])
def test_the_end_of_a_file(server: FaultyServer, folder: Folder, is_announced: bool) -> None:
    store = announced(server.url, folder) if is_announced else HttpStore(server.url, QUICK)
    assert store.read("s1.tar", 99_990, 100) == folder.content["s1.tar"][-10:]
    assert store.read("s1.tar", 100_000, 100) == b""
    assert store.read("s1.tar", 0, 0) == b""
    assert store.size("s1.tar") == 100_000


def test_an_empty_file(server: FaultyServer, folder: Folder) -> None:
    (folder.path / "empty").touch()
    store = HttpStore(server.url, QUICK)
    assert store.size("empty") == 0
    assert store.whole("empty") == b""
    assert store.read("empty", 0, 5) == b""


PASSING = {
    "503": status(503),
    "429": status(429, Retry_After="0"),
    "408": status(408),
    "reset": faults.reset,
    "cut": faults.cut,
    "silent": faults.silent,
    "slow": faults.slow,
    "wrong range": faults.wrong_range,
    "wrong length": faults.wrong_length,
    "too long": faults.too_long,
}
REASONS = {
    "503": "HTTP status 503 Service Unavailable",
    "429": "HTTP status 429 Too Many Requests",
    "408": "HTTP status 408 Request Timeout",
    "reset": "Connection.*",
    "cut": "IncompleteRead.*",
    "silent": r"no answer in time \(ReadTimeoutError\)",
    "slow": r"too slow: \d+ bytes in [\d.]+ s",
    "wrong range": r"expected the bytes \d+-70511, the answer's range is 'bytes \d+-70512/100000'",
    "wrong length": "expected 70000 bytes, the answer announces 70009",
    "too long": "the answer has more than the 70000 bytes asked for",
}


def patience(name: str) -> RetrySettings:
    return IMPATIENT if name in ("silent", "slow") else QUICK


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass(server: FaultyServer, folder: Folder, name: str) -> None:
    store = announced(server.url, folder, patience(name))
    server.fault = times(2, PASSING[name])
    assert store.read("s1.tar", 512, 70_000) == folder.content["s1.tar"][512:70_512]
    assert store.traffic.retries == 2
    assert len(server.requests) == 3


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_stay(server: FaultyServer, folder: Folder, name: str) -> None:
    store = announced(server.url, folder, patience(name))
    server.fault = PASSING[name]
    start = time.monotonic()
    message = (
        rf"^File `s1\.tar` of {re.escape(server.url)}, bytes 512 to 70512, cannot be read: 3 tries, the last one: "
        rf"{REASONS[name]}\. Check the server and the network, then start again\.$"
    )
    with pytest.raises(DataError, match=message):
        store.read("s1.tar", 512, 70_000)
    assert len(server.requests) == 3
    assert time.monotonic() - start < 5


def test_a_try_continues_where_the_one_before_stopped(server: FaultyServer, folder: Folder) -> None:
    store = announced(server.url, folder)
    server.fault = times(1, faults.cut)
    assert store.read("s1.tar", 0, 80_000) == folder.content["s1.tar"][:80_000]
    assert [request.range for request in server.requests] == [(0, 79_999), (40_000, 79_999)]
    assert store.traffic.bytes_fetched == 80_000


@pytest.mark.parametrize(
    ("code", "repair"),
    [
        (401, r"HTTP status 401 Unauthorized\. Check the user, the password or the token"),
        (403, r"HTTP status 403 Forbidden\. Check the token of the URL \(signed URLs expire\)"),
        (404, r"HTTP status 404 Not Found\. Check the URL: it must name the folder that holds manifest\.json"),
        (410, r"HTTP status 410 Gone\. Check the URL"),
        (416, "HTTP status 416 Requested Range Not Satisfiable. Check"),
        (501, "HTTP status 501 Not Implemented. Check"),
    ],
)
def test_statuses_that_stay_are_asked_for_once(server: FaultyServer, folder: Folder, code: int, repair: str) -> None:
    server.fault = status(code)
    for ask in (lambda s: s.read("s1.tar", 0, 5), lambda s: s.whole("s1.tar"), lambda s: s.size("s1.tar")):
        server.requests.clear()
        with pytest.raises(DataError, match=repair):
            ask(announced(server.url, folder))
        assert len(server.requests) == 1


@pytest.mark.parametrize("size", [99_999, 100_001, 600])
def test_a_file_that_changed(server: FaultyServer, folder: Folder, size: int) -> None:
    store = announced(server.url, folder)
    (folder.path / "s1.tar").write_bytes(bytes(size))
    message = rf"expected a file of 100000 bytes, it has {size}\. The files there are not those of the manifest"
    with pytest.raises(DataError, match=message):
        store.read("s1.tar", 700, 50_000)
    assert len(server.requests) == 1


def test_a_server_without_ranges(server: FaultyServer, folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    store = announced(server.url, folder)
    server.fault = faults.no_ranges
    for offset, length in ((0, 10), (512, 70_000), (99_000, 1000)):
        assert store.read("s1.tar", offset, length) == folder.content["s1.tar"][offset : offset + length]
    assert store.size("s0.tar") == 100_000
    assert store.ranged is False
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "sends whole files where parts are asked for" in warnings[0]
    (folder.path / "s1.tar").write_bytes(bytes(6))
    with pytest.raises(DataError, match="expected a file of 100000 bytes, it has 6"):
        store.read("s1.tar", 512, 9)


def test_a_whole_file_and_its_checksum(server: FaultyServer, folder: Folder) -> None:
    store = HttpStore(server.url, QUICK)
    right = folder.facts["s0.tar"].sha256
    server.fault = times(2, faults.flipped)
    assert store.whole("s0.tar", right) == folder.content["s0.tar"]
    assert store.traffic.retries == 2
    server.fault = faults.flipped
    message = rf"3 tries, the last one: expected sha256 {right}, got [0-9a-f]{{64}} \(100000 bytes\)\. Check"
    with pytest.raises(DataError, match=message):
        store.whole("s0.tar", right)


def compressed(handler: Handler, request: Request) -> bool:
    handler.head(206, 5, Content_Encoding="gzip", Content_Range="bytes 0-4/100000")
    handler.wfile.write(b"12345")
    return True


def test_a_compressed_answer(server: FaultyServer, folder: Folder) -> None:
    server.fault = compressed
    with pytest.raises(DataError, match=r"the server sends it encoded \(gzip\)\. Turn compression off"):
        announced(server.url, folder).read("s1.tar", 0, 5)
    assert server.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after(server: FaultyServer, folder: Folder, as_date: bool) -> None:
    patient = RetrySettings(tries=2, first_wait_s=0.001, longest_wait_s=0.5)
    server.fault = times(1, status(503, Retry_After=formatdate(time.time() + 60) if as_date else "60"))
    start = time.monotonic()
    announced(server.url, folder, patient).read("s1.tar", 0, 5)
    assert 0.5 <= time.monotonic() - start < 3, "waits as asked, and no longer than the bound"


def test_no_server(folder: Folder) -> None:
    with serve(folder.path) as server:
        url = server.url
    with pytest.raises(DataError, match="3 tries, the last one: ConnectionRefusedError: .*Connection refused"):
        announced(url, folder).read("s1.tar", 0, 5)


def redirect(target: str) -> object:
    def fault(handler: Handler, request: Request) -> bool:
        if request.path.startswith("/elsewhere/"):
            return False
        handler.head(302, 0, Location=target)
        return True

    return fault


def test_redirects(server: FaultyServer, folder: Folder) -> None:
    server.fault = redirect("/elsewhere/s1.tar?signed=1")
    assert announced(server.url, folder).read("s1.tar", 5, 9) == folder.content["s1.tar"][5:14]
    assert [request.range for request in server.requests] == [(5, 13)] * 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/again/s1.tar", "more than 5 redirects"),
        ("ftp://host/a?secret", r"redirected to ftp://host/a\?\*\*\*, which is not https"),
        ("file:///etc/passwd", "redirected to file:///etc/passwd, which is not https"),
        ("http://[::1/", r"redirected to 'http://\[::1/', which is no URL"),
        ("http://host:99999/?secret", r"redirected to 'http://host:99999/\?\*\*\*', which is no URL"),
    ],
)
def test_redirects_that_lead_nowhere(server: FaultyServer, folder: Folder, target: str, message: str) -> None:
    server.fault = redirect(target)
    with pytest.raises(DataError, match=message):
        announced(server.url, folder).read("s1.tar", 5, 9)


def test_a_password_goes_to_its_own_host_only(server: FaultyServer, folder: Folder) -> None:
    url = server.url.replace("http://", "http://me:pass%20word@")
    with serve(folder.path) as other:
        server.fault = redirect(f"{other.url}/elsewhere/s1.tar")
        announced(url, folder).read("s1.tar", 5, 9)
        (here,), (there,) = server.requests, other.requests
    assert here.headers["authorization"] == "Basic " + base64.b64encode(b"me:pass word").decode()
    assert "authorization" not in there.headers


@pytest.mark.parametrize(("user", "sent"), [("me:pw", b"me:pw"), ("me:p%C5%82", b"me:p\xc5\x82")])
def test_a_password_of_any_letters_and_a_host_in_any(
    server: FaultyServer, folder: Folder, user: str, sent: bytes
) -> None:
    url = server.url.replace("http://127.0.0.1", f"http://{user}@LocalHost")
    announced(url, folder).read("s1.tar", 5, 9)
    assert server.requests[0].headers["authorization"] == "Basic " + base64.b64encode(sent).decode()


def test_tokens_go_to_every_file_and_into_no_message(server: FaultyServer, folder: Folder) -> None:
    url = server.url.replace("http://", "http://me:secret@") + "/?token=secret%2F1&b=2"
    store = announced(url, folder)
    store.read("s1.tar", 0, 5)
    assert server.requests[0].path == "/set/s1.tar?token=secret%2F1&b=2"
    for fault in (status(403), status(503), faults.cut, redirect("ftp://you:secret@host/?token=secret")):
        server.fault = fault
        with pytest.raises(DataError) as caught:
            store.read("s1.tar", 0, 5)
        assert "secret" not in str(caught.value)
        assert "***" in str(caught.value)
    assert "secret" not in store.location


def test_names_are_quoted(server: FaultyServer, folder: Folder) -> None:
    HttpStore(server.url + "/a b", QUICK)
    store = HttpStore(server.url, QUICK)
    with pytest.raises(DataError):
        store.read("a b?c#d.tar", 0, 5)
    assert server.requests[0].path == "/set/a%20b%3Fc%23d.tar"


def test_a_proxy_from_the_environment(server: FaultyServer, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/set"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert announced("http://shards.invalid/set", folder).read("s1.tar", 5, 9) == folder.content["s1.tar"][5:14]
    assert server.requests[0].path == "http://shards.invalid/set/s1.tar"
    announced(server.url, folder).read("s1.tar", 5, 9)
    assert server.requests[1].path == "/set/s1.tar", "no_proxy is obeyed"


def test_threads_share_a_store(server: FaultyServer, folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    store = announced(server.url, folder)
    server.fault = times(5, status(503))
    wrong: list[int] = []

    def read(start: int) -> None:
        for offset in range(start, 100_000, 20_000):
            if store.read("s1.tar", offset, 1000) != folder.content["s1.tar"][offset : offset + 1000]:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(i * 1000,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert store.traffic.bytes_fetched == 40_000
    assert store.traffic.retries == 5
    # One read may meet two of the faults, which is told; connections must not be short.
    assert {record.name for record in caplog.records} <= {"gcahng.data.stores.retry"}


def test_a_forked_process_has_its_own_connections(server: FaultyServer, folder: Folder) -> None:
    clients: list[object] = []
    server.fault = lambda handler, _: bool(clients.append(handler.client_address))
    store = announced(server.url, folder)
    store.read("s1.tar", 0, 5)
    store.traffic._lock.acquire()  # as if a thread held it at the moment of the fork
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        right = store.read("s1.tar", 5, 9) == folder.content["s1.tar"][5:14]
        os._exit(0 if right and store.traffic.bytes_fetched == 9 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.traffic._lock.release()
    assert store.read("s1.tar", 5, 9) == folder.content["s1.tar"][5:14]
    assert clients[0] == clients[2] != clients[1]


def test_pickle_and_close(server: FaultyServer, folder: Folder) -> None:
    store = announced(server.url, folder)
    store.read("s1.tar", 0, 5)
    again = pickle.loads(pickle.dumps(store))
    store.close()
    for other in (store, again):
        assert other.read("s1.tar", 0, 5) == folder.content["s1.tar"][:5]
    (folder.path / "s1.tar").write_bytes(b"")
    with pytest.raises(DataError, match="expected a file of 100000 bytes"):
        again.read("s1.tar", 0, 5)


def test_a_wait_may_end_the_tries(server: FaultyServer, folder: Folder) -> None:
    server.fault = status(503)
    store = announced(server.url, folder, RetrySettings(first_wait_s=30))
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        store.fetch("s1.tar", 0, 5, lambda *_: None, wait)
    assert 15 <= waits[0] <= 30
    wait_until(lambda: len(server.requests) == 1)


def test_sizes_of_files_nobody_announced_are_kept(server: FaultyServer, folder: Folder) -> None:
    store = HttpStore(server.url, QUICK)
    for _ in range(3):
        store.read("s1.tar", 0, 5)
    assert server.ranges("s1.tar") == {(0, 0): 1, (0, 4): 3}
    store.announce({"s1.tar": FileFacts(7, "0" * 64)})
    with pytest.raises(DataError, match="expected a file of 7 bytes, it has 100000"):
        store.read("s1.tar", 0, 5)
