"""A data set's files as its authors distribute them: where they are, and reading their tables."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from gcahng.errors import DataError

_SHOWN = 5  # bad lines that a message lists
_SHOWN_ENTRIES = 8  # of a folder that is not what was expected


@dataclass(frozen=True)
class Layout:
    """What a data set's archive holds.

    Attributes:
        name: The data set, as its authors call it.
        origin: Who distributes it, and which archives to unpack.
        tree: The files that are read, one per line.
    """

    name: str
    origin: str
    tree: str

    def describe(self) -> str:
        """For error messages and for the help of the command line."""
        return f"{self.name} ({self.origin}):\n{self.tree}"

    def require(self, root: Path, *names: str) -> None:
        """Stop unless these files and folders exist.

        Raises:
            DataError: One is missing.
        """
        missing = [name for name in names if not os.path.exists(root / name)]
        if missing:
            raise DataError(
                f"Source folder {root} is not {self.name} as distributed: expected {', '.join(names)}, "
                f"{', '.join(missing)} missing; found {_entries(root)}. Give as --source the folder with the "
                f"files of {self.describe()}"
            )


def find_root(directory: Path | str, subfolders: Sequence[str], marker: str) -> Path:
    """The first of `directory` and these of its folders that holds the file `marker`.

    Where none does, the first of the subfolders that exists: what it lacks is what a message has to say. Or else
    `directory`.
    """
    directory = Path(directory)
    below = [directory / name for name in subfolders]
    for folder in (directory, *below):
        if os.path.exists(folder / marker):
            return folder
    return next((folder for folder in below if os.path.isdir(folder)), directory)


class RowFaults:
    """Collects the bad lines of a table, so that one message names the first few of them.

    Args:
        path: The table.
        repair: What to do about it, as a sentence.
    """

    def __init__(self, path: Path, repair: str) -> None:
        self.path = path
        self.repair = repair
        self._first: list[str] = []
        self._count = 0

    def add(self, line: int | None, reason: str) -> None:
        """Note a bad line, or with None something that has no line."""
        self._count += 1
        if len(self._first) < _SHOWN:
            self._first.append(reason if line is None else f"line {line}: {reason}")

    def stop(self) -> None:
        """Raise if a line was bad.

        Raises:
            DataError: Names the first bad lines and how many there are.
        """
        if self._count:
            more = f"; and {self._count - len(self._first)} more" if self._count > len(self._first) else ""
            lines = "line" if self._count == 1 else "lines"
            raise DataError(f"{self.path}: {self._count} bad {lines}: {'; '.join(self._first)}{more}. {self.repair}")


def read_lines(path: Path) -> list[str]:
    """Lines of a text file in UTF-8, with or without byte order mark, without empty ones at the end.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}). Check the file and its permissions."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Unpack it again.") from None
    return text.rstrip().split("\n")


def read_table(path: Path, columns: Sequence[str], header_line: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Rows of a table whose fields are separated by blanks; the last field may hold blanks.

    Args:
        path: The table.
        columns: Their names.
        header_line: Which line holds these names, counted from 1; 0 for a table without header. Lines above it are
            left to the caller.

    Yields:
        Line number, counted from 1, and as many fields as there are columns.

    Raises:
        DataError: The header is another, or lines have fewer fields.
    """
    lines = read_lines(path)
    if header_line:
        found = lines[header_line - 1].split() if len(lines) >= header_line else []
        if found != list(columns):
            raise DataError(
                f"{path}, line {header_line}: expected the header {' '.join(columns)!r}, got "
                f"{' '.join(found)[:100]!r}. Unpack the file again, or check that it is the distributed one."
            )
    faults = RowFaults(path, "Unpack the file again.")
    rows: list[tuple[int, list[str]]] = []
    for line, text in enumerate(lines[header_line:], start=header_line + 1):
        fields = text.strip().split(maxsplit=len(columns) - 1)
        if len(fields) == len(columns):
            rows.append((line, fields))
        else:
            faults.add(line, f"expected {len(columns)} fields ({' '.join(columns)}), got {text.strip()[:80]!r}")
    faults.stop()
    yield from rows


def relative_path(text: str) -> str | None:
    """A path of an annotation file in its plain form, or None where it leads out of the folder it belongs to."""
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in text:
        return None
    return str(path)


def leads_out(text: str) -> str:
    """The reason to give where `relative_path` is None."""
    return f"the path {text[:80]!r} leads out of the data set's folder"


def _entries(folder: Path) -> str:
    try:
        names = sorted(path.name + "/" * path.is_dir() for path in islice(folder.iterdir(), 1000))
    except NotADirectoryError:
        return "a file instead of a folder"
    except FileNotFoundError:
        return "no such folder"
    except OSError as error:
        return f"a folder that cannot be read ({error.strerror})"
    if not names:
        return "an empty folder"
    return ", ".join(names[:_SHOWN_ENTRIES]) + (", ..." if len(names) > _SHOWN_ENTRIES else "")
