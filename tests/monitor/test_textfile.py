"""The text file: whole at any moment, and a disk that refuses is a warning."""

import logging
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from monitor_cases import Exported

from gcahng.monitor.heartbeat import Heartbeat
from gcahng.monitor.metrics import Labelled, Metrics
from gcahng.monitor.textfile import Textfile


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """No file of this process may become longer; Python ignores the signal, and writing raises OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(of_run=True)


def test_each_reader_sees_a_whole_file(metrics: Metrics, tmp_path: Path) -> None:
    file = Textfile(tmp_path / "run.prom", Labelled(metrics, {"run": "runs/a"}))
    file.write()
    done, counts = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            found = Exported()
            found.add(file.path.read_text())
            counts.append((len(found.values), found.values['gcahng_steps_total{run="runs/a"}']))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(60):
        metrics.count("gcahng_steps_total")
        file.write()
    done.set()
    reader.join()
    assert len({number for number, _ in counts}) == 1
    steps = [step for _, step in counts]
    assert steps == sorted(steps) and len(set(steps)) > 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.prom"]


def test_a_full_disk_is_said_once_and_tried_again(
    metrics: Metrics, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = Textfile(tmp_path / "run.prom", Labelled(metrics, {}))
    file.write()
    before = file.path.read_bytes()
    metrics.count("gcahng_steps_total")
    with caplog.at_level(logging.INFO):
        with full_disk(1000):
            file.write()
            file.write()
        (warning,) = caplog.messages
        assert f"`monitor.textfile` {file.path} cannot be written" in warning and "File too large" in warning
        assert file.path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["run.prom"]
        file.write()
    assert "gcahng_steps_total 1.0" in file.path.read_text()
    assert "written again" in caplog.messages[-1] and len(caplog.messages) == 2


def test_a_full_disk_stops_no_heartbeat(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heartbeat = Heartbeat(tmp_path, beat_seconds=3600.0, state="running")
    while not (tmp_path / "status.json").exists():
        pass
    with caplog.at_level(logging.WARNING), full_disk(10):
        heartbeat.now(step=1)
        while not caplog.messages:
            pass
    heartbeat.stop(state="finished")
    assert len(caplog.messages) == 1 and "status.json cannot be written" in caplog.messages[0]
    assert '"state": "finished"' in (tmp_path / "status.json").read_text()
