"""Writing to a disk that may be full: forced writes, and one clear error."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gcahng.errors import DataError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync(path: Path) -> None:
    """Force a file or folder to disk: a rename must not be remembered before its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns what the operating system says of a failed write into one message.

    Args:
        folder: Where the files are written.

    Raises:
        DataError: A write failed.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno not in _FULL:
            raise DataError(f"Cannot write to {folder} ({reason}). Check its permissions and its disk.") from None
        raise DataError(
            f"Cannot write to {folder} ({reason}): {_bytes_in(folder)} bytes are written, {_bytes_free(folder)} bytes "
            "of its disk are free. Free some space, or raise the quota or the limit of file sizes."
        ) from None


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes_free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
