"""The cache when the remote place, the disk or a cached file fails."""

import errno
import logging
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import faulty_server as faults
import pytest
from faulty_server import FaultyServer, status
from store_cases import (
    Folder,
    cached,
    check_reads,
    names,
    open_cached,
    parts,
    wait_until,
)

from gcahng.data.stores import CacheSettings
from gcahng.data.stores.cache_folder import ShardDraft
from gcahng.data.stores.cached import CachedStore
from gcahng.errors import DataError


@pytest.mark.parametrize("size", [0, 512, 100_001])
def test_a_cached_shard_of_a_wrong_size_is_fetched_again(
    store: CachedStore, folder: Folder, settings: CacheSettings, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    store.expect(names(0), [])
    wait_until(lambda: store.stats().shards_fetched == 1)
    assert settings.dir is not None
    path = settings.dir / "shards" / folder.facts["s0.tar"].sha256
    os.truncate(path, size)
    assert store.read("s0.tar", 512, 9) == folder.content["s0.tar"][512:521]
    assert not path.exists()
    assert f"has {size} bytes, not 100000; it is fetched again" in caplog.text
    store.expect(names(0), names(1))
    wait_until(lambda: store.stats().shards_fetched == 3)
    assert path.read_bytes() == folder.content["s0.tar"]


def test_a_distrusted_shard_is_fetched_again_once(store: CachedStore, folder: Folder, settings: CacheSettings) -> None:
    store.expect(names(0), [])
    wait_until(lambda: store.stats().shards_fetched == 1)
    assert settings.dir is not None
    path = settings.dir / "shards" / folder.facts["s0.tar"].sha256
    path.write_bytes(bytes(100_000))
    assert store.read("s0.tar", 512, 9) == bytes(9)
    assert store.distrust("s0.tar")
    assert store.read("s0.tar", 512, 9) == folder.content["s0.tar"][512:521]
    wait_until(lambda: store.stats().shards_fetched == 2)
    assert path.read_bytes() == folder.content["s0.tar"]
    assert not store.distrust("s0.tar"), "the remote one is damaged, if this one is"
    assert path.exists()


def test_a_wrong_checksum_is_fetched_again(store: CachedStore, server: FaultyServer, settings: CacheSettings) -> None:
    server.fault = faults.times(1, faults.flipped)
    store.expect(names(0), [])
    wait_until(lambda: store.stats().shards_fetched == 1)
    assert server.count("s0.tar") == 8, "the whole shard, twice"


def test_a_wrong_checksum_that_stays_is_reported(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault = lambda handler, request: request.name == "s0.tar" and faults.flipped(handler, request)
    store.expect(names(0, 1), [])
    wait_until(lambda: cached(settings, folder) == names(1))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"`s0.tar` of {server.url} is damaged: expected sha256 {folder.facts['s0.tar'].sha256}, got" in caplog.text
    assert "in the last of 3 downloads. Upload it again" in caplog.text
    assert parts(settings) == []


def test_a_shard_that_cannot_be_fetched_is_reported_once(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault = lambda handler, request: request.name == "s0.tar" and status(404)(handler, request)
    store.expect(names(0, 1), [])
    wait_until(lambda: cached(settings, folder) == names(1))
    store.expect(names(0, 2), [])
    wait_until(lambda: cached(settings, folder) == names(1, 2))
    assert len(caplog.records) == 1
    assert "A shard could not be fetched ahead; its samples are read directly. File `s0.tar`" in caplog.text
    with pytest.raises(DataError, match=r"`s0\.tar` .*HTTP status 404"):
        store.read("s0.tar", 0, 5)


def test_a_server_without_ranges_sends_each_shard_once(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings
) -> None:
    server.fault = faults.no_ranges
    store.expect(names(0, 1), [])
    wait_until(lambda: cached(settings, folder) == names(0, 1))
    assert server.count("s1.tar") == 1
    check_reads(store, folder)


@pytest.mark.parametrize("obstacle", ["a file", "no permission"])
def test_a_cache_that_cannot_be_used(
    server: FaultyServer, folder: Folder, settings: CacheSettings, obstacle: str, caplog: pytest.LogCaptureFixture
) -> None:
    if obstacle == "no permission" and os.geteuid() == 0:
        settings = replace(settings, dir=Path("/proc/gcahng"))  # where even root may not write
    elif obstacle == "no permission":
        folder.path.parent.chmod(0o500)
    else:
        assert settings.dir is not None
        settings.dir.write_text("in the way")
    store = open_cached(server, folder, settings)
    copies = [store.local_copy("s0.tar", folder.facts["s0.tar"].sha256), store.local_copy("s1.tar")]
    assert [copy.read_bytes() for copy in copies] == [folder.content[name] for name in names(0, 1)]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "cannot be used" in caplog.text
    store.expect(names(0), [])
    check_reads(store, folder)
    wait_until(lambda: len(caplog.records) == 2)
    assert "samples are read from" in caplog.text
    store.close()
    folder.path.parent.chmod(0o700)


def test_a_cache_that_is_cleared_meanwhile(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """A download loses its file; what comes after is kept again."""
    assert settings.dir is not None
    go = threading.Event()
    first = store.local_copy("s5.tar", folder.facts["s5.tar"].sha256)
    server.fault = lambda handler, request: request.name == "s0.tar" and not go.wait(20)
    store.expect(names(0), [])
    wait_until(lambda: parts(settings) != [])
    shutil.rmtree(settings.dir)
    go.set()
    wait_until(lambda: len(caplog.records) == 1)
    assert "cannot be used" in caplog.text
    check_reads(store, folder)
    store.expect(names(1), [])
    wait_until(lambda: cached(settings, folder) == names(1))
    assert store.local_copy("s5.tar", folder.facts["s5.tar"].sha256) == first
    assert len(caplog.records) == 1


def test_a_disk_that_fills_up(
    store: CachedStore,
    folder: Folder,
    settings: CacheSettings,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardDraft, "write", full)
    store.expect(names(0, 1), names(2))
    wait_until(lambda: bool(caplog.records))
    store.expect(names(3), [])
    check_reads(store, folder)
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert "Make room or name another folder (data.cache_dir)" in caplog.text
    wait_until(lambda: parts(settings) == [])
    assert cached(settings, folder) == []
