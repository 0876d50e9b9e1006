"""The mapped indexes of a shard folder, of which only the latest stay open."""

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcahng.data.shards.index import INDEX_DTYPE, load_index
from gcahng.data.shards.manifest import Manifest, ShardInfo
from gcahng.data.stores import ShardStore

Table = NDArray[np.void]

_COPIES_AT_ONCE = 8


class IndexTables:
    """The index of each shard, by its position in the manifest.

    A mapped file keeps a file handle, of which a process has about a thousand, so old tables give way to new ones;
    mapping one again takes 30 microseconds. Pickles without tables: another process maps them anew.

    Args:
        manifest: Names the indexes.
        store: Where they come from.
    """

    _SLOTS = 256

    def __init__(self, manifest: Manifest, store: ShardStore) -> None:
        self._infos = manifest.shards
        self._store = store
        self._paths: list[Path] = []
        self._checked: list[tuple[int, int]] = []  # size and time of each file when its checksum was compared
        # One place per table, `position % _SLOTS`: reading threads need no lock.
        self._open: list[tuple[int, Table] | None] = [None] * self._SLOTS

    def load_all(self) -> Iterator[tuple[ShardInfo, Table]]:
        """Check every index against the manifest; must be run through once before all else."""
        # Several at a time: from a remote place each first copy waits for an answer.
        pool = ThreadPoolExecutor(_COPIES_AT_ONCE)
        try:
            copies = pool.map(lambda info: self._store.local_copy(info.index_name, info.index_sha256), self._infos)
            for position, (info, path) in enumerate(zip(self._infos, copies, strict=True)):
                self._paths.append(path)
                self._checked.append((-1, -1))
                yield info, self._load(position)
        finally:
            pool.shutdown(cancel_futures=True)

    def __getitem__(self, position: int) -> Table:
        slot = self._open[position % self._SLOTS]
        if slot is not None and slot[0] == position:
            return slot[1]
        if not self._paths[position].exists():  # a cache may have made room
            info = self._infos[position]
            self._paths[position] = self._store.local_copy(info.index_name, info.index_sha256)
        return self._load(position)

    def _load(self, position: int) -> Table:
        """Map a table; compares its checksum, unless that was done for this very file."""
        path, info = self._paths[position], self._infos[position]
        table = _map_rows(path, info.num_samples) if self._checked[position] == _state(path) else None
        if table is None:
            before = _state(path)
            table = load_index(path, info)
            self._checked[position] = before
        self._open[position % self._SLOTS] = position, table
        return table

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": [None] * self._SLOTS}


def _state(path: Path) -> tuple[int, int]:
    """What changes with a file."""
    try:
        found = os.stat(path)
    except OSError:
        return -2, -2
    return found.st_size, found.st_mtime_ns


def _map_rows(path: Path, num_samples: int) -> Table | None:
    """The rows at the end of a checked `.npy` file, without reading its header; None if it has just vanished."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    start = len(content) - num_samples * INDEX_DTYPE.itemsize
    return np.frombuffer(content, INDEX_DTYPE, num_samples, start) if start >= 0 else None
