"""What all remote places have in common: known sizes, ranged reads and tries. `CachedStore` makes a store of one."""

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from threading import Lock
from typing import Any

from gcahng.data.stores.per_process import PerProcess
from gcahng.data.stores.retry import PermanentFault, RetrySettings, TemporaryFault, with_retries
from gcahng.data.stores.store import FileFacts

Blocks = Generator[bytes, None, None]
"""Bytes of an answer, as they come."""

Sink = Callable[[int, bytes], None]
"""Takes a block and its offset in the file."""

# Files that come as one answer: those that the manifest vouches for, and the manifest itself.
_LARGEST_WHOLE = 4 << 30
_LARGEST_UNKNOWN = 256 << 20
_CHANGED = "The files there are not those of the manifest: upload the whole converted folder again."


class Traffic:
    """Counts of one process. Safe to use from several threads."""

    def __init__(self) -> None:
        self.bytes_fetched = 0
        self.retries = 0
        self._lock = Lock()

    def add(self, bytes_fetched: int = 0, retries: int = 0) -> None:
        """Count more."""
        with self._lock:
            self.bytes_fetched += bytes_fetched
            self.retries += retries


class RemoteStore(ABC):
    """Files of one remote folder. Survives fork and pickle; safe to use from several threads.

    A subclass says how one request is made: `_size_once` and `_stream_once`, which raise `TemporaryFault` or
    `PermanentFault`.

    Args:
        location: The folder for messages, without secrets.
        identity: What tells this folder from others, for the cache; may hold secrets.
        retry: How patiently the place is asked.

    Attributes:
        ranged: Whether the place sends parts of files; None until it was asked for one.
    """

    def __init__(self, location: str, identity: str, retry: RetrySettings) -> None:
        self.location = location
        self.identity = identity
        self.retry = retry
        self.ranged: bool | None = None
        self._facts: dict[str, FileFacts] = {}
        self._sizes: dict[str, int] = {}
        self._traffic = PerProcess(Traffic)

    @property
    def traffic(self) -> Traffic:
        """What this process fetched."""
        return self._traffic.get()

    def announce(self, files: Mapping[str, FileFacts]) -> None:
        """Sizes that answers are compared with from now on."""
        self._facts.update(files)

    def size(self, name: str) -> int:
        """Size of a file in bytes, asked for anew.

        Raises:
            DataError: It does not exist or the place cannot be reached.
        """
        size = self._try(lambda: self._size_once(name), f"The size of `{name}` of {self.location}")
        self._sizes[name] = size
        return size

    def read(self, name: str, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`; fewer only where the file ends.

        Raises:
            DataError: The file does not exist, is not the announced one, or the tries are used up.
        """
        content = bytearray()

        def put(start: int, block: bytes) -> None:
            content[start - offset :] = block

        self.fetch(name, offset, length, put)
        return bytes(content)

    def fetch(
        self, name: str, offset: int, length: int, sink: Sink, wait: Callable[[float], object] = time.sleep
    ) -> None:
        """Like `read`, block by block into `sink`. A try continues where the one before it stopped.

        Args:
            wait: Sleeps between tries; may raise to end them, as may `sink`.
        """
        end = min(offset + length, self._known_size(name))
        done = offset

        def attempt() -> None:
            nonlocal done
            if done == end:  # the try before failed after the last byte; an empty range means the whole file
                return
            begin = done
            with closing(self._stream_once(name, done, end - done)) as blocks:
                for block in blocks:
                    if done + len(block) > end:
                        done = begin  # nothing of such an answer is believed
                        raise TemporaryFault(f"the answer has more than the {end - begin} bytes asked for")
                    sink(done, block)
                    done += len(block)
                    self.traffic.add(bytes_fetched=len(block))
            if done < end:
                raise TemporaryFault(f"the answer ended {end - done} bytes early")

        if done < end:
            self._try(attempt, f"{self._file(name)}, bytes {offset} to {end},", wait)

    def whole(self, name: str, sha256: str | None = None) -> bytes:
        """All bytes of a file of unknown size (a manifest, an index), with this checksum where it is given.

        Raises:
            DataError: The file does not exist, has another checksum, or the tries are used up.
        """

        largest = _LARGEST_UNKNOWN if sha256 is None else _LARGEST_WHOLE

        def attempt() -> bytes:
            content = bytearray()
            with closing(self._stream_once(name, 0, None)) as blocks:
                for block in blocks:
                    content += block
                    self.traffic.add(bytes_fetched=len(block))
                    if len(content) > largest:
                        raise PermanentFault(f"it has more than {largest} bytes", _CHANGED)
            got = hashlib.sha256(content).hexdigest()
            if sha256 is not None and got != sha256:
                raise TemporaryFault(f"expected sha256 {sha256}, got {got} ({len(content)} bytes)")
            return bytes(content)

        return self._try(attempt, self._file(name))

    @abstractmethod
    def close(self) -> None:
        """Give up connections; the next read opens new ones."""

    @abstractmethod
    def _size_once(self, name: str) -> int:
        """Ask for the size of a file."""

    @abstractmethod
    def _stream_once(self, name: str, offset: int, length: int | None) -> Blocks:
        """Ask for `length` bytes from `offset`, all of them inside of the file, or (None) for the whole file."""

    def _check_total(self, name: str, total: int) -> None:
        """Compare the size that an answer tells with the announced one."""
        expected = self._facts[name].bytes if name in self._facts else self._sizes.get(name)
        if expected is not None and total != expected:
            raise PermanentFault(f"expected a file of {expected} bytes, it has {total}", _CHANGED)

    def _known_size(self, name: str) -> int:
        if name in self._facts:
            return self._facts[name].bytes
        return self._sizes[name] if name in self._sizes else self.size(name)

    def _file(self, name: str) -> str:
        return f"File `{name}` of {self.location}"

    def _try(self, attempt: Callable[[], Any], what: str, wait: Callable[[float], object] = time.sleep) -> Any:
        return with_retries(attempt, what, self.retry, wait=wait, on_retry=lambda: self.traffic.add(retries=1))
