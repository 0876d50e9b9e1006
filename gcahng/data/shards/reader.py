"""Random access to the samples of a shard folder, through its manifest and indexes."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gcahng.data.shards.class_list import ClassList, load_classes
from gcahng.data.shards.index import IndexRow, key_text
from gcahng.data.shards.index_tables import IndexTables
from gcahng.data.shards.manifest import MANIFEST_NAME, Manifest, ShardInfo
from gcahng.data.stores import FileFacts, ShardStore, open_store
from gcahng.errors import DataError, InputError

_HASH_BLOCK = 1 << 22
_REPAIR = "Restore the file or convert the data set again."

Runs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


class ShardSet:
    """All samples of a shard folder. A sample's row is its place in manifest order.

    Holds nothing per sample or class: indexes and the class list stay in mapped files, which all
    processes of a machine share. Pickles as paths. Use `ShardSet.open`; the constructor takes
    parts that are already checked.

    Attributes:
        manifest: What `manifest.json` says.
        classes: Class by class id.
    """

    def __init__(self, manifest: Manifest, classes: ClassList, tables: IndexTables, store: ShardStore) -> None:
        self.manifest = manifest
        self.classes = classes
        self._tables = tables
        self._store = store
        self._starts = np.cumsum([0] + [info.num_samples for info in manifest.shards], dtype=np.int64)

    @classmethod
    def open(cls, location: Path | str, verify: bool = False, store: ShardStore | None = None) -> "ShardSet":
        """Read the manifest, all indexes and the class list once; check the size of every shard.

        Args:
            location: Shard folder or URL.
            verify: Recompute the sha256 of every shard too (reads all bytes).
            store: Where files come from; the place that `location` names by default.

        Raises:
            DataError: A file is missing, cut, damaged or contradicts the manifest.
        """
        store = store or open_store(location)
        manifest = load_manifest(store)
        store.announce({info.name: FileFacts(info.bytes, info.sha256) for info in manifest.shards})
        classes = load_classes(store.local_copy(manifest.classes.name, manifest.classes.sha256), manifest.classes)
        if verify:
            for info in manifest.shards:
                _check_sha256(info, store)
        tables = IndexTables(manifest, store)
        _check_classes(manifest, tables.load_all(), store.location)
        return cls(manifest, classes, tables, store)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def class_ids(self, rows: ArrayLike | None = None) -> NDArray[np.int64]:
        """Class id of each row; of all rows, 8 bytes each, without an argument.

        Args:
            rows: (n,) rows in any order.

        Raises:
            InputError: There is no such row.
        """
        if rows is None:
            ids = np.empty(len(self), np.int64)
            for position, start in enumerate(self._starts[:-1]):
                ids[start : self._starts[position + 1]] = self._tables[position]["class_id"]
            return ids
        asked = self._checked(rows)
        ids = np.empty(asked.size, np.int64)
        positions = self._position(asked)
        # Shard by shard, whatever the order of the rows.
        order = np.argsort(positions, kind="stable")
        firsts = np.flatnonzero(np.diff(positions[order], prepend=-1))
        for places in np.split(order, firsts[1:]) if asked.size else ():
            position = int(positions[places[0]])
            ids[places] = self._tables[position]["class_id"][asked[places] - self._starts[position]]
        return ids

    def split_samples(self, split: str) -> NDArray[np.int64]:
        """Rows of a split, in manifest order.

        Raises:
            DataError: There is no such split.
        """
        ranges = [
            np.arange(self._starts[i], self._starts[i + 1], dtype=np.int64) for i in self.split_shards(split).tolist()
        ]
        return np.concatenate(ranges)

    def split_shards(self, split: str) -> NDArray[np.int32]:
        """Positions in `manifest.shards` of the shards of a split.

        Raises:
            DataError: There is no such split.
        """
        if split not in self.manifest.splits:
            raise DataError(f"Split {split!r} does not exist: expected one of {sorted(self.manifest.splits)}.")
        return np.flatnonzero([info.split == split for info in self.manifest.shards]).astype(np.int32)

    def class_runs(self, split: str) -> Runs:
        """The stretches of rows that belong to one class, in row order.

        Args:
            split: Only its rows; a run continues into the next shard where that goes on with its class.
        Returns:
            (class_id, first_row, count), each (runs,): neighbours in rows have different classes.

        Raises:
            DataError: There is no such split.
        """
        ids: list[NDArray[np.int64]] = []
        firsts: list[NDArray[np.int64]] = []
        counts: list[NDArray[np.int64]] = []
        last_id, last_end = -1, -1
        for position in self.split_shards(split).tolist():
            labels, start = self._tables[position]["class_id"], int(self._starts[position])
            begins = np.flatnonzero(np.diff(labels, prepend=labels[0] - 1))
            lengths = np.diff(begins, append=labels.size)
            if labels[0] == last_id and start == last_end:
                counts[-1][-1] += lengths[0]
                begins, lengths = begins[1:], lengths[1:]
            last_id, last_end = int(labels[-1]), int(self._starts[position + 1])
            if begins.size:
                ids.append(labels[begins].astype(np.int64))
                firsts.append(begins + start)
                counts.append(lengths.astype(np.int64))
        return np.concatenate(ids), np.concatenate(firsts), np.concatenate(counts)

    def shard_of(self, rows: ArrayLike) -> NDArray[np.int32]:
        """Position in `manifest.shards` of each row's shard.

        Args:
            rows: (n,) rows in any order.

        Raises:
            InputError: There is no such row.
        """
        return self._position(self._checked(rows)).astype(np.int32)

    def shard_name(self, row: int) -> str:
        """File name of the row's shard."""
        return self.manifest.shards[self._locate(row)[0]].name

    def record(self, row: int) -> IndexRow:
        """What the index says of a row: where its bytes lie, and their checksum."""
        position, inside = self._locate(row)
        return IndexRow(*self._tables[position][inside].item())

    def key(self, row: int) -> str:
        """The sample's key, 9 digits."""
        return key_text(self.record(row).key)

    def read(self, row: int) -> bytes:
        """The encoded image (JPEG or PNG) of a row.

        Raises:
            DataError: The bytes are not those that were written.
        """
        record = self.record(row)
        content = self._fetch(row, record, record.offset, record.length)
        if zlib.crc32(content) != record.crc32 and self._store.distrust(self.shard_name(row)):
            content = self._fetch(row, record, record.offset, record.length)  # a copy or a transfer was damaged
        got = zlib.crc32(content)
        if got != record.crc32:
            raise DataError(
                f"Shard {self.shard_name(row)}: the image of sample {key_text(record.key)} is "
                f"damaged: expected crc32 {record.crc32:08x}, got {got:08x}. {_REPAIR}"
            )
        return content

    def meta(self, row: int) -> dict[str, Any]:
        """The JSON member of a row: class_id, class_name, split, source, and columns where it has any.

        Raises:
            DataError: The bytes are not a JSON object.
        """
        record = self.record(row)
        content = self._fetch(row, record, record.meta_offset, record.meta_length)
        try:
            meta = json.loads(content)
        except (ValueError, RecursionError):
            meta = None
        if not isinstance(meta, dict) or "source" not in meta:
            raise DataError(
                f"Shard {self.shard_name(row)}: the JSON member of sample {key_text(record.key)} "
                f"is damaged: expected an object with `source`, got {content[:80]!r}. {_REPAIR}"
            )
        return meta

    def source(self, row: int) -> str:
        """Where the image came from, as the source named it."""
        return str(self.meta(row)["source"])

    def expect(self, present: ArrayLike, following: ArrayLike) -> None:
        """Tell the store which shards are read from now on. Returns at once.

        Args:
            present: Positions in `manifest.shards` that are read now.
            following: Those that are read after them.
        """
        names = [
            [self.manifest.shards[i].name for i in np.asarray(part, dtype=np.int64).tolist()]
            for part in (present, following)
        ]
        self._store.expect(*names)

    def _fetch(self, row: int, record: IndexRow, offset: int, length: int) -> bytes:
        name = self.shard_name(row)
        content = self._store.read(name, offset, length)
        if len(content) != length:
            raise DataError(
                f"Shard {name} ends inside of sample {key_text(record.key)}: "
                f"expected {length} bytes at {offset}, got {len(content)}. {_REPAIR}"
            )
        return content

    def _locate(self, row: int) -> tuple[int, int]:
        """Position of the row's shard, and the row inside of it."""
        if not 0 <= row < len(self):
            raise self._no_such_row(row)
        position = int(np.searchsorted(self._starts, row, side="right")) - 1
        return position, int(row) - int(self._starts[position])

    def _position(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _checked(self, rows: ArrayLike) -> NDArray[np.int64]:
        array = np.asarray(rows, dtype=np.int64)
        bad = (array < 0) | (array >= len(self))
        if bad.any():
            raise self._no_such_row(array[bad][0])
        return array

    def _no_such_row(self, row: int) -> InputError:
        return InputError(
            f"Row {row} does not exist: expected 0 to {len(self) - 1} in {self._store.location}. "
            "Take rows and shards from the same data set."
        )


def load_manifest(store: ShardStore) -> Manifest:
    """The manifest of a place of shards; messages name the place.

    Raises:
        DataError: It is missing, unreadable, of another version, or contradicts itself.
    """
    path = store.local_copy(MANIFEST_NAME)
    if os.path.isfile(path.parent):
        raise DataError(f"{path.parent} is a file: expected a folder of shards. Give the folder that it is in.")
    if str(path.parent) == store.location or not os.path.exists(path):
        return Manifest.load(path.parent)
    return Manifest.load(path, where=f"{store.location.rstrip('/')}/{MANIFEST_NAME}")


def _check_sha256(info: ShardInfo, store: ShardStore) -> None:
    digest = hashlib.sha256()
    for offset in range(0, info.bytes, _HASH_BLOCK):
        digest.update(store.read(info.name, offset, _HASH_BLOCK))
    if digest.hexdigest() != info.sha256:
        raise DataError(
            f"Shard {store.location}/{info.name} is damaged: expected sha256 {info.sha256}, "
            f"got {digest.hexdigest()}. {_REPAIR}"
        )


def _check_classes(manifest: Manifest, tables: Iterator[tuple[ShardInfo, NDArray[np.void]]], where: str) -> None:
    """Compare the number of classes in each split; one byte per class and split, nothing per sample."""
    count = manifest.classes.count
    present = {split: np.zeros(count, bool) for split in manifest.splits}
    for info, table in tables:
        ids = table["class_id"]
        if ids.min() < 0 or ids.max() >= count:
            raise DataError(
                f"Index {where}/{info.index_name} contradicts the manifest: expected class ids 0 to {count - 1}, "
                f"got {ids.min()} to {ids.max()}. {_REPAIR}"
            )
        present[info.split][ids] = True
    for split, found in present.items():
        expected = manifest.splits[split]["classes"]
        if found.sum() != expected:
            raise DataError(
                f"The indexes in {where} contradict the manifest: expected {expected} classes in split {split!r}, "
                f"got {found.sum()}. {_REPAIR}"
            )
    if present and not np.logical_or.reduce(list(present.values())).all():
        raise DataError(f"The indexes in {where} contradict the manifest: a class of {count} has no sample. {_REPAIR}")
