"""Source `inshop`: In-Shop Clothes Retrieval, with its query and gallery images."""

import os
from pathlib import Path

from gcahng.data.sources.layout import Layout, RowFaults, find_root, leads_out, read_lines, read_table, relative_path
from gcahng.data.sources.listing_builder import FolderFiles, ListingBuilder
from gcahng.data.sources.read_file import read_file
from gcahng.data.sources.source import GALLERY, QUERY, TRAIN, Listing, Published, SourceItem
from gcahng.errors import DataError

LAYOUT = Layout(
    "In-Shop Clothes Retrieval",
    "DeepFashion, mmlab.ie.cuhk.edu.hk/projects/DeepFashion: Eval/list_eval_partition.txt and Img/img.zip",
    """\
  Eval/list_eval_partition.txt   or list_eval_partition.txt: image_name item_id evaluation_status
  Img/img/{MEN,WOMEN}/...        or img/{MEN,WOMEN}/..., or img/img/{MEN,WOMEN}/...""",
)
PUBLISHED = Published("In-Shop Clothes Retrieval", {TRAIN: (3997, 25882), QUERY: (3985, 14218), GALLERY: (3985, 12612)})
_LIST = "list_eval_partition.txt"
_COLUMNS = ("image_name", "item_id", "evaluation_status")
_STATUSES = (TRAIN, QUERY, GALLERY)
_NAMED_FOLDER = "img"  # how every image_name begins
_IMAGE_ROOTS = (".", "Img", "img", "Img/img")  # img.zip unpacked in place, or into a folder of its own
_REPAIR = "Download list_eval_partition.txt again."


class InShop:
    """In-Shop Clothes Retrieval: splits train, query and gallery, the latter two of the same items.

    A class is named by its item_id. Its column `category`, for example "WOMEN/Dresses", comes from the path.

    Args:
        directory: The benchmark's folder.
        seed: Without effect here: the split is the authors'.
        image_folder: Instead of img/, a folder with the same images, for example img_highres.
    """

    name = "inshop"

    def __init__(self, directory: Path | str, *, seed: int = 0, image_folder: str = _NAMED_FOLDER) -> None:
        self.root = Path(directory)
        self.image_folder = image_folder
        self.list_folder = find_root(self.root, ("Eval",), _LIST)
        # Inside of the folder that is meant, since img/ may itself hold the unpacked img/.
        found = [self.root / base / image_folder for base in _IMAGE_ROOTS]
        holding = [folder for folder in found if any(os.path.isdir(folder / part) for part in ("MEN", "WOMEN"))]
        self.images = holding[0] if holding else self.root / image_folder

    def listing(self) -> Listing:
        """All images with their item and split.

        Raises:
            DataError: Files are missing or damaged.
        """
        LAYOUT.require(self.list_folder, _LIST)
        if not any(os.path.isdir(self.images / part) for part in ("MEN", "WOMEN")):
            LAYOUT.require(self.root, f"{self.image_folder}/MEN", f"{self.image_folder}/WOMEN")
        path = self.list_folder / _LIST
        rows = list(read_table(path, _COLUMNS, header_line=2))
        count = read_lines(path)[0].strip()
        if count != str(len(rows)):
            raise DataError(
                f"{path}, line 1: expected the number of images, {len(rows)} as there are lines, got "
                f"{count[:40]!r}. {_REPAIR}"
            )
        builder = ListingBuilder(FolderFiles(self.images), "Unpack img.zip again.")
        faults = RowFaults(path, _REPAIR)
        for line, (text, item_id, status) in rows:
            image = relative_path(text)
            if image is None:
                faults.add(line, leads_out(text))
            elif not image.startswith(f"{_NAMED_FOLDER}/"):
                faults.add(line, f"expected a path below {_NAMED_FOLDER}/, got {text[:80]!r}")
            elif status not in _STATUSES:
                faults.add(line, f"expected the status {', '.join(_STATUSES)}, got {status[:40]!r}")
            else:
                below = image.removeprefix(f"{_NAMED_FOLDER}/")
                category = {"category": "/".join(below.split("/")[:2])}
                builder.add(item_id, status, image, path=below, class_columns=category)
        faults.stop()
        return builder.listing(PUBLISHED)

    def load(self, item: SourceItem) -> bytes:
        """The bytes of the file."""
        return read_file(self.images / item.source.removeprefix(f"{_NAMED_FOLDER}/"))
