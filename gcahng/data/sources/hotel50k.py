"""Source `hotel50k`: Hotels-50K, whose test images show hotels of the training set."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from gcahng.data.sources.layout import Layout, RowFaults, find_root
from gcahng.data.sources.listing_builder import FolderFiles, ListingBuilder
from gcahng.data.sources.read_file import read_file
from gcahng.data.sources.source import TEST, TRAIN, Fault, Listing, Published, SourceItem
from gcahng.errors import DataError

LAYOUT = Layout(
    "Hotels-50K",
    "github.com/GWUvision/Hotels-50K: input/dataset.tar.gz, images/test.tar.gz, and download_train.py",
    """\
  input/dataset/train_set.csv    image_id,hotel_id,image_url,image_source,upload_timestamp
  input/dataset/test_set.csv     the same columns
  input/dataset/hotel_info.csv   hotel_id,hotel_name,chain_id,latitude,longitude
  input/dataset/chain_info.csv   chain_id,chain_name
  images/train/<chain_id>/<hotel_id>/<image_source>/<image_id>.jpg
  images/test/unoccluded/<chain_id>/<hotel_id>/<image_source>/<image_id>.jpg""",
)
# The authors count 50,000 hotels with 1,027,871 images, and 5,000 hotels with 17,954 test images. The training
# images have to be fetched from travel sites, which keep deleting them: what can be had today has other counts.
PUBLISHED = Published("Hotels-50K", {}, test_in_train=True)
_SETS = {TRAIN: ("train_set.csv", "images/train"), TEST: ("test_set.csv", "images/test/unoccluded")}
_IMAGE_COLUMNS = ("image_id", "hotel_id", "image_url", "image_source", "upload_timestamp")
_HOTEL_COLUMNS = ("hotel_id", "hotel_name", "chain_id", "latitude", "longitude")
_CHAIN_COLUMNS = ("chain_id", "chain_name")
_CSV_FOLDERS = ("input/dataset", "dataset", "input")
_REPAIR = "Unpack dataset.tar.gz again."


class Hotel50K:
    """Hotels-50K: other images of the same hotels are for testing, unoccluded ones.

    A class is named by its hotel_id; its columns are hotel_name, chain_id and chain_name. The column image_source of
    an image tells travel sites from the TraffickCam application.

    Faults are images that were not downloaded, test images that are training images too, and test images of hotels
    of which no training image was downloaded.

    Args:
        directory: The repository's folder, with input/ and images/.
        seed: Without effect here: the split is the authors'.
    """

    name = "hotel50k"

    def __init__(self, directory: Path | str, *, seed: int = 0) -> None:
        self.root = Path(directory)
        self.csv_folder = find_root(self.root, _CSV_FOLDERS, "train_set.csv")

    def listing(self) -> Listing:
        """All images with their hotel and split.

        Raises:
            DataError: Files are missing or damaged.
        """
        tables = [name for name, _ in _SETS.values()]
        LAYOUT.require(self.csv_folder, *tables, "hotel_info.csv", "chain_info.csv")
        LAYOUT.require(self.root, *(folder for _, folder in _SETS.values()))
        hotels = self._hotels()
        builder = ListingBuilder(
            FolderFiles(self.root), "Run download_train.py again, or unpack test.tar.gz; some images are gone for good."
        )
        seen: dict[str, str] = {}  # image id -> split
        listed = {}
        for split in _SETS:
            listed[split] = self._read(builder, split, hotels, seen)
        return builder.listing(PUBLISHED, {"listed": listed})

    def load(self, item: SourceItem) -> bytes:
        """The bytes of the file."""
        return read_file(self.root / item.source)

    def _hotels(self) -> dict[str, dict[str, str]]:
        """Hotel id -> its columns."""
        chains = {
            chain_id: name for _, (chain_id, name) in _read_csv(self.csv_folder / "chain_info.csv", _CHAIN_COLUMNS)
        }
        path = self.csv_folder / "hotel_info.csv"
        hotels: dict[str, dict[str, str]] = {}
        for _, (hotel_id, hotel_name, chain_id, *_position) in _read_csv(path, _HOTEL_COLUMNS):
            columns = {"hotel_name": hotel_name, "chain_id": chain_id}
            # Hotels of no known chain: a negative id, which the authors leave out too, or one without name.
            if chain_id in chains and not chain_id.startswith("-"):
                columns["chain_name"] = chains[chain_id]
            hotels[hotel_id] = columns
        return hotels

    def _read(
        self, builder: ListingBuilder, split: str, hotels: dict[str, dict[str, str]], seen: dict[str, str]
    ) -> dict[str, int]:
        """Add the images of a split; returns how many hotels and images its table lists."""
        table, folder = _SETS[split]
        path = self.csv_folder / table
        faults = RowFaults(path, _REPAIR)
        trained = {item.class_name for item in builder.items}
        sources: dict[str, dict[str, str]] = {}  # one object for each, not for each of a million images
        listed, images = set(), 0
        for line, (image_id, hotel_id, _url, image_source, _time) in _read_csv(path, _IMAGE_COLUMNS):
            if hotel_id not in hotels:
                faults.add(line, f"hotel {hotel_id[:40]!r} is not in hotel_info.csv")
                continue
            names = (hotels[hotel_id]["chain_id"], hotel_id, image_source, image_id)
            if any(not name or "/" in name or "\0" in name or name in (".", "..") for name in names):
                faults.add(line, f"expected plain names of folders and a file, got {'/'.join(names)[:80]!r}")
                continue
            listed.add(hotel_id)
            images += 1
            source = _file(builder.files, f"{folder}/{'/'.join(names[:3])}", image_id)
            where = seen.setdefault(image_id, split)
            if where != split:
                reason = f"image {image_id} is in {_SETS[where][0]} too. Training and test share no image; remove it."
                builder.faults.append(Fault(source, reason))
            elif split == TEST and hotel_id not in trained:
                reason = f"no training image of hotel {hotel_id} was downloaded. Download them, or leave it out."
                builder.faults.append(Fault(source, reason))
            else:
                columns = sources.setdefault(image_source, {"image_source": image_source})
                builder.add(hotel_id, split, source, columns=columns, class_columns=hotels[hotel_id])
        faults.stop()
        return {"classes": len(listed), "images": images}


def _file(files: FolderFiles, folder: str, image_id: str) -> str:
    """The file of an image: download_train.py takes its extension from the address."""
    names = files.names(folder)
    usual = f"{image_id}.jpg"
    if usual not in names:
        usual = min((name for name in names if name.rpartition(".")[0] == image_id), default=usual)
    return f"{folder}/{usual}"


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Rows of a csv file with exactly these columns, with their line numbers."""
    faults = RowFaults(path, _REPAIR)
    try:
        # Hotel names are in many languages; a byte that is not UTF-8 stays readable as \xe9.
        with path.open(encoding="utf-8-sig", errors="backslashreplace", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if header != list(columns):
                got = ",".join(header)[:100]
                raise DataError(f"{path}, line 1: expected the header {','.join(columns)}, got {got!r}. {_REPAIR}")
            for row in reader:
                if len(row) == len(columns):
                    yield reader.line_num, [field.strip() for field in row]
                elif row:
                    faults.add(reader.line_num, f"expected {len(columns)} fields, got {len(row)}")
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as csv ({error}). {_REPAIR}") from None
    faults.stop()
