"""A data server that dies in the middle of a run: the run ends in time and says who did not answer, or goes on from its
cache."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulty_server import FaultyServer, Handler, Request, serve
from run_cases import read_metrics, train
from store_cases import QUICK

from gcahng.data.stores import http
from gcahng.data.stores.retry import RetrySettings
from gcahng.errors import UnreachableError

LIMIT_S = 120


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """Asked three times, and half a second each: the patience of a real run is minutes."""
    monkeypatch.setattr(http, "RetrySettings", lambda: replace(QUICK, read_timeout_s=0.5, slowest_bytes_per_s=1.0))
    with serve(shards) as running:
        yield running


class Hang:
    """Never answer, for all that the client waits for."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def __call__(self, handler: Handler, request: Request) -> bool:
        self.over.wait(LIMIT_S)
        handler.close_connection = True
        return True


def refuse(handler: Handler, request: Request) -> bool:
    """Close the listening socket: whoever connects is refused."""
    handler.server.socket.close()
    handler.close_connection = True
    return True


def after(count: int, state: FaultyServer, fault: Any) -> Any:
    """Plain answers to so many requests, then the fault for ever."""
    return lambda handler, request: len(state.requests) > count and fault(handler, request)


# Not refused with workers: forked from here, they hold the listening socket open.
@pytest.mark.parametrize(("kind", "num_workers"), [("hangs", 0), ("hangs", 1), ("refuses", 0)])
def test_dead_server_ends_a_run(server: FaultyServer, tmp_path: Path, kind: str, num_workers: int) -> None:
    hang = Hang()
    server.fault = after(40, server, hang if kind == "hangs" else refuse)
    settings = {
        "data.dir": server.url,
        "data.remote": "direct",
        "data.num_workers": num_workers,
        "train.epochs": 50,
        "eval.every_epochs": 50,
        "data.on_error": "skip",  # a place that cannot be reached says nothing of its images
    }
    settings["data.cache_dir"] = str(tmp_path / "cache")
    started = time.monotonic()
    try:
        with pytest.raises(Exception, match="cannot be read: 3 tries, the last one: ") as caught:
            train(Path("unused"), tmp_path / "run", settings)
    finally:
        hang.over.set()
    assert time.monotonic() - started < LIMIT_S
    message = str(caught.value)
    assert server.url.rpartition("/")[0] in message and "Check the server and the network, then start again." in message
    assert ("no answer in time" if kind == "hangs" else "Connection") in message
    assert len(read_metrics(tmp_path / "run")) >= 1


def test_a_cached_data_set_outlives_its_server(server: FaultyServer, tmp_path: Path) -> None:
    """Whole shards were fetched; nobody asks the server for what is there."""
    settings = {"data.dir": server.url, "data.cache_dir": str(tmp_path / "cache"), "train.epochs": 1}
    train(Path("unused"), tmp_path / "first", settings)
    deadline = time.monotonic() + LIMIT_S
    while not any((tmp_path / "cache" / "shards").glob("?" * 64)) and time.monotonic() < deadline:
        time.sleep(0.05)
    rows = read_metrics(tmp_path / "first")
    asked = len(server.requests)
    server.fault = lambda handler, request: request.name.endswith(".tar") and refuse(handler, request)
    train(Path("unused"), tmp_path / "second", settings)
    assert read_metrics(tmp_path / "second") == rows
    assert not [request for request in server.requests[asked:] if request.name.endswith(".tar")]


def test_the_patience_of_a_real_run_is_bounded() -> None:
    """Seconds until a server that never answers ends a run: all tries, and all waits between them."""
    patience = RetrySettings()
    waits = sum(min(patience.first_wait_s * 2**n, patience.longest_wait_s) for n in range(patience.tries - 1))
    assert patience.tries * (patience.connect_timeout_s + patience.read_timeout_s) + waits <= 330
    assert issubclass(UnreachableError, ValueError)
