"""What the walk over one tar of ours is made of: its bytes, its headers, and the members that its index lists."""

import hashlib
import tarfile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gcahng.data.shards.index import INDEX_DTYPE, TAR_BLOCK
from gcahng.data.stores import ShardStore
from gcahng.errors import DataError

_PART = 1 << 22


class TarStream:
    """A file of a store, front to back, with its checksum."""

    def __init__(self, store: ShardStore, name: str, size: int) -> None:
        self._store, self._name = store, name
        self._digest = hashlib.sha256()
        self._part, self._start = b"", 0
        self.size = size
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end of the file."""
        pieces = []
        while count > 0:
            if self.position == self._start + len(self._part) and not self._next_part():
                break
            inside = self.position - self._start
            piece = self._part[inside : inside + count]
            pieces.append(piece)
            self.position += len(piece)
            count -= len(piece)
        return b"".join(pieces)

    def pass_to(self, position: int) -> bool:
        """Go on to `position`; whether all bytes up to it were zero."""
        zeros = True
        while self.position < position and (piece := self.take(min(_PART, position - self.position))):
            zeros = zeros and not any(piece)
        return zeros

    def sha256(self) -> str:
        """Of the whole file; reads what is left of it."""
        self.pass_to(self.size)
        return self._digest.hexdigest()

    def _next_part(self) -> bool:
        self._start += len(self._part)
        self._part = self._store.read(self._name, self._start, min(_PART, self.size - self._start))
        self._digest.update(self._part)
        return bool(self._part)


class IndexedMember(NamedTuple):
    """Where the index says that a member is."""

    header: int
    size: int
    row: int
    is_image: bool


class IndexedMembers:
    """The members that an index lists, by place in the tar, to be walked through once."""

    def __init__(self, table: NDArray[np.void] | None) -> None:
        rows = np.empty(0, INDEX_DTYPE) if table is None else table
        self._headers = (np.concatenate([rows["block"], rows["meta_block"]]).astype(np.int64) - 1) * TAR_BLOCK
        self._sizes = np.concatenate([rows["length"], rows["meta_length"]])
        self._order = np.argsort(self._headers, kind="stable")
        self._num_rows, self._next = len(rows), 0

    @property
    def is_done(self) -> bool:
        """Whether no member is left."""
        return self._next == len(self._order)

    @property
    def next_header(self) -> int | None:
        """Where the next member begins."""
        return None if self.is_done else self._place().header

    def at(self, position: int) -> IndexedMember | None:
        """The next member, taken out, if its header is there."""
        if self.is_done or self._place().header != position:
            return None
        self._next += 1
        return self._place(-1)

    def until(self, position: int | None) -> list[IndexedMember]:
        """Members that are listed before a position, taken out; all that are left without one."""
        passed = []
        while not self.is_done and (position is None or self._place().header < position):
            passed.append(self._place())
            self._next += 1
        return passed

    def _place(self, step: int = 0) -> IndexedMember:
        entry = int(self._order[self._next + step])
        is_image = entry < self._num_rows
        row = entry if is_image else entry - self._num_rows
        return IndexedMember(int(self._headers[entry]), int(self._sizes[entry]), row, is_image)


def parse_header(header: bytes) -> tuple[str, int]:
    """Name and size, from a header that is exactly as a tar writer makes it."""
    if not any(header):
        raise DataError("it is all zeros")
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        again = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeError, ValueError) as error:
        raise DataError(f"{error}") from None
    if again != header or info.type != tarfile.REGTYPE:
        raise DataError("expected the plain header of a regular file")
    return info.name, info.size


def check_file(store: ShardStore, name: str, sha256: str) -> None:
    """Compare the checksum of a small file where it lies: a cache would hide its damage.

    Raises:
        DataError: It cannot be read, or has another checksum.
    """
    got = TarStream(store, name, store.size(name)).sha256()
    if got != sha256:
        raise DataError(f"{name} differs from the manifest: expected sha256 {sha256}, got {got}.")
