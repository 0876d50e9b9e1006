"""Room in the cache: what is there, and what goes first. Called with the cache's lock held."""

import shutil
from collections.abc import Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from gcahng.data.stores.file_lock import lock_file

_PART = ".part"
# Of the disk, left to others: a run's checkpoints may go to the same one.
_FREE_SHARE = 0.02


@dataclass(frozen=True)
class _Entry:
    """Files that go together.

    Attributes:
        used: When they were last asked for, seconds.
        bytes: Their sizes.
        paths: The files.
    """

    used: float
    bytes: int
    paths: tuple[Path, ...]


def make_room(
    root: Path, needed: int, max_bytes: int, keep: Set[str] = frozenset(), give: Sequence[str] = (), *, own_set: str
) -> bool:
    """Remove what nobody asked for, oldest first, then `give`, until `needed` more bytes fit.

    Args:
        root: The cache's folder.
        needed: Bytes about to be written.
        max_bytes: Bound of all sizes; a disk that holds less bounds them too.
        keep: Checksums of shards that stay.
        give: Checksums of shards that may go, first ones first, after everything else.
        own_set: Folder name of the set that asks; its small files stay.
    Returns:
        Whether they fit. Nothing is removed where they would not.
    """
    _remove_left_behind(root)
    with ExitStack() as held:
        fixed, loose, given = _entries(root, keep, set(give), own_set, held)
        excess = (
            needed - min(max_bytes, _disk_bound(root)) + fixed + sum(entry.bytes for entry in (*loose, *given.values()))
        )
        if excess > sum(entry.bytes for entry in (*loose, *given.values())):
            return False
        order = [*sorted(loose, key=lambda entry: entry.used), *(given[name] for name in give if name in given)]
        for entry in order:
            if excess <= 0:
                break
            for path in entry.paths:
                path.unlink(missing_ok=True)
            excess -= entry.bytes
    return excess <= 0


def _disk_bound(root: Path) -> int:
    """What the cache may hold at most on this disk: what it has on it, and what is free but for a margin."""
    usage = shutil.disk_usage(root)
    paths = [*_files(root / "shards"), *(path for folder in _folders(root / "sets") for path in _files(folder))]
    held = 0
    for path in paths:
        with suppress(FileNotFoundError):
            stat = path.stat()
            # A file that is being fetched has its full size from the start, and its blocks as they come.
            held += min(stat.st_size, stat.st_blocks * 512)
    return held + max(0, usage.free - int(_FREE_SHARE * usage.total))


def _entries(
    root: Path, keep: Set[str], give: Set[str], own_set: str, held: ExitStack
) -> tuple[int, list[_Entry], dict[str, _Entry]]:
    """Bytes that stay, what may go, and what may go last by name. Sets that may go are locked until `held` ends."""
    fixed, loose, given = 0, [], {}
    for path in _files(root / "shards"):
        entry = _entry(path)
        if path.name in keep or path.name.endswith(_PART):
            fixed += entry.bytes
        elif path.name in give:
            given[path.name] = entry
        else:
            loose.append(entry)
    for folder in _folders(root / "sets"):
        entry = _entry(*_files(folder))
        lock = None if folder.name == own_set else lock_file(folder / "in_use", wait=False, create=False)
        if lock is None:
            fixed += entry.bytes
        else:
            held.callback(lock.close)
            loose.append(entry)
    return fixed, loose, given


def _remove_left_behind(root: Path) -> None:
    """Remove what processes that died were writing: nobody holds its lock."""
    for path in _files(root / "shards"):
        if path.name.endswith(_PART) and (lock := lock_file(path, wait=False, create=False)) is not None:
            path.unlink(missing_ok=True)
            lock.close()
    for folder in _folders(root / "sets"):
        for path in _files(folder):
            if path.name.endswith(_PART):  # small files are written under the cache's lock, which is held here
                path.unlink(missing_ok=True)


def _entry(*paths: Path) -> _Entry:
    used, size = 0.0, 0
    found = []
    for path in paths:
        try:
            stat = path.stat()
        except FileNotFoundError:  # it was finished, dropped or given up in this moment
            continue
        used = max(used, stat.st_mtime)
        size += stat.st_size
        if path.name != "in_use":
            found.append(path)
    return _Entry(used, size, tuple(found))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
