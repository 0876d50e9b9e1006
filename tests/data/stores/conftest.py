"""A folder of shards, a web server of it, and a store with a small cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_server import FaultyServer, serve
from store_cases import Folder, make_folder, open_cached

from gcahng.data.stores import CacheSettings
from gcahng.data.stores.cached import CachedStore


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return make_folder(tmp_path / "set", count=6)


@pytest.fixture
def server(folder: Folder) -> Iterator[FaultyServer]:
    with serve(folder.path) as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> CacheSettings:
    return CacheSettings(dir=tmp_path / "cache", max_bytes=350_000, part_bytes=30_000)


@pytest.fixture
def store(server: FaultyServer, folder: Folder, settings: CacheSettings) -> Iterator[CachedStore]:
    store = open_cached(server, folder, settings)
    yield store
    store.close()
