"""A converted data set, read through `ShardSet` from a web server with faults and from an fsspec file system."""

import multiprocessing
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import faulty_server as faults
import numpy as np
import pytest
from faulty_server import FaultyServer, Handler, Request, serve, times
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from store_cases import QUICK, size_of, wait_until

from gcahng.data.conversion.convert import convert
from gcahng.data.shards.manifest import Manifest
from gcahng.data.shards.reader import ShardSet
from gcahng.data.sources.folder import Folder
from gcahng.data.stores import CacheSettings, open_store
from gcahng.data.stores.cached import CachedStore
from gcahng.errors import DataError


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 classes of 4 images in several shards."""
    root = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(3)
    for label in range(8):
        folder = root / "images" / f"class {label}"
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.jpg", quality=90)
    convert(Folder(root / "images"), root / "set", shard_bytes=12_000)
    return root / "set"


@pytest.fixture
def local(converted: Path) -> ShardSet:
    return ShardSet.open(converted)


@pytest.fixture
def server(converted: Path) -> Iterator[FaultyServer]:
    with serve(converted) as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> CacheSettings:
    return CacheSettings(dir=tmp_path / "cache", max_bytes=10_000_000, part_bytes=5000)


def remote_store(url: str, settings: CacheSettings, tries: int = QUICK.tries) -> CachedStore:
    store = open_store(url, settings, replace(QUICK, tries=tries))
    assert isinstance(store, CachedStore)
    return store


def all_samples(shards: ShardSet) -> list[tuple[bytes, str, int]]:
    ids = shards.class_ids()
    return [(shards.read(row), shards.source(row), int(ids[row])) for row in range(len(shards))]


def expect_all(shards: ShardSet, store: CachedStore) -> None:
    count = len(shards.manifest.shards)
    shards.expect(np.arange(count), np.arange(0))
    wait_until(lambda: store.stats().shards_fetched == count)


def test_the_set_has_several_shards(local: ShardSet) -> None:
    assert len(local) == 32
    assert len(local.manifest.shards) >= 4


def test_every_sample_directly_and_from_the_cache(
    server: FaultyServer, settings: CacheSettings, local: ShardSet
) -> None:
    store = remote_store(server.url, settings)
    shards = ShardSet.open(server.url, store=store)
    assert shards.manifest == local.manifest
    assert all_samples(shards) == all_samples(local)
    assert store.stats().cached_reads == 0
    expect_all(shards, store)
    asked = len(server.requests)
    assert all_samples(shards) == all_samples(local)
    assert len(server.requests) == asked
    store.close()


def every_third(fault: object) -> object:
    """Every third request meets the fault, manifest and indexes among them."""
    count = [0]

    def some(handler: Handler, request: Request) -> bool:
        count[0] += 1
        return count[0] % 3 == 0 and fault(handler, request)  # type: ignore[operator]

    return some


@pytest.mark.parametrize("fault", [faults.reset, faults.cut, faults.status(503)], ids=["reset", "cut", "503"])
def test_every_sample_through_faults(
    server: FaultyServer, settings: CacheSettings, local: ShardSet, fault: object
) -> None:
    server.fault = every_third(fault)  # type: ignore[assignment]
    store = remote_store(server.url, settings, tries=12)  # threads may meet every third several times in a row
    shards = ShardSet.open(server.url, store=store)
    assert all_samples(shards) == all_samples(local)
    expect_all(shards, store)
    assert all_samples(shards) == all_samples(local)
    assert store.stats().retries > 10
    store.close()


def work(shards: ShardSet, rows: list[int], answers: "multiprocessing.Queue[list[bytes]]") -> None:
    answers.put([shards.read(row) for row in rows])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_while_shards_come_in(
    server: FaultyServer, settings: CacheSettings, local: ShardSet, method: str
) -> None:
    store = remote_store(server.url, settings)
    shards = ShardSet.open(server.url, store=store)
    shards.read(0)
    shards.expect(np.arange(len(shards.manifest.shards)), np.arange(0))
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    rows = [list(range(start, 32, 2)) for start in range(2)]
    workers = [context.Process(target=work, args=(shards, mine, answers)) for mine in rows]
    for worker in workers:
        worker.start()
    read = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    expected = [[local.read(row) for row in mine] for mine in rows]
    assert sorted(read) == sorted(expected)
    wait_until(lambda: store.stats().shards_fetched == len(shards.manifest.shards))
    store.close()


def test_a_small_cache_is_enough(server: FaultyServer, settings: CacheSettings, local: ShardSet) -> None:
    manifest = Manifest.load(server.folder)
    small = sum(path.stat().st_size for path in server.folder.iterdir() if path.suffix != ".tar")
    largest = max(info.bytes for info in manifest.shards)
    tight = CacheSettings(dir=settings.dir, max_bytes=small + 2 * largest, part_bytes=5000)
    store = remote_store(server.url, tight)
    shards = ShardSet.open(server.url, store=store)
    assert settings.dir is not None
    positions = shards.shard_of(np.arange(len(shards)))
    for present in range(len(manifest.shards)):
        following = (present + 1) % len(manifest.shards)
        shards.expect([present], [following])
        wait_until(lambda wanted=present: store._cache.has_shard(store._facts[manifest.shards[wanted].name]))
        before = store.stats().direct_reads
        for row in np.flatnonzero(positions == present).tolist():
            assert shards.read(row) == local.read(row)
            assert size_of(settings.dir) <= tight.max_bytes
        assert store.stats().direct_reads == before
    store.close()


def test_a_damaged_sample_is_asked_for_again(server: FaultyServer, settings: CacheSettings, local: ShardSet) -> None:
    store = remote_store(server.url, settings)
    shards = ShardSet.open(server.url, store=store)
    server.fault = times(1, faults.flipped)
    assert shards.read(5) == local.read(5)
    server.fault = faults.flipped
    with pytest.raises(DataError, match=r"the image of sample \d+ is damaged: expected crc32"):
        shards.read(6)


def test_a_damaged_cached_shard_heals(server: FaultyServer, settings: CacheSettings, local: ShardSet) -> None:
    store = remote_store(server.url, settings)
    shards = ShardSet.open(server.url, store=store)
    expect_all(shards, store)
    assert settings.dir is not None
    for path in (settings.dir / "shards").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    assert [shards.read(row) for row in range(32)] == [local.read(row) for row in range(32)]
    wait_until(lambda: store.stats().shards_fetched == 2 * len(shards.manifest.shards))
    store.close()


def test_no_set_there(server: FaultyServer, settings: CacheSettings) -> None:
    server.folder = server.folder / "nowhere"
    with pytest.raises(DataError, match=r"^File `manifest\.json` of http://127.* cannot be read: HTTP status 404"):
        ShardSet.open(server.url, store=remote_store(server.url, settings))


def test_a_lost_server(server: FaultyServer, settings: CacheSettings) -> None:
    shards = ShardSet.open(server.url, store=remote_store(server.url, settings))
    server.fault = faults.status(503)
    with pytest.raises(DataError, match="3 tries, the last one: HTTP status 503 Service Unavailable. Check the server"):
        shards.read(0)


def test_an_object_store(converted: Path, settings: CacheSettings, local: ShardSet) -> None:
    system = MemoryFileSystem()
    system.put(str(converted), "/gcahng-shards", recursive=True)
    try:
        store = remote_store("memory://gcahng-shards", settings)
        shards = ShardSet.open("memory://gcahng-shards", store=store)
        assert all_samples(shards) == all_samples(local)
        expect_all(shards, store)
        assert all_samples(pickle.loads(pickle.dumps(shards))) == all_samples(local)
        assert store.stats().direct_reads == 2 * len(local)
        store.close()
    finally:
        system.rm("/gcahng-shards", recursive=True)
