"""Conversions that are killed at any moment: what remains is whole or absent, and the same command finishes it."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conversion_cases import contents, encoded

from gcahng.data.conversion.journal import Journal
from gcahng.data.shards.reader import ShardSet
from gcahng.errors import DataError

REPOSITORY = Path(__file__).parents[3]
SWEEP = Path(__file__).with_name("killed_conversions.py")


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: these tests force thousands of small files to disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.mark.parametrize("kind", ["new", "overwrite"])
def test_killed_before_each_file_operation(fast_folder: Path, kind: str) -> None:
    for i in range(4):
        (fast_folder / "in" / f"bird {i}").mkdir(parents=True)
        for j in range(4):
            (fast_folder / "in" / f"bird {i}" / f"{j}.jpg").write_bytes(encoded(100 * i + j))
    (fast_folder / "in" / "bird 2" / "3.jpg").write_bytes(b"unreadable")
    (fast_folder / "in" / "bird 3" / "1.jpg").write_bytes(encoded(200))
    done = subprocess.run(
        [sys.executable, SWEEP, fast_folder, kind],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["problems"] == []
    assert result["moments"] > 60, "the conversion has fewer file operations than it must have"
    assert result["continued"] > (20 if kind == "new" else 5)


SLOW_SOURCE = '''
"""Noise images, slowly."""
import io, os, time
import numpy as np
from PIL import Image
from gcahng.data.sources.source import Listing, SourceItem

class Noise:
    name = "noise"

    def __init__(self, directory, *, seed, images="20"):
        self.images = int(images)

    def listing(self):
        items = [SourceItem(f"{s} {c}", s, f"{s}-{c}-{i}")
                 for s in ("train", "test") for c in range(4) for i in range(self.images)]
        return Listing(items, extra={"noises": 8})

    def load(self, item):
        time.sleep(float(os.environ["NOISE_WAIT"]))
        while item.split == "test" and os.path.exists(os.environ["NOISE_HOLD"]):
            time.sleep(0.01)
        pixels = np.random.default_rng(list(item.source.encode())).integers(0, 255, (24, 24, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()
'''


class Commands:
    """Runs of the command line, all for the same conversion."""

    def __init__(self, directory: Path) -> None:
        self.hold = directory / "hold"  # while this file exists, no test image is made
        (directory / "modules").mkdir()
        (directory / "modules" / "slow_noise.py").write_text(SLOW_SOURCE)
        self.modules = directory / "modules"

    def start(self, out: Path, workers: int, wait: float) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "shards.convert", "custom", "--source-class", "slow_noise:Noise", "--source", "."]
            + ["--out", str(out), "--workers", str(workers), "--shard-bytes", "12000"],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PYTHONPATH": f"{self.modules}{os.pathsep}{REPOSITORY}",
                "NOISE_WAIT": str(wait),
                "NOISE_HOLD": str(self.hold),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, out: Path, workers: int = 1) -> tuple[str, str]:
        """Run to the end; returns what was printed and the progress bar."""
        process = self.start(out, workers, 0)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        return printed, errors


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def whole(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    commands.finish(out)
    return contents(out)


@pytest.fixture
def held(commands: Commands, whole: dict[str, bytes]) -> Iterator[None]:
    """Conversions get no further than the training images, until the file is removed."""
    commands.hold.touch()
    yield
    commands.hold.unlink(missing_ok=True)


def wait_for_tars(process: "subprocess.Popen[str]", out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(Journal(out.with_name("out.partial")).tars) < count:
        assert process.poll() is None, "ended before it was to be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds child processes in /proc")
def test_killed_again_and_again_with_several_workers(
    commands: Commands, held: None, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    chance = random.Random(1)
    for count, workers in ((1, 2), (4, 1), (6, 3)):
        process = commands.start(out, workers, 0.02)
        wait_for_tars(process, out, count)
        time.sleep(chance.random() / 10)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert (workers == 1) == (not children)
        process.kill()
        process.communicate(timeout=30)
        assert not out.exists()
        for directory in (out, tmp_path / "out.partial"):
            with pytest.raises(DataError, match=r"manifest\.json is missing"):
                ShardSet.open(directory)
        wait_until_dead(children)
    assert len(Journal(tmp_path / "out.partial").tars) >= 6
    commands.hold.unlink()
    printed, _ = commands.finish(out, workers=2)
    assert contents(out) == whole
    assert "train: 4 classes, 80 images" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stopped_conversion_keeps_its_work(
    commands: Commands, whole: dict[str, bytes], tmp_path: Path, stop: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = commands.start(out, 2, 0.05)
    wait_for_tars(process, out, 2)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + stop
    assert "Traceback" not in errors
    partial = tmp_path / "out.partial"
    journal = Journal(partial)
    count = len(journal.tars)
    assert f"stopped: {partial} keeps {count} finished tars" in errors
    assert errors.rstrip().endswith("the same command continues there")
    _, bar = commands.finish(out, 1)
    first = re.search(r"noise: .*?(\d+)/160", bar)
    assert first
    assert int(first[1]) == journal.num_samples, "the bar begins elsewhere"
    assert contents(out) == whole


def test_stopped_before_anything_is_finished(commands: Commands, tmp_path: Path) -> None:
    process = commands.start(tmp_path / "out", 1, 5)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.partial" / "shards").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped: nothing was written" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds child processes in /proc")
def test_killed_worker_and_a_second_process(
    commands: Commands, held: None, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = commands.start(out, 2, 0)
    wait_for_tars(process, out, 1)
    second = commands.start(out, 1, 0)
    _, errors = second.communicate(timeout=30)
    assert second.returncode == 2
    assert f"error: Another conversion is writing to {tmp_path / 'out.partial'} (process {process.pid})" in errors
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    commands.hold.unlink()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "error: A conversion worker was killed, most likely for want of memory. Pass a smaller --workers. " in errors
    assert errors.rstrip().endswith("the same command continues there.")
    commands.finish(out, 2)
    assert contents(out) == whole


def wait_until_dead(children: list[str]) -> None:
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline, "workers outlive the conversion"
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
