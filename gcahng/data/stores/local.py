"""Where the bytes of shards come from; remote or cached shards would replace `LocalStore`."""

import os
from pathlib import Path
from typing import Any, Protocol

from gcahng.errors import DataError


class ShardStore(Protocol):
    """Sizes and byte ranges of named files. Must survive fork and pickle into loader workers."""

    def size(self, name: str) -> int:
        """Size of a file in bytes; DataError where it does not exist."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`; fewer only where the file ends."""


class LocalStore:
    """Files of one folder, read with `os.pread`, so that forked workers share no file position.

    Args:
        directory: The shard folder.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._handles: dict[str, int] = {}

    def size(self, name: str) -> int:
        """Size of the file in bytes.

        Raises:
            DataError: The file does not exist or cannot be looked at.
        """
        try:
            return (self.directory / name).stat().st_size
        except OSError as error:
            raise self._unreadable(name, error) from None

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Bytes `offset` to `offset + length` of the file, fewer where it ends before.

        Raises:
            DataError: The file cannot be read.
        """
        try:
            handle = self._handles.get(name)
            if handle is None:
                handle = self._open(name)
            return os.pread(handle, length, offset)
        except OSError as error:
            raise self._unreadable(name, error) from None

    def close(self) -> None:
        """Close the open files; the next read opens them again."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _open(self, name: str) -> int:
        fresh = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC)
        handle = self._handles.setdefault(name, fresh)
        if handle != fresh:  # another thread was first
            os.close(fresh)
        return handle

    def _unreadable(self, name: str, error: OSError) -> DataError:
        return DataError(
            f"Shard file {self.directory / name} cannot be read ({error.strerror}). Restore the "
            "file or convert the data set again."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "_handles": {}}  # handles belong to one process

    def __del__(self) -> None:
        self.close()
