"""From parts to the files of an index: part after part, so that memory does not grow with the number of images."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcahng.data.shards.disk import disk_errors, sync
from gcahng.data.tars.labels import label_ids
from gcahng.errors import ConfigError, DataError
from gcahng.search.index_info import EMBEDDINGS, LABELS, OFFSETS, PARQUET, ROWS, FileInfo
from gcahng.search.part_files import ImageRow, PartFiles
from gcahng.search.tar_parts import other_kind

Part = tuple[NDArray[np.float32], list[ImageRow]]


class Parts:
    """All parts of a finished embedding, in order.

    Args:
        files: The parts.
        num_units: Units, in order.
        class_name: Name of a numeric label.
    Raises:
        DataError: A part is missing, labels are of two kinds, or there is no image at all.
    """

    def __init__(self, files: PartFiles, num_units: int, class_name: Callable[[int], str]) -> None:
        self.dim = files.dim
        self.count = 0
        self._files = files
        self._places: list[tuple[int, int]] = []
        kind = ""
        for unit in range(num_units):
            headers = files.headers(unit)
            if not headers or not headers[-1].last:
                raise DataError(
                    f"{files.path(unit, len(headers))} is missing: expected parts up to the last one. Start the "
                    "command again: it embeds what is absent."
                )
            for part, header in enumerate(headers):
                kind = kind or header.kind
                if header.rows and header.kind != kind:
                    raise other_kind(f"Unit {unit} of the tars", header.kind, kind)
                self._places.append((unit, part))
                self.count += header.rows
        if self.count == 0:
            raise DataError("There is no image to embed. Check the path of the tars.")
        self._class_name = class_name
        self._ids = self._ids_of_names() if kind.startswith("name") else None

    def __iter__(self) -> Iterator[Part]:
        for unit, part in self._places:
            embeddings, rows = self._files.read(unit, part)
            if rows:
                yield embeddings, rows

    def label(self, row: ImageRow) -> tuple[int, str]:
        """Class id and name."""
        if self._ids is not None:
            return self._ids[str(row.label)], str(row.label)
        return int(row.label), self._class_name(int(row.label))

    def _ids_of_names(self) -> dict[str, int]:
        """Names in sorted order, as `gcahng.data.tars.labels.label_ids` numbers them."""
        found: set[str] = set()
        for _, rows in self:
            found.update(str(row.label) for row in rows)
        names = sorted(found)
        return dict(zip(names, label_ids(names)[0].tolist(), strict=True))


class _Hashed:
    """A new file, whose checksum is taken as it is written; forced to disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.bytes += len(content)

    def __enter__(self) -> "_Hashed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    @property
    def info(self) -> FileInfo:
        return FileInfo(self.bytes, self._digest.hexdigest())


def assemble_npy(parts: Parts, folder: Path) -> dict[str, FileInfo]:
    """Write embeddings.npy, labels.npy, rows.jsonl and row_offsets.npy (see `gcahng.search.index_info`).

    Raises:
        DataError: A part is damaged, or the disk is full.
    """
    with (
        disk_errors(folder),
        _Hashed(folder / EMBEDDINGS) as vectors,
        _Hashed(folder / LABELS) as labels,
        _Hashed(folder / ROWS) as lines,
        _Hashed(folder / OFFSETS) as offsets,
    ):
        vectors.write(_npy_header("<f4", (parts.count, parts.dim)))
        labels.write(_npy_header("<i8", (parts.count,)))
        offsets.write(_npy_header("<i8", (parts.count + 1,)))
        for embeddings, rows in parts:
            vectors.write(embeddings.tobytes())
            ids = [parts.label(row) for row in rows]
            labels.write(np.array([label for label, _ in ids], dtype="<i8").tobytes())
            encoded = [_line(row, *label) for row, label in zip(rows, ids, strict=True)]
            lengths = np.array([0] + [len(line) for line in encoded[:-1]], dtype="<i8")
            offsets.write((lines.bytes + np.cumsum(lengths)).astype("<i8").tobytes())
            lines.write(b"".join(encoded))
        offsets.write(np.array([lines.bytes], dtype="<i8").tobytes())
    sync(folder)
    return {file.path.name: file.info for file in (vectors, labels, lines, offsets)}


def assemble_parquet(parts: Parts, folder: Path) -> dict[str, FileInfo]:
    """Write embeddings.parquet, one row group per part.

    Raises:
        ConfigError: pyarrow is missing.
        DataError: A part is damaged, or the disk is full.
    """
    pyarrow, parquet = load_parquet()
    columns = [("key", pyarrow.string()), ("shard", pyarrow.string()), ("label", pyarrow.int64())]
    columns += [("class_name", pyarrow.string()), ("embedding", pyarrow.list_(pyarrow.float32(), parts.dim))]
    schema = pyarrow.schema([pyarrow.field(name, kind, nullable=False) for name, kind in columns])
    path = folder / PARQUET
    with disk_errors(folder):
        with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=["shard", "class_name"]) as writer:
            for embeddings, rows in parts:
                ids = [parts.label(row) for row in rows]
                values = pyarrow.array(embeddings.reshape(-1), pyarrow.float32())
                held = [[row.key for row in rows], [row.shard for row in rows], [label for label, _ in ids]]
                arrays = [pyarrow.array(column, schema.field(i).type) for i, column in enumerate(held)]
                arrays.append(pyarrow.array([name for _, name in ids], pyarrow.string()))
                arrays.append(pyarrow.FixedSizeListArray.from_arrays(values, parts.dim))
                writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), row_group_size=len(rows))
        sync(path)
        sync(folder)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {PARQUET: FileInfo(path.stat().st_size, digest)}


def load_parquet() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet.

    Raises:
        ConfigError: They are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet needs pyarrow, which is not installed. Install it with: pip install 'gcahng[search]', or use "
            "--format npy."
        ) from error
    return pyarrow, pyarrow.parquet


ASSEMBLE: dict[str, Callable[[Parts, Path], dict[str, FileInfo]]] = {"npy": assemble_npy, "parquet": assemble_parquet}


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _line(row: ImageRow, label: int, class_name: str) -> bytes:
    record = {"key": row.key, "shard": row.shard, "label": label, "class_name": class_name}
    return json.dumps(record).encode() + b"\n"
