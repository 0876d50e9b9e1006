"""Random access to the samples of a shard folder, through its manifest and indexes."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcahng.data.shards.index import key_text, load_index
from gcahng.data.shards.manifest import ClassInfo, Manifest, ShardInfo
from gcahng.data.stores.local import LocalStore
from gcahng.data.stores.store import FileFacts, ShardStore
from gcahng.errors import DataError

_HASH_BLOCK = 1 << 22
_REPAIR = "Restore the file or convert the data set again."


class ShardSet:
    """All samples of a shard folder. A sample's row is its place in manifest order.

    Every array has one entry per row. Use `ShardSet.open`; the constructor takes parts that are
    already read and checked.

    Attributes:
        manifest: What `manifest.json` says.
        classes: Class by class id.
        shard: (N,) int32, position of the row's shard in `manifest.shards`.
        offset: (N,) int64, first byte of the encoded image in the shard.
        length: (N,) int64, bytes of the encoded image.
        class_id: (N,) int64.
        crc32: (N,) uint32, of the encoded image.
        keys: (N,) int64, the number in the members' names.
        meta_offset: (N,) int64, first byte of the JSON member in the shard.
        meta_length: (N,) int64, bytes of the JSON member.
    """

    def __init__(self, manifest: Manifest, tables: list[NDArray[np.void]], store: ShardStore) -> None:
        self.manifest = manifest
        self.classes: tuple[ClassInfo, ...] = manifest.classes
        self._store = store
        counts = [len(table) for table in tables]
        self.shard: NDArray[np.int32] = np.repeat(np.arange(len(tables), dtype=np.int32), counts)

        def column(name: str, dtype: type[np.generic]) -> NDArray[Any]:
            parts = [table[name].astype(dtype) for table in tables]
            return np.concatenate(parts) if parts else np.empty(0, dtype)

        self.offset: NDArray[np.int64] = column("offset", np.int64)
        self.length: NDArray[np.int64] = column("length", np.int64)
        self.class_id: NDArray[np.int64] = column("class_id", np.int64)
        self.crc32: NDArray[np.uint32] = column("crc32", np.uint32)
        self.keys: NDArray[np.int64] = column("key", np.int64)
        self.meta_offset: NDArray[np.int64] = column("meta_offset", np.int64)
        self.meta_length: NDArray[np.int64] = column("meta_length", np.int64)

    @classmethod
    def open(cls, directory: Path | str, verify: bool = False, store: ShardStore | None = None) -> "ShardSet":
        """Read the manifest and all indexes; check the size of every shard.

        Args:
            directory: Folder with `manifest.json` and the indexes.
            verify: Recompute the sha256 of every shard too (reads all bytes).
            store: Where shard bytes come from; the folder itself by default.

        Raises:
            DataError: A file is missing, cut, damaged or contradicts the manifest.
        """
        directory = Path(directory)
        manifest = Manifest.load(directory)
        store = store or LocalStore(directory)
        store.announce({info.name: FileFacts(info.bytes, info.sha256) for info in manifest.shards})
        tables = []
        for info in manifest.shards:
            if verify:
                _check_sha256(info, store, directory)
            tables.append(load_index(directory / info.index_name, info))
        shards = cls(manifest, tables, store)
        shards._check_classes(directory)
        return shards

    def __len__(self) -> int:
        return len(self.keys)

    def split_samples(self, split: str) -> NDArray[np.int64]:
        """Rows of a split, in manifest order.

        Raises:
            DataError: There is no such split.
        """
        if split not in self.manifest.splits:
            raise DataError(f"Split {split!r} does not exist: expected one of {sorted(self.manifest.splits)}.")
        chosen = np.array([info.split == split for info in self.manifest.shards], dtype=bool)
        return np.flatnonzero(chosen[self.shard])

    def key(self, row: int) -> str:
        """The sample's key, 9 digits."""
        return key_text(int(self.keys[row]))

    def read(self, row: int) -> bytes:
        """The encoded image (JPEG or PNG) of a row.

        Raises:
            DataError: The bytes are not those that were written.
        """
        content = self._fetch(row, int(self.offset[row]), int(self.length[row]))
        got, expected = zlib.crc32(content), int(self.crc32[row])
        if got != expected:
            raise DataError(
                f"Shard {self._shard_name(row)}: the image of sample {self.key(row)} is "
                f"damaged: expected crc32 {expected:08x}, got {got:08x}. {_REPAIR}"
            )
        return content

    def meta(self, row: int) -> dict[str, Any]:
        """The JSON member of a row: class_id, class_name, split, source.

        Raises:
            DataError: The bytes are not a JSON object.
        """
        content = self._fetch(row, int(self.meta_offset[row]), int(self.meta_length[row]))
        try:
            meta = json.loads(content)
        except ValueError:
            meta = None
        if not isinstance(meta, dict) or "source" not in meta:
            raise DataError(
                f"Shard {self._shard_name(row)}: the JSON member of sample {self.key(row)} "
                f"is damaged: expected an object with `source`, got {content[:80]!r}. {_REPAIR}"
            )
        return meta

    def source(self, row: int) -> str:
        """Where the image came from, as the source named it."""
        return str(self.meta(row)["source"])

    def _shard_name(self, row: int) -> str:
        return self.manifest.shards[self.shard[row]].name

    def _fetch(self, row: int, offset: int, length: int) -> bytes:
        content = self._store.read(self._shard_name(row), offset, length)
        if len(content) != length:
            raise DataError(
                f"Shard {self._shard_name(row)} ends inside of sample {self.key(row)}: "
                f"expected {length} bytes at {offset}, got {len(content)}. {_REPAIR}"
            )
        return content

    def _check_classes(self, directory: Path) -> None:
        expected = np.array([info.num_samples for info in self.classes], dtype=np.int64)
        in_range = (self.class_id >= 0) & (self.class_id < len(self.classes))
        got = np.bincount(self.class_id[in_range], minlength=len(self.classes))
        if not in_range.all() or not np.array_equal(expected, got):
            raise DataError(
                f"The indexes in {directory} contradict the manifest: the samples per class differ. {_REPAIR}"
            )


def _check_sha256(info: ShardInfo, store: ShardStore, directory: Path) -> None:
    digest = hashlib.sha256()
    for offset in range(0, info.bytes, _HASH_BLOCK):
        digest.update(store.read(info.name, offset, _HASH_BLOCK))
    if digest.hexdigest() != info.sha256:
        raise DataError(
            f"Shard {directory / info.name} is damaged: expected sha256 {info.sha256}, "
            f"got {digest.hexdigest()}. {_REPAIR}"
        )
