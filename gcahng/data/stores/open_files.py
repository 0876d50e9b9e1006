"""A bounded number of files kept open for reading."""

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock

MAX_OPEN_FILES = 128
"""A set may have thousands of shards, and many systems let a process open 1024 files."""


class OpenFile:
    """One file, closed when nobody refers to it: a thread that reads keeps it open although it was put out."""

    def __init__(self, path: Path) -> None:
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


class OpenFiles:
    """The files used last, opened once. Safe to use from several threads.

    Args:
        limit: Files kept open at a time.
    """

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._files: OrderedDict[Path, OpenFile] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Bytes `offset` to `offset + length` of a file, fewer where it ends before.

        Raises:
            OSError: The file cannot be opened or read.
        """
        file = self._get(path)
        content = os.pread(file.handle, length, offset)
        if len(content) == length:
            return content
        # One call may bring less than asked for (Linux stops at 2 GiB, network file systems may sooner).
        blocks = [content]
        while blocks[-1] and (got := sum(map(len, blocks))) < length:
            blocks.append(os.pread(file.handle, length - got, offset + got))
        return b"".join(blocks)

    def _get(self, path: Path) -> OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = OpenFile(path)
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file
