"""Reads the images of a source, which may be anybody's files."""

import os
import stat
from pathlib import Path

from gcahng.errors import DataError

MAX_FILE_BYTES = 64 << 20
"""Limit of an encoded image."""


def read_file(path: Path) -> bytes:
    """The bytes of an image file; links are followed.

    Raises:
        OSError: It cannot be read.
        DataError: It is a device or a pipe, which would have no end, or is larger than `MAX_FILE_BYTES`.
    """
    # Without waiting for whoever might write into a pipe.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise DataError("the file is a device or a pipe: expected a regular file. Remove it.")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"the file has more than {MAX_FILE_BYTES} bytes. Leave it out, or make it smaller.")
    return content
