"""One whole file in large ranges, several at a time."""

import threading
import time
from collections import deque
from collections.abc import Callable

from gcahng.data.stores.cache_settings import CacheSettings
from gcahng.data.stores.remote import RemoteStore, Sink

_LOOK_S = 0.2


class Unwanted(Exception):
    """Ends a download that nobody waits for any more."""


class Download:
    """One file's bytes into a sink. Use `run`, once.

    Args:
        remote: Where it comes from.
        name: The file.
        size: Its bytes.
        write: Takes the blocks, from several threads.
        is_wanted: False ends the download; asked often.
        settings: Size and number of the ranges.
    """

    def __init__(
        self,
        remote: RemoteStore,
        name: str,
        size: int,
        write: Sink,
        is_wanted: Callable[[], bool],
        settings: CacheSettings,
    ) -> None:
        self._remote = remote
        self._name = name
        self._size = size
        self._write = write
        self._is_wanted = is_wanted
        self._settings = settings
        self._offsets = deque(range(0, size, settings.part_bytes))
        self._failures: list[BaseException] = []
        self._failed = threading.Event()

    def run(self) -> None:
        """Fetch it.

        Raises:
            DataError: It cannot be fetched.
            OSError: The sink raised it.
            Unwanted: `is_wanted` said no.
        """
        part = self._settings.part_bytes
        if self._remote.ranged is None and self._offsets:
            self._fetch(self._offsets.popleft(), part)
        if self._remote.ranged is False:  # each range would cost the whole file
            if self._offsets:
                self._fetch(self._offsets[0], self._size - self._offsets[0])
            return
        count = min(self._settings.parts_at_once, len(self._offsets))
        threads = [threading.Thread(target=self._work, name="gcahng-part", daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _work(self) -> None:
        try:
            while not self._failed.is_set():
                try:
                    offset = self._offsets.popleft()
                except IndexError:
                    return
                self._fetch(offset, self._settings.part_bytes)
        except BaseException as error:  # raised again by `run`
            self._failures.append(error)
            self._failed.set()

    def _fetch(self, offset: int, length: int) -> None:
        self._remote.fetch(self._name, offset, length, self._sink, self._wait)

    def _sink(self, offset: int, block: bytes) -> None:
        self._check()
        self._write(offset, block)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._check()
            self._failed.wait(min(left, _LOOK_S))

    def _check(self) -> None:
        if self._failed.is_set() or not self._is_wanted():
            raise Unwanted
