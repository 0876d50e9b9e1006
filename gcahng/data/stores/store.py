"""What a place of shards can do; `gcahng.data.stores.open_store` finds the right one for a location."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gcahng.errors import DataError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: str) -> bool:
    """Whether it is a checksum as all manifests write it: 64 hexadecimal digits in small letters."""
    return _SHA256.fullmatch(text) is not None


@dataclass(frozen=True)
class FileFacts:
    """What the manifest says of a file.

    Attributes:
        bytes: Its size.
        sha256: Its checksum, 64 hexadecimal digits: the cache names files by it.

    Raises:
        DataError: The checksum is something else, such as a path.
    """

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not is_sha256(self.sha256):
            raise DataError(
                f"A shard's checksum must have 64 hexadecimal digits, got {self.sha256[:100]!r}. Take a manifest that "
                "a conversion wrote."
            )


class ShardStore(Protocol):
    """Named files of one shard folder. Must survive fork and pickle into loader workers."""

    location: str
    """The folder or URL, for messages."""

    def announce(self, files: Mapping[str, FileFacts]) -> None:
        """Say what the manifest says of every shard, before the first of them is read.

        Local files are compared by size at once, remote ones whenever an answer tells their size.

        Raises:
            DataError: A file is missing or has another size.
        """

    def size(self, name: str) -> int:
        """Size of a file in bytes; DataError where it does not exist."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`; fewer only where the file ends."""

    def local_copy(self, name: str, sha256: str | None = None) -> Path:
        """A whole small file (manifest, index) on this machine, for mapping into memory.

        Args:
            name: The file.
            sha256: Its checksum; a copy from an earlier run is used again where it is given.
        """

    def expect(self, present: Sequence[str], following: Sequence[str]) -> None:
        """Shards that are read from now on, and those after them. Returns at once."""

    def distrust(self, name: str) -> bool:
        """Say that bytes of a file were not those that were written: a cached copy of it is given up.

        Returns:
            Whether reading them again may bring others.
        """

    def close(self) -> None:
        """Give up files, connections and background work; the next read begins anew."""
