import gc
import hashlib
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_server import FaultyServer
from store_cases import QUICK, Folder, cached, check_reads, names, open_cached, parts, size_of, wait_until

from gcahng.data.stores import CacheSettings, FileFacts
from gcahng.data.stores.cached import CachedStore
from gcahng.data.stores.file_lock import locked
from gcahng.data.stores.http import HttpStore
from gcahng.errors import DataError


def test_shards_come_in_ranges_and_are_read_from_the_cache(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings
) -> None:
    assert store.read("s0.tar", 10, 20) == folder.content["s0.tar"][10:30]
    store.expect(names(0, 1), names(2))
    wait_until(lambda: store.stats().shards_fetched == 3)
    assert cached(settings, folder) == names(0, 1, 2)
    wanted = {(first, min(first + 30_000, 100_000) - 1): 1 for first in range(0, 100_000, 30_000)}
    for name in names(1, 2):
        assert server.ranges(name) == wanted
    asked = len(server.requests)
    for name in names(0, 1, 2):
        assert store.read(name, 512, 9) == folder.content[name][512:521]
        assert store.read(name, 99_995, 50) == folder.content[name][-5:]
        assert store.read(name, 100_001, 50) == b""
    assert len(server.requests) == asked
    assert store.read("s3.tar", 512, 9) == folder.content["s3.tar"][512:521]
    stats = store.stats()
    assert (stats.cached_reads, stats.direct_reads, stats.retries) == (9, 2, 0)
    assert stats.bytes_fetched == 300_000 + 20 + 9


def test_several_ranges_at_once(store: CachedStore, server: FaultyServer) -> None:
    store.read("s0.tar", 0, 1)  # the server is known to have ranges
    together = threading.Barrier(3)
    server.fault = lambda handler, request: bool(together.wait(10)) and False
    store.expect(names(1), [])
    # 4 ranges: three meet, the last one is let through
    wait_until(lambda: server.count("s1.tar") == 4)
    server.fault = None
    together.abort()
    wait_until(lambda: store.stats().shards_fetched == 1)


def test_the_bound_holds_at_every_moment(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings
) -> None:
    assert settings.dir is not None
    settings.dir.mkdir()
    sizes: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            with locked(settings.dir / "lock"):  # room is given and taken with it: files are looked at one by one
                sizes.append(size_of(settings.dir))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for first in (0, 2, 4, 1, 3, 0, 5):
            present, following = names(first), names((first + 1) % 6, (first + 2) % 6)
            store.expect(present, following)
            wait_until(lambda wanted=present + following: set(wanted) <= set(cached(settings, folder)))
            check_reads(store, folder)
    finally:
        done.set()
        thread.join()
    assert len(sizes) > 20
    assert max(sizes) <= settings.max_bytes
    assert parts(settings) == []


def test_a_window_larger_than_the_cache(
    store: CachedStore, folder: Folder, settings: CacheSettings, caplog: pytest.LogCaptureFixture
) -> None:
    store.expect(names(4, 1, 5, 0, 2), names(3))
    wait_until(lambda: store.stats().shards_fetched == 3)
    check_reads(store, folder)
    store.expect(names(4, 1, 5, 0, 2), [])
    wait_until(lambda: len(caplog.records) == 1)
    assert cached(settings, folder) == names(1, 4, 5), "what fits, in the order given"
    assert store.stats().shards_fetched == 3, "nothing that is read now went for something else that is"
    assert "has no room for all shards that are read now, 500000 bytes: the rest is read directly. Raise" in caplog.text


def test_what_goes_first(store: CachedStore, folder: Folder, settings: CacheSettings) -> None:
    store.expect(names(0), names(1, 2))
    wait_until(lambda: cached(settings, folder) == names(0, 1, 2))
    store.expect(names(3), names(0, 2))  # 1 is expected no more
    wait_until(lambda: cached(settings, folder) == names(0, 2, 3))
    store.expect(names(4), names(3, 0, 2))  # the last of those that follow goes for what is read now
    wait_until(lambda: cached(settings, folder) == names(0, 3, 4))
    fetched = store.stats().shards_fetched
    store.expect(names(4), names(3, 0, 5))  # and for what follows nothing that is expected goes
    store.expect(names(4), names(3, 0, 5, 1))
    store.expect(names(4, 5), [])
    wait_until(lambda: "s5.tar" in cached(settings, folder))
    assert store.stats().shards_fetched == fetched + 1


def test_a_changed_expectation_ends_a_download(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings
) -> None:
    go = threading.Event()
    server.fault = lambda handler, request: request.name == "s0.tar" and not go.wait(10)
    store.expect(names(0), [])
    wait_until(lambda: server.count("s0.tar") > 0)
    store.expect(names(1), [])
    go.set()
    wait_until(lambda: cached(settings, folder) == names(1))
    assert server.count("s0.tar") < 4
    assert parts(settings) == []


def test_a_later_run_uses_what_is_there(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings
) -> None:
    store.expect(names(0, 1), [])
    wait_until(lambda: store.stats().shards_fetched == 2)
    store.close()
    asked = len(server.requests)
    later = open_cached(server, folder, settings)
    later.expect(names(0, 1), [])
    for name in names(0, 1):
        assert later.read(name, 512, 9) == folder.content[name][512:521]
    assert len(server.requests) == asked
    assert later.stats().cached_reads == 2
    later.close()


def test_data_sets_do_not_mix(store: CachedStore, server: FaultyServer, folder: Folder, tmp_path: Path) -> None:
    store.expect(names(0), [])
    wait_until(lambda: store.stats().shards_fetched == 1)
    (folder.path / "s0.tar").write_bytes(folder.content["s1.tar"])
    other = CachedStore(HttpStore(server.url, QUICK), store._settings)
    other.announce({"s0.tar": folder.facts["s1.tar"]})
    assert other.read("s0.tar", 0, 50) == folder.content["s1.tar"][:50]
    assert other.stats().direct_reads == 1


def test_direct_mode(server: FaultyServer, folder: Folder, settings: CacheSettings) -> None:
    store = open_cached(server, folder, replace(settings, mode="direct"))
    store.expect(names(0), names(1))
    check_reads(store, folder)
    assert server.ranges("s0.tar") == {(0, 999): 1, (512, 1511): 1, (99_000, 99_999): 1}
    assert cached(settings, folder) == []
    assert not any(thread.name == "gcahng-prefetch" for thread in threading.enumerate())


def test_small_files(store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings) -> None:
    right = folder.facts["s0.tar"].sha256
    first = store.local_copy("s0.tar", right)
    assert first.read_bytes() == folder.content["s0.tar"]
    assert open_cached(server, folder, settings).local_copy("s0.tar", right) == first
    assert server.count("s0.tar") == 1
    first.write_bytes(bytes(100_000))
    assert store.local_copy("s0.tar", right).read_bytes() == folder.content["s0.tar"]
    assert server.count("s0.tar") == 2
    with pytest.raises(DataError, match=f"expected sha256 {'0' * 64}"):
        store.local_copy("s0.tar", "0" * 64)


def test_a_small_file_without_checksum_is_fetched_anew(store: CachedStore, folder: Folder) -> None:
    for content in (b"one", b"two"):
        (folder.path / "manifest.json").write_bytes(content)
        path = store.local_copy("manifest.json")
        assert path.name == "manifest.json"
        assert path.read_bytes() == content


def test_shards_make_room_for_small_files(
    store: CachedStore, server: FaultyServer, folder: Folder, settings: CacheSettings, caplog: pytest.LogCaptureFixture
) -> None:
    store.expect(names(0, 1, 2), [])
    wait_until(lambda: store.stats().shards_fetched == 3)
    store.local_copy("s3.tar", folder.facts["s3.tar"].sha256)
    assert len(cached(settings, folder)) == 2
    assert settings.dir is not None
    assert size_of(settings.dir) == 300_000
    (folder.path / "huge").write_bytes(bytes(400_000))
    assert store.local_copy("huge").stat().st_size == 400_000, "without it nothing could be read"
    assert "cannot hold manifest, classes and indexes" in caplog.text


def test_small_files_of_sets_in_use_stay(server: FaultyServer, folder: Folder, settings: CacheSettings) -> None:
    def other_set(number: int) -> CachedStore:
        return CachedStore(HttpStore(f"{server.url}/{number}", QUICK), settings)

    one, two = other_set(1), other_set(2)
    kept = one.local_copy("s0.tar", folder.facts["s0.tar"].sha256)
    gone = two.local_copy("s1.tar", folder.facts["s1.tar"].sha256)
    held = two._cache._in_use.made()
    assert held is not None
    held.close()  # as if its process had ended
    store = open_cached(server, folder, settings)
    store.expect(names(2, 3), [])
    wait_until(lambda: store.stats().shards_fetched == 2)
    assert kept.exists()
    assert not gone.exists()
    store.close()


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gcahng-prefetch"]


def test_close_ends_the_thread_and_may_be_followed_by_more(
    store: CachedStore, folder: Folder, settings: CacheSettings
) -> None:
    store.expect(names(0), [])
    wait_until(lambda: store.stats().shards_fetched == 1)
    store.close()
    assert prefetch_threads() == []
    check_reads(store, folder)
    store.expect(names(1), [])
    wait_until(lambda: cached(settings, folder) == names(0, 1))
    assert store.stats().shards_fetched == 2
    store.close()
    store.close()


def test_a_store_that_nobody_uses_ends_its_thread(
    server: FaultyServer, folder: Folder, settings: CacheSettings
) -> None:
    def use() -> None:
        store = open_cached(server, folder, settings)
        store.expect(names(0), [])
        wait_until(lambda: store.stats().shards_fetched == 1)

    use()
    gc.collect()
    wait_until(lambda: prefetch_threads() == [])


def test_unknown_names_are_not_fetched(store: CachedStore, folder: Folder, settings: CacheSettings) -> None:
    store.expect(["other.tar", "s0.tar", "s0.tar"], ["s0.tar"])
    wait_until(lambda: cached(settings, folder) == names(0))
    assert store.stats().shards_fetched == 1


@pytest.mark.parametrize("sha256", ["../../thesis.txt", "", "0" * 63, "0" * 64 + "\n", "A" * 64])
def test_a_checksum_that_is_a_path(sha256: str) -> None:
    """The cache names files by checksums, reads them, and removes them where their size is wrong."""
    with pytest.raises(DataError, match="must have 64 hexadecimal digits"):
        FileFacts(7, sha256)


def test_an_empty_shard(store: CachedStore, folder: Folder) -> None:
    (folder.path / "empty.tar").touch()
    store.announce({"empty.tar": FileFacts(0, hashlib.sha256(b"").hexdigest())})
    store.expect(["empty.tar"], [])
    wait_until(lambda: store.stats().shards_fetched == 1)
    assert store.read("empty.tar", 0, 5) == b""
