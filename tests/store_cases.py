"""What the tests of shard stores share: small files with their facts, and quick settings."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from faulty_server import FaultyServer

from gcahng.data.stores import CacheSettings, FileFacts
from gcahng.data.stores.cached import CachedStore
from gcahng.data.stores.http import HttpStore
from gcahng.data.stores.retry import RetrySettings

QUICK = RetrySettings(tries=3, first_wait_s=0.01, longest_wait_s=0.2, slowest_bytes_per_s=1e6)
# Only where a server is silent or slow: on a busy machine any answer may take this long.
IMPATIENT = replace(QUICK, read_timeout_s=0.4)


@dataclass
class Folder:
    """Files of one size in a folder."""

    path: Path
    content: dict[str, bytes]
    facts: dict[str, FileFacts]


def make_folder(path: Path, count: int = 4, size: int = 100_000) -> Folder:
    """`s0.tar`, `s1.tar`, ... with random bytes."""
    path.mkdir(parents=True)
    draw = np.random.default_rng(5)
    content = {f"s{i}.tar": draw.bytes(size) for i in range(count)}
    for name, body in content.items():
        (path / name).write_bytes(body)
    return Folder(path, content, {n: FileFacts(len(b), hashlib.sha256(b).hexdigest()) for n, b in content.items()})


def wait_until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return once it is so.

    Raises:
        AssertionError: It never was.
    """
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; files may come and go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def open_cached(server: FaultyServer, folder: Folder, settings: CacheSettings) -> CachedStore:
    """A store of the server's folder, its shards announced."""
    store = CachedStore(HttpStore(server.url, QUICK), settings)
    store.announce(folder.facts)
    return store


def announced(url: str, folder: Folder, retry: RetrySettings = QUICK) -> HttpStore:
    """A store without a cache, its shards announced."""
    store = HttpStore(url, retry)
    store.announce(folder.facts)
    return store


def names(*positions: int) -> list[str]:
    """Names of shards by position."""
    return [f"s{position}.tar" for position in positions]


def cached(settings: CacheSettings, folder: Folder) -> list[str]:
    """Names of the finished shards in the cache."""
    assert settings.dir is not None
    found = {path.name for path in (settings.dir / "shards").glob("*")}
    return [name for name, facts in folder.facts.items() if facts.sha256 in found]


def parts(settings: CacheSettings) -> list[str]:
    """Names of the unfinished files in the cache."""
    assert settings.dir is not None
    return [path.name for path in settings.dir.rglob("*.part")]


def check_reads(store: CachedStore, folder: Folder) -> None:
    """Read something of every shard and compare."""
    for name, content in folder.content.items():
        for offset in (0, 512, 99_000):
            assert store.read(name, offset, 1000) == content[offset : offset + 1000]
