"""The members of one tar, from front to back, where every fault is an error.

Readers that stream tars (Python's tarfile among them) take a header that they cannot read for the end of the archive,
so a tar that was cut between two members silently loses the rest. Here a tar ends with its two zero blocks or not at
all.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from gcahng.data.stores.store import ShardStore
from gcahng.errors import DataError

MAX_MEMBER_BYTES = 64 << 20
"""Default limit of a member that is read; others are passed over, whatever their size."""
PART_BYTES = 8 << 20
"""Bytes per read of the store."""

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_HEADER_BYTES = 1 << 20
_MAX_PADDING = 1 << 20  # writers fill up to their record size: 10 KiB by default, seldom more than 1 MiB
_REPAIR = "Copy the tar again, or make it again."
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,19}) ([^=\n]+)=")


class Kind(Enum):
    """What a member is; the value completes "is a ..."."""

    FILE = "regular file"
    DIRECTORY = "directory"
    HARD_LINK = "hard link"
    SYMBOLIC_LINK = "symbolic link"
    DEVICE = "device or pipe"


_KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.AREGTYPE: Kind.FILE,
    tarfile.CONTTYPE: Kind.FILE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.LNKTYPE: Kind.HARD_LINK,
    tarfile.SYMTYPE: Kind.SYMBOLIC_LINK,
    tarfile.CHRTYPE: Kind.DEVICE,
    tarfile.BLKTYPE: Kind.DEVICE,
    tarfile.FIFOTYPE: Kind.DEVICE,
}


@dataclass(frozen=True)
class Member:
    """One entry of a tar.

    Attributes:
        name: Path inside of the tar; bytes that are not UTF-8 stand as backslash escapes.
        kind: What it is.
        size: Bytes of content.
    """

    name: str
    kind: Kind
    size: int


class TarMembers:
    """Iterates over the members of a tar; `content` reads the one at hand.

    Headers are ustar, pax or GNU (long names). At most one part of the tar and one member are in memory.

    Args:
        store: Where the tar is.
        name: Its name there.
        location: The whole of its name, for messages.
        max_member_bytes: Limit of a member that is read.
        part_bytes: Bytes per read of the store.
    Raises:
        DataError: Here if the tar does not exist or is empty, and while iterating at the first fault; the message
            names the last member before it.
    """

    def __init__(
        self,
        store: ShardStore,
        name: str,
        *,
        location: str,
        max_member_bytes: int = MAX_MEMBER_BYTES,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._store = store
        self._name = name
        self._location = location
        self._max_member_bytes = max_member_bytes
        self._part_bytes = part_bytes
        self._size = store.size(name)
        self._part = b""
        self._part_start = 0
        self._header = 0  # where the present header starts
        self._content = 0  # where the present member's content starts
        self._member: Member | None = None
        self._last: str | None = None
        self._pax_global: dict[str, str] = {}
        if self._size == 0:
            raise DataError(f"Tar {location} is empty: expected members, got 0 bytes. {_REPAIR}")

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member

    def content(self, max_bytes: int | None = None) -> bytes:
        """The content of the member at hand.

        Args:
            max_bytes: Limit where it is lower than that of all members.
        Raises:
            DataError: It is larger than allowed, or cannot be read.
        """
        assert self._member is not None, "no member is at hand"
        limit = self._max_member_bytes
        if max_bytes is not None and max_bytes < limit:
            limit, repair = max_bytes, "Leave out what is no label."
        else:
            repair = "Raise `max_member_bytes` if that is right."
        if self._member.size > limit:
            raise self.fault(
                f"has a member that is too large: expected at most {limit} bytes, got "
                f"{self._member.size} in {self._member.name!r}",
                repair,
            )
        return self._bytes(self._content, self._member.size)

    def fault(self, what: str, repair: str = _REPAIR) -> DataError:
        """An error about this tar, which names the last member before the present one.

        Args:
            what: Completes "Tar NAME ...".
            repair: What to do, as a sentence.
        """
        place = "no member comes before it" if self._last is None else f"the last whole member is {self._last!r}"
        return DataError(f"Tar {self._location} {what}; {place}. {repair}")

    def _next(self) -> Member | None:
        if self._member is not None:
            self._last = self._member.name
            self._header = self._content + _padded(self._member.size if self._member.kind is Kind.FILE else 0)
            self._member = None
        long_name: str | None = None
        pax: dict[str, str] = dict(self._pax_global)
        is_extended = False
        while True:
            block = self._header_block()
            if block == _ZEROS:
                if is_extended:
                    raise self._bad_header("an extended header without a member")
                self._check_end()
                return None
            info = self._parse(block)
            self._content = self._header + _BLOCK
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
                records = self._pax_records(info)
                pax |= records
                if info.type == tarfile.XGLTYPE:
                    self._pax_global |= records
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = _text(self._extension(info).split(b"\0", 1)[0])
            elif info.type == tarfile.GNUTYPE_LONGLINK:
                self._extension(info)
            else:
                return self._as_member(info, long_name, pax)
            is_extended = is_extended or info.type != tarfile.XGLTYPE
            self._header = self._content + _padded(info.size)

    def _as_member(self, info: tarfile.TarInfo, long_name: str | None, pax: dict[str, str]) -> Member:
        name = pax.get("path", info.name if long_name is None else long_name)
        kind = _KINDS.get(info.type)
        if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in pax):
            raise self.fault(f"holds {name!r} as a sparse file: expected plain ones", "Repack it without --sparse.")
        if kind is None:
            raise self._bad_header(f"member {name!r} is of the unknown type {info.type!r}")
        size = info.size
        if "size" in pax:
            if not re.fullmatch(r"[0-9]{1,19}", pax["size"]):
                raise self._bad_header(f"size {pax['size'][:40]!r}")
            size = int(pax["size"])
        if kind is Kind.FILE:
            self._check_size(f"member {name!r}", size)
        self._member = Member(name, kind, size)
        return self._member

    def _header_block(self) -> bytes:
        left = self._size - self._header
        if left <= 0:
            raise self.fault(
                f"is cut at byte {self._size}: expected another member, or the two zero blocks that end a tar"
            )
        if left < _BLOCK:
            raise self.fault(f"is cut inside of the header at byte {self._header}: expected {_BLOCK} bytes, got {left}")
        return self._bytes(self._header, _BLOCK)

    def _parse(self, block: bytes) -> tarfile.TarInfo:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.TarError as error:
            if self._header == 0:
                raise self._no_tar(block) from None
            raise self._bad_header(str(error)) from None
        if info.size < 0:
            raise self._bad_header(f"size {info.size}")
        return info

    def _no_tar(self, block: bytes) -> DataError:
        for magic, name in _MAGIC.items():
            if block.startswith(magic):
                return DataError(
                    f"Tar {self._location} is compressed with {name}: expected a plain tar. Decompress it first."
                )
        return DataError(f"{self._location} is no tar: expected a tar header, got {block[:8]!r}. Check the path.")

    def _bad_header(self, what: str) -> DataError:
        return self.fault(f"has a damaged header at byte {self._header} ({what})")

    def _extension(self, info: tarfile.TarInfo) -> bytes:
        """The content of an extended header."""
        if info.size > _MAX_HEADER_BYTES:
            raise self._bad_header(f"an extended header of {info.size} bytes, more than {_MAX_HEADER_BYTES}")
        self._check_size("an extended header", info.size)
        return self._bytes(self._content, info.size)

    def _pax_records(self, info: tarfile.TarInfo) -> dict[str, str]:
        content = self._extension(info).rstrip(b"\0")
        records = {}
        position = 0
        while position < len(content):
            match = _PAX_RECORD.match(content, position)
            end = position + int(match[1]) if match else 0
            if match is None or end > len(content) or end <= match.end() or content[end - 1] != 0x0A:
                raise self._bad_header("malformed pax record")
            records[_text(match[2])] = _text(content[match.end() : end - 1])
            position = end
        return records

    def _check_size(self, what: str, size: int) -> None:
        if self._content + size > self._size:
            raise self.fault(
                f"is cut inside of {what}: expected {size} bytes at {self._content}, got {self._size - self._content}"
            )

    def _check_end(self) -> None:
        """Two zero blocks, and nothing but padding after them."""
        after = self._header + _BLOCK
        if after + _BLOCK > self._size:
            raise self.fault(f"is cut at byte {self._size}, inside of the two zero blocks that end a tar")
        for start in range(after, self._size, self._part_bytes):
            if not self._bytes(start, min(self._part_bytes, self._size - start)).strip(b"\0"):
                continue
            if self._bytes(after, _BLOCK).strip(b"\0"):
                raise self._bad_header("a single zero block amid the members")
            raise self.fault(
                f"goes on after its two zero blocks at byte {self._header}: expected zeros, as one tar ends there",
                "Give tars that were joined as they were before, or make it again.",
            )
        padding = self._size - after - _BLOCK
        if padding > _MAX_PADDING:
            raise self.fault(
                f"ends in {padding} bytes of padding, as an interrupted download leaves them: expected at most "
                f"{_MAX_PADDING}"
            )

    def _bytes(self, start: int, length: int) -> bytes:
        """Bytes of the tar, which has them by its size; small pieces come from one large read."""
        offset = start - self._part_start
        if offset >= 0 and offset + length <= len(self._part):
            return self._part[offset : offset + length]
        wanted = min(max(length, self._part_bytes), self._size - start)
        self._part = b""  # two parts in memory would be twice the bound
        self._part = self._store.read(self._name, start, wanted)
        self._part_start = start
        if len(self._part) < length:
            raise self.fault(f"became shorter while it was read: expected {self._size} bytes")
        return self._part[:length]


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")
