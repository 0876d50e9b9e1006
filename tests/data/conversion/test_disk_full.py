"""A full disk: one clear error, nothing half-written is published, and the work goes on once there is room."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conversion_cases import Pictures, contents, encoded, pictures

from gcahng.data.conversion.convert import convert
from gcahng.data.conversion.journal import Journal
from gcahng.errors import DataError

REPOSITORY = Path(__file__).parents[3]
DISK_BYTES = 400 << 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of DISK_BYTES, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs more rights than this process has")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def noise() -> Pictures:
    """Images of 620 kB in all."""
    source = pictures({"train": ["owl", "gull", "tern"], "test": ["crow", "kite"]}, images=20)
    source.contents = {item.source: encoded(i, size=(72, 72)) for i, item in enumerate(source.items)}
    return source


def test_full_disk(small_disk: Path, tmp_path: Path) -> None:
    convert(noise(), tmp_path / "whole", shard_bytes=60_000)
    out = small_disk / "out"
    with pytest.raises(DataError) as error:
        convert(noise(), out, shard_bytes=60_000)
    found = re.fullmatch(
        rf"Cannot write to {small_disk}/out\.partial(?:/shards)? \(No space left on device\): (\d+) bytes are written, "
        r"(\d+) bytes of its disk are free\. Free some space, or raise the quota or the limit of file sizes\. "
        rf"{small_disk}/out\.partial keeps what is finished \((\d+) tars, (\d+) images\): the same command continues "
        r"there\.",
        str(error.value),
    )
    assert found, error.value
    written, free, tars, images = map(int, found.groups())
    assert 0.8 * DISK_BYTES < written + free <= DISK_BYTES
    assert free < 100_000
    assert tars == len(Journal(small_disk / "out.partial").tars) > 2
    assert [path.name for path in small_disk.iterdir()] == ["out.partial"]
    with pytest.raises(DataError, match="No space left"):
        convert(noise(), out, shard_bytes=60_000)
    assert len(Journal(small_disk / "out.partial").tars) >= tars
    subprocess.run(["mount", "-o", f"remount,size={4 * DISK_BYTES}", str(small_disk)], check=True)
    rest = noise()
    convert(rest, out, shard_bytes=60_000)
    assert len(rest.loaded) <= len(rest.items) - images
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("free", [0, 4096, 20_000])
def test_disk_that_is_full_from_the_start(small_disk: Path, free: int) -> None:
    (small_disk / "other").write_bytes(b"x" * (DISK_BYTES - free))
    with pytest.raises(DataError, match=r"No space left on device.*limit of file sizes\.$"):
        convert(noise(), small_disk / "out", shard_bytes=60_000)
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_limit_of_file_sizes_on_the_command_line(tmp_path: Path) -> None:
    for name in ("owl", "gull"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "in" / name / f"{i}.jpg").write_bytes(encoded(i, size=(72, 72)))
    done = subprocess.run(
        [sys.executable, "-m", "shards.convert", "folder", "--source", tmp_path / "in", "--out", tmp_path / "out"]
        + ["--workers", "1", "--quiet"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 2
    assert re.match(
        rf"error: Cannot write to {tmp_path}/out\.partial(/shards)? \(File too large\): \d+ bytes are written, \d+ ",
        done.stderr,
    )
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_folder_that_does_not_take_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Cannot use .*out\.partial \(Not a directory\)\. Give another --out"):
        convert(noise(), tmp_path / "file" / "out")
