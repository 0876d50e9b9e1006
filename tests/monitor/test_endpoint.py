"""The endpoint alone: where it listens, what it answers, and that it lets go of its port."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from monitor_cases import Exported, free_port, scraped

from gcahng.errors import ConfigError
from gcahng.monitor.endpoint import Endpoint, open_endpoint
from gcahng.monitor.metrics import Metrics, require_client


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(of_run=True)


@pytest.fixture
def endpoint(metrics: Metrics) -> Iterator[Endpoint]:
    opened = open_endpoint(metrics, "127.0.0.1", free_port())
    assert opened is not None
    yield opened
    opened.close()


def test_it_shows_what_is_counted_at_that_moment(metrics: Metrics, endpoint: Endpoint) -> None:
    def value(name: str) -> float | None:
        found = Exported()
        found.add(scraped(endpoint.port))
        return found.values.get(name)

    assert value("gcahng_steps_total") == 0  # from the start: a rate needs the first value
    assert value("gcahng_loss{}") is None and value("gcahng_epoch") is None  # 0 would be a lie
    metrics.count("gcahng_steps_total")
    metrics.count("gcahng_steps_total", 2)
    metrics.set("gcahng_epoch", 4)
    metrics.set("gcahng_loss", 0.5, name="metric")
    metrics.observe("gcahng_step_seconds", 0.3)
    assert value("gcahng_steps_total") == 3 and value("gcahng_epoch") == 4
    assert value('gcahng_loss{name="metric"}') == 0.5
    assert value('gcahng_step_seconds_bucket{le="0.25"}') == 0
    assert value('gcahng_step_seconds_bucket{le="0.5"}') == value("gcahng_step_seconds_count") == 1


def test_some_metrics_by_name(endpoint: Endpoint) -> None:
    found = Exported()
    found.add(scraped(endpoint.port, "?name[]=gcahng_steps_total&name[]=gcahng_images_total"))
    assert set(found.values) == {"gcahng_steps_total", "gcahng_images_total"}


def test_no_series_for_when_a_counter_was_made(endpoint: Endpoint) -> None:
    openmetrics = urllib.request.Request(
        f"http://127.0.0.1:{endpoint.port}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    with urllib.request.urlopen(openmetrics, timeout=30) as answer:
        text = answer.read().decode()
    assert text.endswith("# EOF\n") and "gcahng_steps_total" in text
    for shown in (text, scraped(endpoint.port)):
        assert "_created" not in shown


def test_loopback_means_loopback(endpoint: Endpoint) -> None:
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.2:{endpoint.port}/metrics", timeout=30)


@pytest.mark.parametrize(
    ("address", "port", "reason"),
    [
        ("127.0.0.1", 65536, "port must be 0-65535"),  # monitor.port=65535 of local rank 1
        ("no-such-host.invalid", 9400, "no-such-host.invalid"),
        ("192.0.2.1", 9400, "Cannot assign requested address"),  # of no interface here
    ],
)
def test_an_impossible_address_is_a_warning(
    metrics: Metrics, caplog: pytest.LogCaptureFixture, address: str, port: int, reason: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert open_endpoint(metrics, address, port) is None
    (record,) = caplog.records
    assert "No metrics endpoint: `monitor.address`" in record.message and reason in record.message


def test_a_forked_worker_does_not_keep_the_port(metrics: Metrics) -> None:
    """Loader workers inherit the listening socket, and may live on."""
    port = free_port()
    first = open_endpoint(metrics, "127.0.0.1", port)
    assert first is not None
    worker = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[first._server.socket.fileno()]
    )
    try:
        scraped(port)
        first.close()
        with pytest.raises(urllib.error.URLError, match="refused"):
            scraped(port)
        second = open_endpoint(metrics, "127.0.0.1", port)
        assert second is not None
        assert "gcahng_steps_total" in scraped(port)
        second.close()
    finally:
        worker.kill()
        worker.wait()


def test_a_slow_reader_holds_up_neither_the_others_nor_the_end(metrics: Metrics) -> None:
    endpoint = open_endpoint(metrics, "127.0.0.1", free_port())
    assert endpoint is not None
    with socket.create_connection(("127.0.0.1", endpoint.port)) as idle:
        idle.sendall(b"GET /metrics HT")  # and no more
        time.sleep(0.2)
        assert "gcahng_steps_total" in scraped(endpoint.port)
        signal.alarm(60)
        endpoint.close()
        signal.alarm(0)


def test_without_the_package_one_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError) as refused:
        require_client("monitor.port")
    assert str(refused.value) == (
        "`monitor.port` needs the package prometheus_client, which is not installed: pip install 'gcahng[monitor]', or "
        "set monitor.port=null."
    )


def test_only_what_is_used_is_imported() -> None:
    code = (
        "import sys\n"
        "from gcahng.monitor import endpoint, heartbeat, metrics, run_folder, status_text, textfile\n"
        "print(sorted({'torch', 'prometheus_client', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]", done.stderr
