"""Source `folder`: one folder per class, with or without train/, test/, query/, gallery/ above."""

import os
from pathlib import Path
from typing import NamedTuple

from gcahng.data.sources.read_file import read_file
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


class _Entries(NamedTuple):
    """What a folder holds: names of folders and of images, and how many other files."""

    folders: list[str]
    images: list[str]
    others: int


class Folder:
    """Images as `DIR/<split>/<class>/*` or `DIR/<class>/*`.

    With train/ and test/ inside of `directory` these are the splits; query/ and gallery/, which
    may share classes, can take the place of test/ or stand beside it. Otherwise the folders are
    classes, and the seed puts a share of the classes into test. Files with other extensions are
    ignored and counted. Faults are class folders without images, folders inside of a class folder and images
    outside of one; folders whose name begins with a dot are passed over.

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
            DataError: A folder is missing, cannot be read or has no class folders, or there are only some of the
                splits that go together.
        """
        top = self._entries(".").folders
        if {TRAIN, TEST} & set(top) or {QUERY, GALLERY} <= set(top):
            return self._given_splits(top)
        if not top:
            raise DataError(
                f"Source folder {self.directory}: expected one folder per class, or train/ and "
                "test/ with one folder per class in each, got no folders."
            )
        splits = class_disjoint_split(top, self.seed, self.test_share)
        return self._collect([(name, splits[name], name) for name in top], ["."])

    def load(self, item: SourceItem) -> bytes:
        """The bytes of the file."""
        return read_file(self.directory / item.source)

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
        given = [split for split in SPLITS if split in found]
        classes = [(name, split, f"{split}/{name}") for split in given for name in self._entries(split).folders]
        return self._collect(classes, [".", *given])

    def _collect(self, classes: list[tuple[str, str, str]], above: list[str]) -> Listing:
        """List the images of the classes (name, split, folder); `above` are the folders that hold these."""
        items, faults, ignored = [], [], 0
        for folder in above:
            for name in self._entries(folder).images:
                faults.append(Fault(_join(folder, name), "the image is in no class folder. Move it into one."))
        for class_name, split, path in classes:
            entries = self._entries(path)
            items += [SourceItem(class_name, split, f"{path}/{name}") for name in entries.images]
            ignored += entries.others
            if not entries.images:
                reason = f"the class folder has no {', '.join(EXTENSIONS)} files. Fill or remove it."
                faults.append(Fault(path, reason))
            elif entries.folders:
                reason = "a class folder cannot hold folders. Move its images up, or the folder away."
                faults += [Fault(f"{path}/{name}", reason) for name in entries.folders]
        return Listing(items, faults, {"ignored_files": ignored})

    def _entries(self, path: str) -> _Entries:
        """What a folder below `directory` holds."""
        folder = self.directory / path
        try:
            with os.scandir(folder) as entries:
                found = sorted((e.name, e.is_dir()) for e in entries)
        except OSError as error:
            raise DataError(
                f"Source folder {folder} cannot be read ({error.strerror}). Give the folder of the classes as "
                "--source, and check permissions."
            ) from None
        folders = [name for name, is_folder in found if is_folder and not name.startswith(".")]
        files = [name for name, is_folder in found if not is_folder]
        images = [name for name in files if name.lower().endswith(EXTENSIONS)]
        return _Entries(folders, images, len(files) - len(images))


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"
