"""Source `cub`: CUB-200-2011, split by class."""

from pathlib import Path

from gcahng.data.sources.layout import Layout, RowFaults, find_root, leads_out, read_table, relative_path
from gcahng.data.sources.listing_builder import FolderFiles, ListingBuilder
from gcahng.data.sources.read_file import read_file
from gcahng.data.sources.source import TEST, TRAIN, Listing, Published, SourceItem

LAYOUT = Layout(
    "CUB-200-2011",
    "data.caltech.edu: CUB_200_2011.tgz",
    """\
  CUB_200_2011/images.txt               image id, path below images/
  CUB_200_2011/image_class_labels.txt   image id, class id
  CUB_200_2011/classes.txt              class id, class name
  CUB_200_2011/images/<class>/*.jpg""",
)
PUBLISHED = Published("CUB-200-2011", {TRAIN: (100, 5864), TEST: (100, 5924)})
_NUM_CLASSES = 200
_LAST_TRAINING_CLASS = 100
_REPAIR = "Unpack CUB_200_2011.tgz again."


class Cub:
    """CUB-200-2011: classes 1 to 100 are for training, 101 to 200 for testing.

    The file train_test_split.txt is not read: it puts images of every class on both sides, which is a protocol for
    classification, not for retrieval of unseen classes.

    Args:
        directory: The folder CUB_200_2011 or the one that holds it.
        seed: Without effect here: the split is the authors'.
    """

    name = "cub"

    def __init__(self, directory: Path | str, *, seed: int = 0) -> None:
        self.root = find_root(directory, ("CUB_200_2011",), "images.txt")

    def listing(self) -> Listing:
        """All images with their class and split.

        Raises:
            DataError: Files are missing or damaged.
        """
        LAYOUT.require(self.root, "images.txt", "image_class_labels.txt", "classes.txt", "images")
        class_names = self._class_names()
        class_ids = self._class_ids(class_names)
        path = self.root / "images.txt"
        builder = ListingBuilder(FolderFiles(self.root), _REPAIR)
        faults = RowFaults(path, _REPAIR)
        for line, (image_id, text) in read_table(path, ("image_id", "path")):
            image = relative_path(text)
            if image is None:
                faults.add(line, leads_out(text))
            elif image_id not in class_ids:
                faults.add(line, f"image {image_id} has no class in image_class_labels.txt, or comes twice")
            else:
                class_id = class_ids.pop(image_id)
                split = TRAIN if class_id <= _LAST_TRAINING_CLASS else TEST
                builder.add(class_names[class_id], split, f"images/{image}")
        for image_id in class_ids:
            faults.add(None, f"image {image_id} of image_class_labels.txt is missing")
        faults.stop()
        return builder.listing(PUBLISHED)

    def load(self, item: SourceItem) -> bytes:
        """The bytes of the file."""
        return read_file(self.root / item.source)

    def _class_names(self) -> dict[int, str]:
        path = self.root / "classes.txt"
        names: dict[int, str] = {}
        faults = RowFaults(path, _REPAIR)
        for line, (text, name) in read_table(path, ("class_id", "class_name")):
            class_id = _class_number(text)
            if class_id is None:
                faults.add(line, f"expected a class id from 1 to {_NUM_CLASSES}, got {text[:20]!r}")
            elif class_id in names or name in names.values():
                faults.add(line, f"class {class_id} {name} comes twice")
            else:
                names[class_id] = name
        faults.stop()
        return names

    def _class_ids(self, class_names: dict[int, str]) -> dict[str, int]:
        path = self.root / "image_class_labels.txt"
        ids: dict[str, int] = {}
        faults = RowFaults(path, _REPAIR)
        for line, (image_id, text) in read_table(path, ("image_id", "class_id")):
            class_id = _class_number(text)
            if class_id not in class_names:
                faults.add(line, f"class {text[:20]!r} is not in classes.txt")
            elif image_id in ids:
                faults.add(line, f"image {image_id} comes twice")
            else:
                assert class_id is not None
                ids[image_id] = class_id
        faults.stop()
        return ids


def _class_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and 1 <= int(text) <= _NUM_CLASSES else None
