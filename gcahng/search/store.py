"""Stored embeddings: index folders, and the .npz and parquet files of embeddings that this library writes.

Nothing that a file says is believed before it is checked, nothing is unpickled, and the embeddings stay on disk.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcahng.errors import DataError, InputError
from gcahng.search.assemble import load_parquet
from gcahng.search.index_info import EMBEDDINGS, INDEX, LABELS, OFFSETS, PARQUET, PARTIAL, ROWS, IndexInfo

_REPAIR = "Restore the file, or make it again."
_MAX_LINE = 1 << 20
_MAX_GROUP_BYTES = 1 << 31
BLOCK_BYTES = 32 << 20
"""Bytes of embeddings that are in memory at a time, by default."""


class StoredRow(NamedTuple):
    """What is known of a stored embedding.

    Attributes:
        key: Key of the sample, unique in its shard.
        shard: Its tar.
        label: Class id.
        class_name: Name of the class.
    """

    key: str
    shard: str
    label: int
    class_name: str


class _Content(Protocol):
    """Where embeddings lie, whatever the format."""

    count: int
    dim: int

    def embeddings(self, start: int, stop: int) -> NDArray[np.float32]:
        """(stop - start, D); mapped where the format allows it."""

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """(stop - start, D) in memory of their own, which ends with the array."""

    def labels(self) -> NDArray[np.int64]:
        """(n,)."""

    def row(self, index: int) -> StoredRow:
        """One row."""


class EmbeddingStore:
    """n stored embeddings with their rows. Use `EmbeddingStore.open`.

    Attributes:
        path: Folder or file.
        info: What `index.json` says; None of a single file.
        count: n.
        dim: D.
    """

    def __init__(self, path: Path, content: _Content, info: IndexInfo | None) -> None:
        self.path = path
        self.info = info
        self.count = content.count
        self.dim = content.dim
        self._content = content

    @staticmethod
    def open(path: Path | str, *, verify: bool = False) -> "EmbeddingStore":
        """Open an index folder, or a single .npz or .parquet file.

        Args:
            path: See `gcahng.search.embed`, `gcahng.training.saved_embeddings` (its query part is read).
            verify: Compare the sha256 of every file of a folder too, which reads all bytes.
        Raises:
            DataError: It is missing, cut, damaged or contradicts itself.
            ConfigError: Parquet, and pyarrow is not installed.
        """
        path = Path(path)
        if (path / INDEX).exists():
            info = IndexInfo.load(path)
            if verify:
                _verify(path, info)
            content: _Content = _NpyFolder(path) if info.layout == "npy" else _ParquetFile(path / PARQUET)
            if (content.count, content.dim) != (info.count, info.dim):
                raise DataError(
                    f"{path}: the embeddings differ from {INDEX}: expected {info.count} x {info.dim}, got "
                    f"{content.count} x {content.dim}. {_REPAIR}"
                )
            return EmbeddingStore(path, content, info)
        readers: dict[str, Callable[[Path], _Content]] = {".npz": _NpzFile, ".parquet": _ParquetFile}
        if not path.is_file() or path.suffix not in readers:
            raise DataError(_no_store(path))
        return EmbeddingStore(path, readers[path.suffix](path), None)

    def __len__(self) -> int:
        return self.count

    def embeddings(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` as (stop - start, D) float32; memory-mapped where the layout is npy.

        Raises:
            InputError: There are no such rows.
        """
        stop = self.count if stop is None else stop
        if not 0 <= start <= stop <= self.count:
            raise InputError(f"Rows {start} to {stop} are not among {self.count} of {self.path}.")
        return torch.from_numpy(self._content.embeddings(start, stop))

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """All embeddings in order, as (first row, (b, D) float32) of about `block_bytes` each."""
        rows = max(1, block_bytes // (4 * self.dim))
        for start in range(0, self.count, rows):
            yield start, torch.from_numpy(self._content.read(start, min(start + rows, self.count)))

    def labels(self) -> Tensor:
        """(n,) int64 class ids."""
        return torch.from_numpy(self._content.labels())

    def row(self, index: int) -> StoredRow:
        """What is known of a row.

        Raises:
            InputError: There is no such row.
            DataError: It is damaged.
        """
        if not 0 <= index < self.count:
            raise InputError(f"Row {index} is not among {self.count} of {self.path}.")
        return self._content.row(index)


def _no_store(path: Path) -> str:
    """Why nothing is found at a path."""
    if not path.exists() and path.with_name(f"{path.name}{PARTIAL}").is_dir():
        return f"{path} is not finished: launch/embed.py was stopped. Give its command again, it continues."
    got = f"a folder without {INDEX}" if path.is_dir() else "another file" if path.exists() else "nothing there"
    return (
        f"{path} holds no embeddings: expected an index folder, or a file .npz or .parquet, got {got}. Make one with "
        "launch/embed.py."
    )


def _verify(folder: Path, info: IndexInfo) -> None:
    for name, file in info.files.items():
        with (folder / name).open("rb") as content:
            got = hashlib.file_digest(content, "sha256").hexdigest()
        if got != file.sha256:
            raise DataError(f"{folder / name} is damaged: expected sha256 {file.sha256}, got {got}. {_REPAIR}")


class _NpyFolder:
    """Files of an index folder, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / EMBEDDINGS
        self._vectors = _mapped(self._path, "<f4", 2)
        self.count, self.dim = self._vectors.shape
        self._labels = _mapped(folder / LABELS, "<i8", 1)
        self._offsets = _mapped(folder / OFFSETS, "<i8", 1)
        self._rows = folder / ROWS
        self._rows_bytes = self._rows.stat().st_size
        for name, array, length in ((LABELS, self._labels, self.count), (OFFSETS, self._offsets, self.count + 1)):
            if len(array) != length:
                raise DataError(f"{folder / name}: expected {length} entries, got {len(array)}. {_REPAIR}")
        if self._offsets[0] != 0 or self._offsets[-1] != self._rows_bytes:
            raise DataError(f"{folder / OFFSETS} does not fit {ROWS} of {self._rows_bytes} bytes. {_REPAIR}")

    def embeddings(self, start: int, stop: int) -> NDArray[np.float32]:
        part: NDArray[np.float32] = self._vectors[start:stop]
        return part

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        # Pages of a mapping would stay in memory after they were read.
        place = self._vectors.offset + 4 * self.dim * start
        rows = np.fromfile(self._path, "<f4", (stop - start) * self.dim, offset=place)
        if rows.size != (stop - start) * self.dim:
            raise DataError(f"{self._path} became shorter while it was read. {_REPAIR}")
        return rows.reshape(-1, self.dim)

    def labels(self) -> NDArray[np.int64]:
        return self._labels

    def row(self, index: int) -> StoredRow:
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        if not 0 <= start < stop <= min(self._rows_bytes, start + _MAX_LINE):
            raise DataError(f"{self._rows}: row {index} cannot lie at bytes {start} to {stop}. {_REPAIR}")
        with self._rows.open("rb") as file:
            file.seek(start)
            line = file.read(stop - start)
        try:
            record = json.loads(line)
            row = StoredRow(**record)
        except (ValueError, TypeError, RecursionError):
            row = None
        kinds = [str, str, int, str]
        if row is None or [type(value) for value in row] != kinds or row.label != self._labels[index]:
            raise DataError(f"{self._rows}: row {index} is damaged: got {line[:80]!r}. {_REPAIR}")
        return row


def _mapped(path: Path, dtype: str, dimensions: int) -> "np.memmap[Any, Any]":
    """An array of a file, mapped; changes would stay in memory."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # numpy evaluates the header, and raises what its parts please
        raise DataError(f"{path} is no array that can be mapped ({error}). {_REPAIR}") from None
    if not isinstance(array, np.memmap) or array.dtype != np.dtype(dtype) or array.ndim != dimensions:
        found = f"{getattr(array, 'dtype', type(array).__name__)} of shape {getattr(array, 'shape', None)}"
        raise DataError(f"{path}: expected {dtype} in {dimensions} dimensions, got {found}. {_REPAIR}")
    if 0 in array.shape or not array.flags.c_contiguous:
        raise DataError(f"{path}: expected rows one after another, at least one, got {array.shape}. {_REPAIR}")
    return array


class _NpzFile:
    """The query part of a file of `gcahng.training.saved_embeddings`; it is read whole."""

    def __init__(self, path: Path) -> None:
        arrays = _npz_arrays(path)
        self._vectors, self._labels = arrays["embeddings"], arrays["labels"]
        self._keys, self._shards = arrays["keys"], arrays["shards"]
        self.count, self.dim = self._vectors.shape
        for name in ("labels", "keys", "shards"):
            if len(arrays[name]) != self.count:
                raise DataError(f"{path}: `{name}` must have {self.count} entries, got {len(arrays[name])}. {_REPAIR}")
        if len(arrays["class_ids"]) != len(arrays["class_names"]):
            raise DataError(f"{path}: `class_ids` and `class_names` must be equally many. {_REPAIR}")
        self._names = dict(zip(arrays["class_ids"].tolist(), arrays["class_names"].tolist(), strict=True))

    def embeddings(self, start: int, stop: int) -> NDArray[np.float32]:
        part: NDArray[np.float32] = self._vectors[start:stop]
        return part

    read = embeddings

    def labels(self) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self._labels
        return labels

    def row(self, index: int) -> StoredRow:
        label = int(self._labels[index])
        return StoredRow(str(self._keys[index]), str(self._shards[index]), label, self._names.get(label, str(label)))


# Kind of numpy's dtype, number of dimensions.
_NPZ_ARRAYS = {
    "embeddings": ("f", 2),
    "labels": ("i", 1),
    "keys": ("U", 1),
    "shards": ("U", 1),
    "class_ids": ("i", 1),
    "class_names": ("U", 1),
}


def _npz_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays, none of which takes more memory than the file has bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise DataError(f"{path} is compressed ({packed[0]!r:.60}): expected np.savez, not savez_compressed.")
        with np.load(path, allow_pickle=False) as saved:
            absent = [name for name in _NPZ_ARRAYS if name not in saved]
            if absent:
                raise DataError(f"{path} lacks {', '.join(absent)}: expected what --save-embeddings writes. {_REPAIR}")
            arrays = {name: saved[name] for name in _NPZ_ARRAYS}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read ({error}). {_REPAIR}") from None
    for name, (kind, dimensions) in _NPZ_ARRAYS.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray):
            raise DataError(f"{path}: `{name}` is no array. {_REPAIR}")
        if array.dtype.kind != kind or array.ndim != dimensions or 0 in array.shape:
            raise DataError(
                f"{path}: `{name}` must have kind {kind!r} and {dimensions} dimensions, not empty, got {array.dtype} "
                f"of shape {array.shape}. {_REPAIR}"
            )
    arrays["embeddings"] = np.ascontiguousarray(arrays["embeddings"], dtype=np.float32)
    arrays["labels"] = arrays["labels"].astype(np.int64)
    return arrays


class _ParquetFile:
    """A parquet file with the columns of an index; one row group is in memory at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        pyarrow, parquet = load_parquet()
        self._error = pyarrow.ArrowException
        try:
            self._file = parquet.ParquetFile(path)
            schema = self._file.schema_arrow
            sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} is no readable parquet file ({error!s:.200}). {_REPAIR}") from None
        wanted = {"key": pyarrow.string(), "shard": pyarrow.string(), "label": pyarrow.int64()}
        wanted["class_name"] = pyarrow.string()
        got = {name: schema.field(name).type for name in schema.names}
        vector = got.pop("embedding", None)
        if got != wanted or not isinstance(vector, pyarrow.FixedSizeListType) or vector.value_type != pyarrow.float32():
            raise DataError(
                f"{path}: expected columns key, shard, class_name (string), label (int64) and embedding (fixed-size "
                f"list of float32), got {str(schema)[:300]!r}. {_REPAIR}"
            )
        self.dim = int(vector.list_size)
        self._ends = np.cumsum(np.array(sizes, dtype=np.int64))
        self.count = int(self._ends[-1]) if sizes else 0
        if self.count < 1 or self.dim < 1 or 4 * self.dim * max(sizes) > _MAX_GROUP_BYTES or min(sizes) < 1:
            raise DataError(f"{path}: row groups of {sizes[:5]} rows x {self.dim} cannot be read. {_REPAIR}")
        self._group = lru_cache(1)(self._read_group)
        self._rows = lru_cache(4)(self._read_rows)

    def embeddings(self, start: int, stop: int) -> NDArray[np.float32]:
        found = np.empty((stop - start, self.dim), dtype=np.float32)
        at = start
        while at < stop:
            group, inside = self._locate(at)
            held = self._group(group)[inside : inside + stop - at]
            found[at - start : at - start + len(held)] = held
            at += len(held)
        return found

    read = embeddings

    def labels(self) -> NDArray[np.int64]:
        read = self._read
        columns = [read(group, ["label"])["label"].to_numpy() for group in range(len(self._ends))]
        return np.concatenate(columns).astype(np.int64)

    def row(self, index: int) -> StoredRow:
        group, inside = self._locate(index)
        key, shard, label, name = (column[inside] for column in self._rows(group))
        return StoredRow(key, shard, label, name)

    def _locate(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def _read(self, group: int, columns: list[str]) -> Any:
        """Columns of a row group."""
        try:
            table = self._file.read_row_group(group, columns=columns)
            table.validate(full=True)  # texts that are none, offsets that lead elsewhere
        except (OSError, ValueError, self._error) as error:
            raise DataError(f"{self._path}: row group {group} is damaged ({error!s:.200}). {_REPAIR}") from None
        size = int(self._ends[group] - (self._ends[group - 1] if group else 0))
        if table.num_rows != size or any(table[name].null_count for name in columns):
            raise DataError(f"{self._path}: row group {group} has empty entries, or fewer than {size}. {_REPAIR}")
        return table

    def _read_group(self, group: int) -> NDArray[np.float32]:
        column = self._read(group, ["embedding"])["embedding"].combine_chunks()
        flat = column.flatten()
        values = flat.to_numpy(zero_copy_only=False)
        if flat.null_count or len(values) != len(column) * self.dim:
            raise DataError(f"{self._path}: row group {group} has embeddings with gaps. {_REPAIR}")
        vectors: NDArray[np.float32] = values.reshape(len(column), self.dim)
        return vectors

    def _read_rows(self, group: int) -> list[list[Any]]:
        names = ["key", "shard", "label", "class_name"]
        table = self._read(group, names)
        return [table[name].to_pylist() for name in names]
