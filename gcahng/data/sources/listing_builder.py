"""Builds a listing row by row: which files are there, and what all images of a class share."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gcahng.data.sources.source import Fault, Listing, Published, SourceItem


class FolderFiles:
    """Which files a folder has. Every subfolder is listed once, which is far cheaper than to ask for each file.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[str, frozenset[str]] = {}
        self._unreadable: dict[str, str] = {}  # subfolder -> why, other than that it is missing

    def __contains__(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in self.names(folder)

    def names(self, folder: str) -> frozenset[str]:
        """Names in a subfolder ("" for the root); none where it is missing or cannot be read."""
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(self.root / folder))
            except OSError as error:
                self._names[folder] = frozenset()
                if not isinstance(error, FileNotFoundError):
                    self._unreadable[folder] = error.strerror or str(error)
        return self._names[folder]

    def why_missing(self, path: str) -> str | None:
        """What is wrong with the folder of a path that is not in here, as a sentence; None if nothing is."""
        folder = path.rpartition("/")[0]
        reason = self._unreadable.get(folder)
        return reason and f"the folder {self.root / folder} cannot be read ({reason}). Check its permissions."


class ListingBuilder:
    """Collects images with their class and split.

    Args:
        files: Where the images are; an image that is not there becomes a fault.
        missing: What to do about a missing file, as a sentence.
    """

    def __init__(self, files: FolderFiles, missing: str) -> None:
        self.files = files
        self.missing = missing
        self.items: list[SourceItem] = []
        self.faults: list[Fault] = []
        self._class_columns: list[Mapping[str, str]] = []  # one per item

    def add(
        self,
        class_name: str,
        split: str,
        source: str,
        *,
        path: str | None = None,
        columns: Mapping[str, str] | None = None,
        class_columns: Mapping[str, str] | None = None,
    ) -> None:
        """Add one image, or a fault.

        Args:
            class_name: Its class.
            split: Its split.
            source: Its name in the data set, unique.
            path: Its path below the folder of `files`; by default `source`.
            columns: What is known of the image.
            class_columns: What is known of its class, as far as this image tells. Where the images of a class
                differ in it, each keeps its own.
        """
        place = source if path is None else path
        if place not in self.files:
            reason = self.files.why_missing(place) or f"there is no such file. {self.missing}"
            self.faults.append(Fault(source, reason))
            return
        self.items.append(SourceItem(class_name, split, source, columns or {}))
        self._class_columns.append(class_columns or {})

    def listing(self, published: Published | None = None, extra: dict[str, Any] | None = None) -> Listing:
        """All that was added."""
        shared: dict[str, Mapping[str, str]] = {}
        varying: set[str] = set()
        for item, values in zip(self.items, self._class_columns, strict=True):
            if shared.setdefault(item.class_name, values) != values:
                varying.add(item.class_name)
        items = [
            replace(item, columns={**values, **item.columns}) if item.class_name in varying else item
            for item, values in zip(self.items, self._class_columns, strict=True)
        ]
        class_columns = {name: values for name, values in shared.items() if values and name not in varying}
        return Listing(items, self.faults, extra or {}, class_columns, published)
