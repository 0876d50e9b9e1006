"""Source `folder`: one folder per class, with or without train/, test/, query/, gallery/ above."""

import os
from pathlib import Path

from gcahng.data.sources.source import (
    GALLERY,
    QUERY,
    TEST,
    TRAIN,
    Fault,
    Listing,
    SourceItem,
    class_disjoint_split,
)
from gcahng.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = (TRAIN, TEST, QUERY, GALLERY)


class Folder:
    """Images as `DIR/<split>/<class>/*` or `DIR/<class>/*`.

    With train/ and test/ inside of `directory` these are the splits; query/ and gallery/, which
    may share classes, can take the place of test/ or stand beside it. Otherwise the folders are
    classes, and the seed puts a share of the classes into test. Files with other extensions are
    ignored and counted.

    Args:
        directory: The folder.
        seed: Which classes go to test.
        test_share: Share of the classes that go to test, where the folders do not say it.
    """

    name = "folder"

    def __init__(self, directory: Path | str, *, seed: int = 0, test_share: float = 0.5) -> None:
        self.directory = Path(directory)
        self.seed = seed
        self.test_share = test_share

    def listing(self) -> Listing:
        """All images with their class and split.

        Raises:
            DataError: The folder is missing or has no class folders, or only some of the splits
                that go together.
        """
        try:
            top = _subfolders(self.directory)
        except OSError as error:
            raise DataError(
                f"Source folder {self.directory} cannot be read ({error.strerror}). Give the "
                "folder of the classes as --source."
            ) from None
        if {TRAIN, TEST} & set(top) or {QUERY, GALLERY} <= set(top):
            return self._given_splits(top)
        if not top:
            raise DataError(
                f"Source folder {self.directory}: expected one folder per class, or train/ and "
                "test/ with one folder per class in each, got no folders."
            )
        splits = class_disjoint_split(top, self.seed, self.test_share)
        return self._collect([(name, splits[name], name) for name in top])

    def load(self, item: SourceItem) -> bytes:
        """The bytes of the file."""
        return (self.directory / item.source).read_bytes()

    def _given_splits(self, top: list[str]) -> Listing:
        found = set(top)
        whole = TRAIN in found and (TEST in found or QUERY in found) and (QUERY in found) == (GALLERY in found)
        if not whole or found - set(SPLITS):
            raise DataError(
                f"Source folder {self.directory}: expected {TRAIN}/ with {TEST}/, or with {QUERY}/ "
                f"and {GALLERY}/, or with all three, and no other folder beside them; got "
                f"{', '.join(name + '/' for name in top)}. Move the others away, or give a folder "
                "of class folders."
            )
        return self._collect(
            [
                (name, split, f"{split}/{name}")
                for split in SPLITS
                if split in found
                for name in _subfolders(self.directory / split)
            ]
        )

    def _collect(self, classes: list[tuple[str, str, str]]) -> Listing:
        items, faults, ignored = [], [], 0
        for name, split, path in classes:
            found = 0
            for entry in sorted(os.listdir(self.directory / path)):
                if entry.lower().endswith(EXTENSIONS):
                    items.append(SourceItem(name, split, f"{path}/{entry}"))
                    found += 1
                else:
                    ignored += 1
            if not found:
                wanted = ", ".join(EXTENSIONS)
                reason = f"the class folder has no {wanted} files. Fill or remove it."
                faults.append(Fault(path, reason))
        return Listing(items, faults, {"ignored_files": ignored})


def _subfolders(directory: Path) -> list[str]:
    with os.scandir(directory) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
