"""A file that grows while a run goes on: every piece in it is whole and there once, whatever the disk does."""

import logging
import os
from collections import deque
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)


class AppendedFile:
    """Bytes appended piece by piece.

    A piece that the disk refuses is kept in memory, with those after it, until there is room: a piece that was written
    in part is cut off again first. Training never ends for it; the first refusal is logged as an error.
    """

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: File; made if it is not there, gone on with if it is.
        Raises:
            OSError: It cannot be opened.
        """
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._size = os.fstat(self._descriptor).st_size  # of the whole pieces
        self._waiting: deque[bytes] = deque()
        self._refused = False

    @property
    def waiting(self) -> tuple[bytes, ...]:
        """The pieces that are in memory alone, oldest first."""
        return tuple(self._waiting)

    def append(self, piece: bytes) -> None:
        """Add a piece, and write it if the disk lets it."""
        self._waiting.append(piece)
        self.flush()

    def flush(self) -> None:
        """Write what waits, as far as the disk lets it."""
        if not self._waiting:
            return
        try:
            if self._refused:
                os.ftruncate(self._descriptor, self._size)
            while self._waiting:
                self._write(self._waiting[0])
                self._size += len(self._waiting.popleft())
        except OSError as error:
            with suppress(OSError):  # then the next attempt does it first
                os.ftruncate(self._descriptor, self._size)
            if not self._refused:
                log.error(
                    "%s cannot be written (%s): make room or repair the disk. What belongs there is kept in memory, "
                    "and written when it can be.",
                    self.path,
                    error,
                )
            self._refused = True
            return
        if self._refused:
            log.warning("%s is written again; nothing is missing in it.", self.path)
        self._refused = False

    def _write(self, piece: bytes) -> None:
        left = memoryview(piece)
        while left:  # the system may take a part alone: the next attempt is told why
            left = left[os.write(self._descriptor, left) :]

    def sync(self) -> None:
        """Have what is written on the disk; any thread may call it. A disk that refuses is no error."""
        with suppress(OSError):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Write what can be, and let go of the file."""
        self.flush()
        with suppress(OSError):
            os.close(self._descriptor)
