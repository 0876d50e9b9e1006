"""Files that a command writes at its end: refused at its start where they cannot be, and whole or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gcahng.errors import ConfigError


def check_output(option: str, path: Path) -> None:
    """Refuse, before anything is computed, a file that cannot be written afterwards.

    Args:
        option: That names it, for messages.
        path: The file; one that exists will be replaced.
    Raises:
        ConfigError: Its folder does not exist or takes no files, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"`{option}` {path}: the folder does not exist. Create it first.")
    if path.is_dir():
        raise ConfigError(f"`{option}` {path} is a folder: expected the name of a file.")
    with _refused(option, path):
        _partial(path).touch()
        _partial(path).unlink()


@contextmanager
def whole_file(option: str, path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it gets its name when it is whole.

    Raises:
        ConfigError: It cannot be written; nothing is left behind, and what had the name keeps it.
    """
    partial = _partial(path)
    try:
        with _refused(option, path):
            with partial.open("wb") as file:
                yield file
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def _refused(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"`{option}` {path} cannot be written ({error.strerror}). Name another.") from None
