"""Source `sop`: Stanford Online Products."""

from pathlib import Path

from gcahng.data.sources.layout import Layout, RowFaults, find_root, leads_out, read_table, relative_path
from gcahng.data.sources.listing_builder import FolderFiles, ListingBuilder
from gcahng.data.sources.read_file import read_file
from gcahng.data.sources.source import TEST, TRAIN, Listing, Published, SourceItem

LAYOUT = Layout(
    "Stanford Online Products",
    "cvgl.stanford.edu/projects/lifted_struct: Stanford_Online_Products.zip",
    """\
  Stanford_Online_Products/Ebay_train.txt   image_id class_id super_class_id path
  Stanford_Online_Products/Ebay_test.txt
  Stanford_Online_Products/<super class>_final/*.JPG""",
)
PUBLISHED = Published("Stanford Online Products", {TRAIN: (11318, 59551), TEST: (11316, 60502)})
_FILES = {TRAIN: "Ebay_train.txt", TEST: "Ebay_test.txt"}
_COLUMNS = ("image_id", "class_id", "super_class_id", "path")
_REPAIR = "Unpack Stanford_Online_Products.zip again."


class StanfordOnlineProducts:
    """Stanford Online Products, split as its two lists say.

    A class is named by its class_id. Its columns are super_class_id and super_class, the folder of its images
    without "_final", for example "bicycle".

    Args:
        directory: The folder Stanford_Online_Products or the one that holds it.
        seed: Without effect here: the split is the authors'.
    """

    name = "sop"

    def __init__(self, directory: Path | str, *, seed: int = 0) -> None:
        self.root = find_root(directory, ("Stanford_Online_Products",), _FILES[TRAIN])

    def listing(self) -> Listing:
        """All images with their class and split.

        Raises:
            DataError: Files are missing or damaged.
        """
        LAYOUT.require(self.root, *_FILES.values())
        builder = ListingBuilder(FolderFiles(self.root), _REPAIR)
        for split, name in _FILES.items():
            self._read(builder, split, self.root / name)
        return builder.listing(PUBLISHED)

    def load(self, item: SourceItem) -> bytes:
        """The bytes of the file."""
        return read_file(self.root / item.source)

    def _read(self, builder: ListingBuilder, split: str, path: Path) -> None:
        faults = RowFaults(path, _REPAIR)
        for line, (_, class_id, super_class_id, text) in read_table(path, _COLUMNS, header_line=1):
            image = relative_path(text)
            if image is None:
                faults.add(line, leads_out(text))
                continue
            folder, _, _ = image.partition("/")
            super_class = {"super_class_id": super_class_id, "super_class": folder.removesuffix("_final")}
            builder.add(class_id, split, image, class_columns=super_class)
        faults.stop()
