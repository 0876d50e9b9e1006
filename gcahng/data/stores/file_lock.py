"""A lock between processes: `flock` on a file, given up by the system when its holder dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A forked process inherits handles, and with them the locks: it closes them at once, so that a lock ends with the
# process that took it, and no handle keeps the space of a removed file.
_OWN: set[int] = set()


def _close_inherited() -> None:
    while _OWN:
        os.close(_OWN.pop())


os.register_at_fork(after_in_child=_close_inherited)


class LockedFile:
    """A file that this process has locked. Close it to let go.

    Attributes:
        handle: Open for reading and writing.
        path: Its name.
    """

    def __init__(self, handle: int, path: Path) -> None:
        self.handle = handle
        self.path = path
        self._process = os.getpid()

    def close(self) -> None:
        """Let go of the lock and close the file."""
        if self.handle >= 0 and self._process == os.getpid():
            _OWN.discard(self.handle)
            with suppress(OSError):  # a process that was forked in this moment may still have the handle
                fcntl.flock(self.handle, fcntl.LOCK_UN)
            os.close(self.handle)
        self.handle = -1


def lock_file(path: Path, *, wait: bool, shared: bool = False, create: bool = True) -> LockedFile | None:
    """Open and lock a file.

    Args:
        path: The file.
        wait: Wait for other holders; else None is returned while there are any.
        shared: Several processes may hold it in this way.
        create: Make the file where it is missing; else None is returned then.
    Raises:
        OSError: The file cannot be opened, or the file system has no locks.
    """
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
        except FileNotFoundError:
            if create:
                raise
            return None
        _OWN.add(handle)
        file = LockedFile(handle, path)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            if _is_same(handle, path):
                return file
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        file.close()  # its holder removed or renamed it before it let go: begin anew


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file."""
    file = lock_file(path, wait=True)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _is_same(handle: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(handle)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
