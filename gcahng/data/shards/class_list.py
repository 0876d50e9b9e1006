"""`classes.jsonl`: one JSON line per class, line i being class id i.

A million classes as Python objects would take hundreds of megabytes in every process, so the file
is mapped into memory, which all processes share, and a class is read when it is asked for.
"""

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from gcahng.data.shards.manifest import ClassesFile
from gcahng.errors import DataError

CLASSES_NAME = "classes.jsonl"
_MARK_EVERY = 16  # lines; one remembered offset for so many
_BLOCK = 1 << 22
_REPAIR = "Restore the file or convert the data set again."
_FIELDS = {"name": str, "split": str, "num_samples": int, "columns": dict}


@dataclass(frozen=True)
class ClassInfo:
    """One class.

    Attributes:
        class_id: Line in the file, from 0; classes of the split "train" come first.
        name: Name given by the source, unique in the folder.
        split: The split of its first sample. "train" shares no class with another split, unless the data
            set's protocol tests on training classes; a query and a gallery split may share classes.
        num_samples: Samples over all shards.
        columns: What else the source knows of the class, such as its super class.
    """

    class_id: int
    name: str
    split: str
    num_samples: int
    columns: Mapping[str, str] = field(default_factory=dict)


def encode_classes(classes: Iterable[ClassInfo]) -> bytes:
    """The bytes of `classes.jsonl`.

    Args:
        classes: All classes, `class_id` counting from 0.
    """
    lines = []
    for number, info in enumerate(classes):
        assert info.class_id == number, "class ids count lines"
        row = {"name": info.name, "split": info.split, "num_samples": info.num_samples, "columns": dict(info.columns)}
        lines.append(json.dumps(row).encode() + b"\n")
    return b"".join(lines)


class ClassList(Sequence[ClassInfo]):
    """All classes by class id, read from the mapped file one by one.

    Pickles as its path: another process maps the file anew.

    Args:
        path: `classes.jsonl`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._content: mmap.mmap | bytes | None = None
        self._marks: NDArray[np.int64] = np.empty(0, np.int64)
        self._count = 0

    def __len__(self) -> int:
        self._map()
        return self._count

    @overload
    def __getitem__(self, index: int) -> ClassInfo: ...

    @overload
    def __getitem__(self, index: slice) -> list[ClassInfo]: ...

    def __getitem__(self, index: int | slice) -> ClassInfo | list[ClassInfo]:
        """The class of an id, or those of several.

        Raises:
            IndexError: There is no such class.
            DataError: Its line is damaged.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= number < len(self):
            raise IndexError(f"class id {index} of {len(self)} classes in {self.path}")
        content = self._map()
        start = int(self._marks[number // _MARK_EVERY])
        for _ in range(number % _MARK_EVERY):
            start = content.find(b"\n", start) + 1
        end = content.find(b"\n", start)
        return self._decode(number, content[start : end if end >= 0 else len(content)])

    def __iter__(self) -> Iterator[ClassInfo]:
        content, start = self._map(), 0
        for number in range(len(self)):
            end = content.find(b"\n", start)
            end = end if end >= 0 else len(content)
            yield self._decode(number, content[start:end])
            start = end + 1

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def _decode(self, number: int, line: bytes) -> ClassInfo:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or {name: type(value) for name, value in row.items()} != _FIELDS:
            raise DataError(
                f"{self.path}: line {number + 1} is damaged: expected {{name, split, num_samples, columns}}, "
                f"got {line[:80]!r}. {_REPAIR}"
            )
        return ClassInfo(number, **row)

    def _map(self) -> mmap.mmap | bytes:
        content = self._content
        if content is not None:
            return content
        try:
            with self.path.open("rb") as file:
                empty = not file.seek(0, 2)
                content = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise _unreadable(self.path, error) from None
        self._count, self._marks = _scan_lines(content)
        self._content = content
        return content


def load_classes(path: Path, file: ClassesFile) -> ClassList:
    """Map and check the list of classes.

    Raises:
        DataError: The file is missing or differs from what the manifest says.
    """
    try:
        with path.open("rb") as content:
            got = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None
    if got != file.sha256:
        raise DataError(f"{path} differs from the manifest: expected sha256 {file.sha256}, got {got}. {_REPAIR}")
    classes = ClassList(path)
    if len(classes) != file.count:
        raise DataError(
            f"{path} differs from the manifest: expected {file.count} classes, got {len(classes)} lines. {_REPAIR}"
        )
    return classes


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}). {_REPAIR}")


def _scan_lines(content: mmap.mmap | bytes) -> tuple[int, NDArray[np.int64]]:
    """Number of lines, and the offsets of lines 0, _MARK_EVERY, 2 * _MARK_EVERY and so on."""
    count, marks = 0, [np.zeros(1, np.int64)]
    for start in range(0, len(content), _BLOCK):
        block = np.frombuffer(content[start : start + _BLOCK], np.uint8)
        ends = np.flatnonzero(block == ord("\n"))
        # The line after end number e has number e + 1; keep those that are multiples.
        marks.append(ends[(-count - 1) % _MARK_EVERY :: _MARK_EVERY] + start + 1)
        count += ends.size
    unended = len(content) > 0 and content[-1:] != b"\n"
    return count + unended, np.concatenate(marks)
