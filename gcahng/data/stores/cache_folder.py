"""The cache on disk: finished shards by checksum, shards that are being fetched, and the small files of each set.

    lock                       held while space is given out or taken back
    shards/<sha256>            a finished shard; it comes into being by a rename, checked
    shards/<sha256>.part       being fetched, at its full size, locked by the process that fetches it
    sets/<location>/in_use     locked (shared) by every process that reads the set
    sets/<location>/...        manifest.json, and <sha256>-<name> of class list and indexes

Every process may die at any time: locks end with it, and what it left behind is recognised by not being locked.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gcahng.data.stores.cache_room import make_room
from gcahng.data.stores.file_lock import LockedFile, lock_file, locked
from gcahng.data.stores.per_process import PerProcess
from gcahng.data.stores.store import FileFacts

log = logging.getLogger(__name__)

PART = ".part"
_HASH_BLOCK = 1 << 22


class CacheFolder:
    """The files of one cache folder, as one data set sees them. Survives fork and pickle.

    Methods raise OSError where the folder cannot be used; nothing here asks the remote place.

    Args:
        root: The folder; made when it is first used.
        max_bytes: Bound of all its files' sizes.
        identity: What tells the data set's location from others.
    """

    def __init__(self, root: Path, max_bytes: int, identity: str) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._shards = root / "shards"
        self._set = root / "sets" / hashlib.sha256(identity.encode()).hexdigest()[:24]
        self._in_use = PerProcess(self._mark_in_use)

    def shard_path(self, facts: FileFacts) -> Path:
        """Where the finished shard is, if it is."""
        return self._shards / facts.sha256

    def has_shard(self, facts: FileFacts) -> bool:
        """Whether the finished shard is here. One of a wrong size is removed; one that is here counts as used now."""
        path = self.shard_path(facts)
        try:
            size = path.stat().st_size
            if size == facts.bytes:
                with suppress(PermissionError):  # another user's
                    os.utime(path)
                return True
        except FileNotFoundError:
            return False
        self._drop(path, facts, size)
        return False

    def read_shard(self, facts: FileFacts, offset: int, length: int) -> bytes | None:
        """Bytes of a finished shard; None where it is not here. One of a wrong size is removed.

        The file is opened for each read: one that stays open would keep its space after it was removed.
        """
        path = self.shard_path(facts)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            size = os.fstat(handle).st_size
            if size != facts.bytes:
                self._drop(path, facts, size)
                return None
            length = max(0, min(length, size - offset))
            content = os.pread(handle, length, offset)
            return content if len(content) == length else None
        finally:
            os.close(handle)

    def remove_shard(self, facts: FileFacts) -> None:
        """Remove a finished shard whose bytes turned out to be wrong."""
        path = self.shard_path(facts)
        if path.exists():
            log.warning("Cached shard %s is damaged; it is fetched again.", path)
            path.unlink(missing_ok=True)

    def begin_shard(self, facts: FileFacts, keep: Sequence[FileFacts], give: Sequence[FileFacts]) -> "ShardDraft | str":
        """Make room for a shard and a file to fetch it into.

        Args:
            facts: The shard.
            keep: Shards that must not go for it.
            give: Shards that may go for it, the first ones first, after everything that nobody asked for.
        Returns:
            The draft, or why there is none: "here" (it is finished), "elsewhere" (another process fetches it),
            "no room".
        """
        self._shards.mkdir(parents=True, exist_ok=True)
        path = self.shard_path(facts)
        part = lock_file(path.with_name(facts.sha256 + PART), wait=False)
        if part is None:
            return "elsewhere"
        draft = ShardDraft(part, path, facts)
        try:
            if self.has_shard(facts):
                draft.discard()
                return "here"
            # What a process that died left of it. Its space is given out anew.
            os.ftruncate(part.handle, 0)
            with locked(self.root / "lock"):
                names = ({item.sha256 for item in keep}, [item.sha256 for item in give])
                if not make_room(self.root, facts.bytes, self.max_bytes, *names, own_set=self._set.name):
                    draft.discard()
                    return "no room"
                os.ftruncate(part.handle, facts.bytes)
        except BaseException:
            draft.discard()
            raise
        return draft

    def small_path(self, name: str, sha256: str | None) -> Path:
        """Where a small file of this set is kept."""
        return self._set / (f"{sha256}-{name}" if sha256 else name)

    def find_small(self, name: str, sha256: str) -> Path | None:
        """A small file from an earlier run, if it is here and whole."""
        path = self.small_path(name, sha256)
        self._in_use.get()
        try:
            with path.open("rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None
        if got == sha256:
            return path
        log.warning("Cached file %s is damaged; it is fetched again.", path)
        return None

    def keep_small(self, name: str, sha256: str | None, content: bytes) -> Path:
        """Write a small file of this set. Shards make room for it; where that is not enough, it is written anyway."""
        path = self.small_path(name, sha256)
        self._in_use.get()
        self._set.mkdir(parents=True, exist_ok=True)  # someone may have cleared the cache since
        with locked(self.root / "lock"):
            if not make_room(self.root, len(content), self.max_bytes, own_set=self._set.name):
                log.warning(
                    "The cache %s cannot hold manifest, classes and indexes of a data set in its %d bytes. Raise "
                    "data.cache_bytes.",
                    self.root,
                    self.max_bytes,
                )
            part = path.with_name(path.name + PART)
            try:
                part.write_bytes(content)
                os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return path

    def _mark_in_use(self) -> LockedFile | None:
        self._set.mkdir(parents=True, exist_ok=True)
        file = lock_file(self._set / "in_use", wait=True, shared=True)
        with suppress(PermissionError):
            os.utime(self._set / "in_use")
        return file

    def _drop(self, path: Path, facts: FileFacts, size: int) -> None:
        log.warning("Cached shard %s has %d bytes, not %d; it is fetched again.", path, size, facts.bytes)
        path.unlink(missing_ok=True)


class ShardDraft:
    """A shard that this process is fetching."""

    def __init__(self, part: LockedFile, path: Path, facts: FileFacts) -> None:
        self._part = part
        self._path = path
        self._facts = facts

    def write(self, offset: int, block: bytes) -> None:
        """Put bytes to their place. Safe from several threads."""
        written = os.pwrite(self._part.handle, block, offset)
        while written < len(block):  # a disk that fills up takes a part first and refuses the next
            written += os.pwrite(self._part.handle, block[written:], offset + written)

    def sha256(self) -> str:
        """Checksum of what is in the file."""
        digest = hashlib.sha256()
        for offset in range(0, self._facts.bytes, _HASH_BLOCK):
            digest.update(os.pread(self._part.handle, min(_HASH_BLOCK, self._facts.bytes - offset), offset))
        return digest.hexdigest()

    def finish(self) -> None:
        """Give the file its name, from which on all processes read it."""
        # A machine that loses power must not keep the name without the bytes: later runs believe it.
        os.fsync(self._part.handle)
        os.rename(self._part.path, self._path)
        self._part.close()

    def discard(self) -> None:
        """Remove the file."""
        with suppress(OSError):
            self._part.path.unlink(missing_ok=True)
        self._part.close()
