"""Fetches whole shards into the cache before they are read, in a thread of its own."""

import atexit
import logging
import os
import threading
from collections.abc import Mapping, Sequence

from gcahng.data.stores.cache_folder import CacheFolder, ShardDraft
from gcahng.data.stores.cache_settings import CacheSettings
from gcahng.data.stores.download import Download, Unwanted
from gcahng.data.stores.remote import RemoteStore
from gcahng.data.stores.store import FileFacts
from gcahng.errors import DataError

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.5
_JOIN_S = 2.0
_DOWNLOADS = 3
"""Times that a shard is fetched whole before its checksum is believed to be wrong for good."""


class Prefetcher:
    """A thread that fetches the shards that are expected, in order. Belongs to one process.

    Args:
        remote: Where shards come from.
        cache: Where they go.
        settings: Size and number of the ranges.
        facts: What the manifest says of each shard.
    """

    def __init__(
        self, remote: RemoteStore, cache: CacheFolder, settings: CacheSettings, facts: Mapping[str, FileFacts]
    ) -> None:
        self._remote = remote
        self._cache = cache
        self._settings = settings
        self._facts = facts
        self._present: tuple[str, ...] = ()
        self._following: tuple[str, ...] = ()
        self._wanted: frozenset[str] = frozenset()
        self._process = os.getpid()
        self._order = 0  # counts the expectations
        self._wake = threading.Condition()
        self._stop = threading.Event()
        self._reported: set[str] = set()
        self._is_unusable = False
        self._thread: threading.Thread | None = None
        self.shards_fetched = 0

    def expect(self, present: Sequence[str], following: Sequence[str]) -> None:
        """Take another expectation in place of the one before. Returns at once."""
        present = _known(present, self._facts)
        wanted = set(present)
        following = tuple(name for name in _known(following, self._facts) if name not in wanted)
        with self._wake:
            if (present, following) == (self._present, self._following) or self._stop.is_set():
                return
            self._present, self._following = present, following
            self._wanted = frozenset(present + following)
            self._order += 1
            self._wake.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="gcahng-prefetch", daemon=True)
                self._thread.start()
                atexit.register(self.stop)

    def again(self) -> None:
        """Look through the expectation once more: a cached shard was found to be damaged."""
        with self._wake:
            self._order += 1
            self._wake.notify_all()

    def stop(self) -> None:
        """End the thread. A request that waits for its server is left to end by itself."""
        if os.getpid() != self._process:  # called at the exit of a forked process, which has no such thread
            return
        with self._wake:
            self._stop.set()
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)
            atexit.unregister(self.stop)

    def _run(self) -> None:
        try:
            order = 0
            while True:
                with self._wake:
                    while not self._is_over(order):
                        self._wake.wait()
                    order = self._order
                if self._stop.is_set():
                    return
                try:
                    self._fulfil(order)
                except OSError as error:  # a folder that was cleared, a full disk: the next window may fare better
                    self._report_unusable(error)
        except Exception:
            log.exception("Fetching shards ahead ended; samples are read from %s directly.", self._remote.location)

    def _fulfil(self, order: int) -> None:
        """Fetch what is expected; return when all is done or another expectation came."""
        present, following = self._present, self._following
        waiting = [*present, *following]
        while waiting:
            elsewhere = []
            for name in waiting:
                if self._is_over(order):
                    return
                state = self._ensure(name, present, following)
                if state == "elsewhere":
                    elsewhere.append(name)
                elif state == "no room" and name in present:
                    self._report_no_room(present)
            waiting = elsewhere
            if waiting:  # another process fetches them, until it dies
                with self._wake:
                    self._wake.wait_for(lambda: self._is_over(order), _LOOK_AGAIN_S)

    def _report_unusable(self, error: OSError) -> None:
        if not self._is_unusable:
            self._is_unusable = True
            log.warning(
                "The cache %s cannot be used (%s); samples are read from %s directly, and the next window tries again. "
                "Make room or name another folder (data.cache_dir).",
                self._cache.root,
                error,
                self._remote.location,
            )

    def _report_no_room(self, present: tuple[str, ...]) -> None:
        if "" not in self._reported:
            self._reported.add("")
            log.warning(
                "The cache %s has no room for all shards that are read now, %d bytes: the rest is read directly. Raise "
                "data.cache_bytes, now %d, or name a larger disk (data.cache_dir).",
                self._cache.root,
                sum(self._facts[name].bytes for name in present),
                self._cache.max_bytes,
            )

    def _is_over(self, order: int) -> bool:
        return self._stop.is_set() or self._order != order

    def _is_wanted(self, name: str) -> bool:
        return not self._stop.is_set() and name in self._wanted

    def _ensure(self, name: str, present: tuple[str, ...], following: tuple[str, ...]) -> str:
        """Have one shard in the cache: "here", "elsewhere", "no room", or "failed"."""
        facts = self._facts[name]
        if self._cache.has_shard(facts):
            return "here"
        # What is read now may take the place of what is read later, and nothing else that is expected goes.
        keep, give = (present, following[::-1]) if name in present else (present + following, ())
        draft = self._cache.begin_shard(facts, [self._facts[k] for k in keep], [self._facts[g] for g in give])
        if isinstance(draft, str):
            return draft
        try:
            self._download(name, facts, draft)
            draft.finish()
            self.shards_fetched += 1
            return "here"
        except Unwanted:
            draft.discard()
            return "unwanted"
        except DataError as error:
            draft.discard()
            if name not in self._reported:
                self._reported.add(name)
                log.warning("A shard could not be fetched ahead; its samples are read directly. %s", error)
            return "failed"
        except BaseException:
            draft.discard()
            raise

    def _download(self, name: str, facts: FileFacts, draft: ShardDraft) -> None:
        for _ in range(_DOWNLOADS):
            Download(self._remote, name, facts.bytes, draft.write, lambda: self._is_wanted(name), self._settings).run()
            got = draft.sha256()
            if got == facts.sha256:
                return
        raise DataError(
            f"File `{name}` of {self._remote.location} is damaged: expected sha256 {facts.sha256}, got {got} in the "
            f"last of {_DOWNLOADS} downloads. Upload it again, or convert the data set again."
        )


def _known(names: Sequence[str], facts: Mapping[str, FileFacts]) -> tuple[str, ...]:
    """The names without repetitions, those that were announced."""
    return tuple(name for name in dict.fromkeys(names) if name in facts)
