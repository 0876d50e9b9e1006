"""Source `csv`: a table of images with their class and split."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gcahng.data.sources.layout import RowFaults
from gcahng.data.sources.listing_builder import FolderFiles, ListingBuilder
from gcahng.data.sources.read_file import read_file
from gcahng.data.sources.source import GALLERY, QUERY, TEST, TRAIN, Listing, SourceItem
from gcahng.errors import DataError, InputError

SPLITS = (TRAIN, TEST, QUERY, GALLERY)
# What a column can be called where --column does not say it; the first name that the header has counts. The second
# names are those of open-metric-learning's tables.
USUAL_NAMES = {
    "path": ("path",),
    "class": ("class", "label"),
    "split": ("split",),
    "query": ("query", "is_query"),
    "gallery": ("gallery", "is_gallery"),
}
FORMAT = """\
A csv file in UTF-8 with a header, one image per line. Columns:
  path            relative to --images, or absolute and inside of it; what leads out of it is
                  refused (--images / takes images from anywhere)
  class           or label: the class by name
  split           train, test, query or gallery; other values with --split VALUE=test
  query, gallery  or is_query, is_gallery; may be missing: true, false, 1, 0 or empty. Of the
                  split test, an image marked as query alone goes to the split query, as gallery
                  alone to gallery, as both or not at all to test
All further columns with a name are kept, image by image, where they are not empty."""
_REQUIRED = ("path", "class", "split")
_MARKS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": None}
_REPAIR = "Correct these lines."


@dataclass(frozen=True)
class _Columns:
    """Positions in a row."""

    role: Mapping[str, int]
    further: Mapping[str, int]
    count: int


class CsvFile:
    """Images listed in a csv file, as `FORMAT` says.

    Args:
        path: The csv file.
        seed: Without effect here: the file says the split.
        images: The folder that all images are in; by default that of the csv file.
        delimiter: Between fields.
        columns: Role (path, class, split, query, gallery) -> name of its column.
        splits: Value in the file -> split, for files with other names, for example {"validation": "test"}.
    """

    name = "csv"

    def __init__(
        self,
        path: Path | str,
        *,
        seed: int = 0,
        images: Path | str | None = None,
        delimiter: str = ",",
        columns: Mapping[str, str] | None = None,
        splits: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.images = Path(os.path.abspath(self.path.parent if images is None else images))
        self.delimiter = delimiter
        self.columns = dict(columns or {})
        self.splits = {**{name: name for name in SPLITS}, **(splits or {})}
        if len(delimiter) != 1:
            raise InputError(f"`delimiter` must be one character, got {delimiter!r}.")
        for role in self.columns:
            if role not in USUAL_NAMES:
                raise InputError(f"`columns` must name {', '.join(USUAL_NAMES)}, got {role!r}.")
        for split in self.splits.values():
            if split not in SPLITS:
                raise InputError(f"`splits` must lead to {', '.join(SPLITS)}, got {split!r}.")

    def listing(self) -> Listing:
        """All images with their class and split.

        Raises:
            DataError: The file cannot be read, lacks a column or has bad lines.
        """
        rows = self._rows()
        columns = self._find_columns(next(rows, (1, []))[1])
        builder = ListingBuilder(FolderFiles(self.images), "Check the path and --images.")
        faults = RowFaults(self.path, _REPAIR)
        for line, row in rows:
            item = self._item(row, columns)
            if isinstance(item, str):
                faults.add(line, item)
            else:
                builder.add(item.class_name, item.split, item.source, columns=item.columns)
        faults.stop()
        return builder.listing()

    def load(self, item: SourceItem) -> bytes:
        """The bytes of the file."""
        return read_file(self.images / item.source)

    def _item(self, row: Sequence[str], columns: _Columns) -> SourceItem | str:
        """The image of a line, or what is wrong with the line."""
        if len(row) != columns.count:
            return f"expected {columns.count} fields, got {len(row)}"
        fields = {role: row[i].strip() for role, i in columns.role.items()}
        for role in ("path", "class"):
            if not fields[role]:
                return f"the {role} is empty"
        image = self._relative(fields["path"])
        if image is None:
            return f"{fields['path'][:80]!r} is not inside of {self.images} (see --images)"
        split = self.splits.get(fields["split"])
        if split is None:
            known = ", ".join(self.splits)
            return f"expected the split {known}, got {fields['split'][:40]!r} (see --split)"
        query, gallery = fields.get("query", ""), fields.get("gallery", "")
        marked = _marked_split(split, query, gallery)
        if marked is None:
            return f"split {split} does not go with query {query[:20]!r} and gallery {gallery[:20]!r}"
        further = {name: row[i] for name, i in columns.further.items() if row[i]}
        return SourceItem(fields["class"], marked, image, further)

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, delimiter=self.delimiter, strict=True)
                # Spreadsheets end their tables with lines of commas.
                yield from ((reader.line_num, row) for row in reader if any(map(str.strip, row)))
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror}). Give a csv file as --source.") from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path} is not text in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
            ) from None
        except csv.Error as error:
            raise DataError(f"{self.path}, line {reader.line_num}: {error}. Check quotes and --delimiter.") from None

    def _find_columns(self, header: Sequence[str]) -> _Columns:
        names = [name.strip() for name in header]
        twice = sorted({name for name in names if name and names.count(name) > 1})
        role: dict[str, int] = {}
        missing = []
        for part, usual in USUAL_NAMES.items():
            wanted = (self.columns[part],) if part in self.columns else usual
            found = next((name for name in wanted if name in names), None)
            if found is not None:
                role[part] = names.index(found)
            elif part in self.columns or part in _REQUIRED:
                missing.append(" or ".join(wanted))
        if missing or twice:
            got = ", ".join(names)[:200] or "an empty file"
            wrong = f"column {', '.join(missing)} is missing" if missing else f"{', '.join(twice)} comes twice"
            raise DataError(
                f"{self.path}, line 1: expected a header with path, class and split, {wrong}; got {got}. "
                "Name the columns with --column, for example --column class=label, and check --delimiter."
            )
        further = {name: i for i, name in enumerate(names) if name and i not in role.values()}
        return _Columns(role, further, len(names))

    def _relative(self, text: str) -> str | None:
        """The path below `images`, or None where it leads out. Links are not followed: data sets often are links."""
        if "\0" in text:
            return None
        path = os.path.normpath(os.path.join(self.images, text))  # strings: ten times faster than paths
        folder = os.path.join(self.images, "")
        return path.removeprefix(folder) if path.startswith(folder) else None


def _marked_split(split: str, query: str, gallery: str) -> str | None:
    """The split of a line with these marks, or None where they contradict."""
    if query.lower() not in _MARKS or gallery.lower() not in _MARKS:
        return None
    is_query, is_gallery = _MARKS[query.lower()], _MARKS[gallery.lower()]
    if split != TEST:
        # Elsewhere a mark may only repeat what the split says.
        return None if (is_query and split != QUERY) or (is_gallery and split != GALLERY) else split
    if is_query == is_gallery:
        return None if is_query is False else TEST
    return QUERY if is_query else GALLERY if is_gallery else None
