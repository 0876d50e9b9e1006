"""Remote shards with a bounded cache on this machine."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from gcahng.data.stores.cache_folder import CacheFolder
from gcahng.data.stores.cache_settings import CacheSettings
from gcahng.data.stores.per_process import PerProcess
from gcahng.data.stores.prefetch import Prefetcher
from gcahng.data.stores.remote import RemoteStore
from gcahng.data.stores.store import FileFacts
from gcahng.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreStats:
    """What a store did in this process.

    Attributes:
        bytes_fetched: Bytes that came from the remote place.
        cached_reads: Reads answered by the cache.
        direct_reads: Reads answered by the remote place.
        retries: Requests that were made again.
        shards_fetched: Whole shards put into the cache.
    """

    bytes_fetched: int
    cached_reads: int
    direct_reads: int
    retries: int
    shards_fetched: int


class CachedStore:
    """A remote folder as a `ShardStore`.

    A read is answered by the cache where the shard is there, and by a ranged request for just these bytes where it is
    not: nobody waits for a whole shard. `expect` has whole shards fetched by a thread of this process; of all
    processes that share the cache, one fetches a shard, and another one takes over when it dies. Where the cache's
    folder cannot be used, one warning says so, reads are direct, and every new expectation tries it again.

    Args:
        remote: The remote folder.
        settings: The cache.
    """

    def __init__(self, remote: RemoteStore, settings: CacheSettings) -> None:
        self.location = remote.location
        self._remote = remote
        self._settings = settings
        self._cache = CacheFolder(settings.folder(), settings.max_bytes, remote.identity)
        self._facts: dict[str, FileFacts] = {}
        self._mine = PerProcess(self._begin_process)

    def announce(self, files: Mapping[str, FileFacts]) -> None:
        """Sizes and checksums of the shards; answers of the remote place are compared with them from now on."""
        self._facts.update(files)
        self._remote.announce(files)

    def size(self, name: str) -> int:
        """Size of a file in bytes, as the remote place says.

        Raises:
            DataError: It does not exist there, or the place cannot be reached.
        """
        return self._remote.size(name)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`; fewer only where the file ends.

        Raises:
            DataError: The remote place does not have them, or did not send them in all tries.
        """
        mine = self._mine.get()
        facts = self._facts.get(name)
        if facts is not None and self._settings.mode == "shards":
            with suppress(OSError):  # a cache that cannot be read is no cache
                content = self._cache.read_shard(facts, offset, length)
                if content is not None:
                    mine.count(cached=1)
                    return content
        mine.count(direct=1)
        return self._remote.read(name, offset, length)

    def local_copy(self, name: str, sha256: str | None = None) -> Path:
        """A whole small file on this machine: from the cache where its checksum is given, else fetched anew.

        Raises:
            DataError: The remote place does not have it, or it is not the one with this checksum.
        """
        mine = self._mine.get()
        try:
            path = self._cache.find_small(name, sha256) if sha256 else None
        except OSError as error:
            path = None
            mine.report_unusable(self._cache.root, error)
        if path is not None:
            return path
        content = self._remote.whole(name, sha256)
        try:
            return self._cache.keep_small(name, sha256, content)
        except OSError as error:
            mine.report_unusable(self._cache.root, error)
        return mine.keep_aside(self._cache.small_path(name, sha256).name, content)

    def expect(self, present: Sequence[str], following: Sequence[str]) -> None:
        """Have these shards fetched, in this order, as far as the cache can hold them. Returns at once."""
        if self._settings.mode == "shards":
            self._mine.get().prefetcher.expect(present, following)

    def distrust(self, name: str) -> bool:
        """Give up a cached shard with a wrong byte, and have it fetched again.

        Once per process and shard: where the remote one is damaged itself, another copy would be no better.
        """
        mine = self._mine.get()
        if name in mine.distrusted:
            return False
        mine.distrusted.add(name)
        facts = self._facts.get(name)
        if facts is not None:
            with suppress(OSError):
                self._cache.remove_shard(facts)
            mine.look_again()
        return True

    def stats(self) -> StoreStats:
        """Counts of this process."""
        mine = self._mine.get()
        traffic = self._remote.traffic
        return StoreStats(
            bytes_fetched=traffic.bytes_fetched,
            cached_reads=mine.cached_reads,
            direct_reads=mine.direct_reads,
            retries=traffic.retries,
            shards_fetched=mine.shards_fetched(),
        )

    def close(self) -> None:
        """End the background thread and give up connections; the next `expect` or read begins anew."""
        mine = self._mine.made()
        if mine is not None:
            mine.end_prefetching()
        self._remote.close()

    def _begin_process(self) -> "_Mine":
        return _Mine(lambda: Prefetcher(self._remote, self._cache, self._settings, self._facts))

    def __del__(self) -> None:
        # The thread does not refer to the store, so that a store nobody uses ends it.
        mine = self._mine.made() if "_mine" in self.__dict__ else None
        if mine is not None:
            mine.end_prefetching()


class _Mine:
    """What one process has of a store: counts, the thread that fetches ahead, a folder where the cache fails."""

    def __init__(self, make_prefetcher: Callable[[], Prefetcher]) -> None:
        self.cached_reads = 0
        self.direct_reads = 0
        self.distrusted: set[str] = set()
        self._make_prefetcher = make_prefetcher
        self._prefetcher: Prefetcher | None = None
        self._fetched_before = 0
        self._aside: Path | None = None
        self._reported = False
        self._lock = Lock()

    @property
    def prefetcher(self) -> Prefetcher:
        with self._lock:
            if self._prefetcher is None:
                self._prefetcher = self._make_prefetcher()
            return self._prefetcher

    def count(self, cached: int = 0, direct: int = 0) -> None:
        with self._lock:
            self.cached_reads += cached
            self.direct_reads += direct

    def shards_fetched(self) -> int:
        prefetcher = self._prefetcher
        return self._fetched_before + (prefetcher.shards_fetched if prefetcher else 0)

    def look_again(self) -> None:
        with self._lock:
            if self._prefetcher is not None:
                self._prefetcher.again()

    def end_prefetching(self) -> None:
        with self._lock:
            prefetcher, self._prefetcher = self._prefetcher, None
        if prefetcher is not None:
            prefetcher.stop()
            self._fetched_before += prefetcher.shards_fetched

    def report_unusable(self, root: Path, error: OSError) -> None:
        """Warn once."""
        if not self._reported:
            self._reported = True
            log.warning(
                "The cache %s cannot be used (%s); manifest, classes and indexes go to a temporary folder. Make room "
                "or name another folder (data.cache_dir).",
                root,
                error,
            )

    def keep_aside(self, name: str, content: bytes) -> Path:
        """Write a small file into a folder that ends with this process.

        Raises:
            DataError: There is no room for temporary files either.
        """
        try:
            if self._aside is None:
                self._aside = Path(tempfile.mkdtemp(prefix="gcahng-"))
                atexit.register(_remove_own, self._aside, os.getpid())
            path = self._aside / name
            path.write_bytes(content)
        except OSError as error:
            raise DataError(
                f"Neither the cache nor {tempfile.gettempdir()} can hold {name} ({len(content)} bytes; "
                f"{error.strerror}). Make room, or name another folder (data.cache_dir)."
            ) from None
        return path


def _remove_own(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
