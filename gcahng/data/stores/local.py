"""Shards in a folder of this machine or of a file system mounted on it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gcahng.data.stores.open_files import OpenFiles
from gcahng.data.stores.per_process import PerProcess
from gcahng.data.stores.store import FileFacts
from gcahng.errors import DataError

_REPAIR = "Restore the file or convert the data set again."


class LocalStore:
    """Files of one folder, read with `os.pread`, so that forked workers share no file position.

    At most `gcahng.data.stores.open_files.MAX_OPEN_FILES` are open at a time. Safe to use from several threads.

    Args:
        directory: The shard folder.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.location = str(directory)
        self._files = PerProcess(OpenFiles, keep_inherited=False)

    def announce(self, files: Mapping[str, FileFacts]) -> None:
        """Compare the size of every file with what the manifest says.

        Raises:
            DataError: A file is missing or has another size.
        """
        for name, facts in files.items():
            got = self.size(name)
            if got != facts.bytes:
                raise DataError(
                    f"Shard {self.directory / name} is {'cut' if got < facts.bytes else 'too long'}: "
                    f"expected {facts.bytes} bytes, got {got}. {_REPAIR}"
                )

    def local_copy(self, name: str, sha256: str | None = None) -> Path:
        """The file itself.

        Raises:
            DataError: It is a device or a pipe, which would have no end.
        """
        path = self.directory / name
        if os.path.exists(path) and not os.path.isfile(path):  # whatever else is wrong, its reader says
            raise DataError(f"Shard file {path} is no regular file. {_REPAIR}")
        return path

    def expect(self, present: Sequence[str], following: Sequence[str]) -> None:
        """Nothing to do: the files are here."""

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
            return self._files.get().read(self.directory / name, offset, length)
        except OSError as error:
            raise self._unreadable(name, error) from None

    def distrust(self, name: str) -> bool:
        """No: there is one copy, this one."""
        return False

    def close(self) -> None:
        """Close the open files; the next read opens them again."""
        self._files.forget()

    def _unreadable(self, name: str, error: OSError) -> DataError:
        return DataError(f"Shard file {self.directory / name} cannot be read ({error.strerror}). {_REPAIR}")
