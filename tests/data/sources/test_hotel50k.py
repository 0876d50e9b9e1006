"""Source `hotel50k`: other images of the same hotels, what was not downloaded, and images on both sides."""

from pathlib import Path

import pytest
from official_layouts import put, write_hotels

from gcahng.data.sources.hotel50k import Hotel50K
from gcahng.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_hotels(tmp_path, {1: 3, 2: 2, 3: 2}, {1: 2, 2: 1})
    return tmp_path


def rows(root: Path, split: str) -> list[tuple[str, str]]:
    return [(i.class_name, i.source) for i in Hotel50K(root).listing().items if i.split == split]


def test_hotels_and_chains(root: Path) -> None:
    listing = Hotel50K(root).listing()
    assert rows(root, "train")[:3] == [
        ("1", "images/train/7/1/traffickcam/1001.jpg"),
        ("1", "images/train/7/1/travel_website/1002.JPG"),
        ("1", "images/train/7/1/travel_website/1003.jpg"),
    ]
    assert rows(root, "test") == [
        ("1", "images/test/unoccluded/7/1/traffickcam/1008.jpg"),
        ("1", "images/test/unoccluded/7/1/traffickcam/1009.jpg"),
        ("2", "images/test/unoccluded/0/2/traffickcam/1010.jpg"),
    ]
    assert listing.class_columns["1"] == {
        "hotel_name": "Hôtel n° 1",
        "chain_id": "7",
        "chain_name": "Seven, and Sons",
    }
    assert listing.class_columns["2"] == {"hotel_name": "Hôtel n° 2", "chain_id": "0"}
    assert {i.columns["image_source"] for i in listing.items if i.split == "test"} == {"traffickcam"}
    assert {i.columns["image_source"] for i in listing.items if i.split == "train"} == {"traffickcam", "travel_website"}
    assert listing.published is not None
    assert (listing.published.test_in_train, listing.published.counts) == (True, {})
    assert listing.extra["listed"] == {"train": {"classes": 3, "images": 7}, "test": {"classes": 2, "images": 3}}


def test_an_unknown_chain_is_no_chain(root: Path) -> None:
    """The authors' evaluation leaves hotels with a negative chain id out, whatever it is called."""
    tables = root / "input/dataset"
    with (tables / "chain_info.csv").open("a") as file:
        file.write("-1,unknown\n0,Zero\n")
    hotels = (tables / "hotel_info.csv").read_text(encoding="utf-8")
    (tables / "hotel_info.csv").write_text(hotels.replace('3",7,', '3",-1,'), "utf-8")
    (root / "images/train/7/3").rename(root / "images/train/-1-3")
    (root / "images/train/-1").mkdir()
    (root / "images/train/-1-3").rename(root / "images/train/-1/3")
    columns = Hotel50K(root).listing().class_columns
    assert columns["3"] == {"hotel_name": "Hôtel n° 3", "chain_id": "-1"}
    assert (columns["1"]["chain_name"], columns["2"]["chain_name"]) == ("Seven, and Sons", "Zero")


@pytest.mark.parametrize("folder", ["dataset", "input", "."])
def test_tables_elsewhere(root: Path, folder: str) -> None:
    before = Hotel50K(root).listing()
    tables = sorted((root / "input/dataset").iterdir())
    (root / folder).mkdir(exist_ok=True)
    for table in tables:
        table.rename(root / folder / table.name)
    assert Hotel50K(root).listing() == before


def test_images_that_were_not_downloaded(root: Path) -> None:
    (root / "images/train/7/1/travel_website/1002.JPG").unlink()
    (root / "images/test/unoccluded/0/2/traffickcam/1010.jpg").unlink()
    listing = Hotel50K(root).listing()
    assert [f.source for f in listing.faults] == [
        "images/train/7/1/travel_website/1002.jpg",
        "images/test/unoccluded/0/2/traffickcam/1010.jpg",
    ]
    assert "Run download_train.py again" in listing.faults[0].reason
    assert len(listing.items) == 8
    assert listing.extra["listed"]["train"]["images"] == 7


def test_hotel_without_training_images_is_not_tested(root: Path) -> None:
    for path in (root / "images/train/0/2").rglob("*.*"):
        path.unlink()
    listing = Hotel50K(root).listing()
    assert {i.class_name for i in listing.items if i.split == "test"} == {"1"}
    assert len(listing.faults) == 3
    assert listing.faults[-1].reason.startswith("no training image of hotel 2 was downloaded")


def test_image_on_both_sides_is_a_fault(root: Path) -> None:
    put(root / "images/test/unoccluded/7/3/traffickcam/1001.jpg", 5)
    with (root / "input/dataset/test_set.csv").open("a") as file:
        file.write("1001,3,http://x,traffickcam,2017\n")
    listing = Hotel50K(root).listing()
    assert [f.source for f in listing.faults] == ["images/test/unoccluded/7/3/traffickcam/1001.jpg"]
    assert listing.faults[0].reason.startswith("image 1001 is in train_set.csv too.")
    assert len(listing.items) == 10


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        (
            "train_set.csv",
            "9,77,http://x,t,2017\n",
            r"train_set\.csv: 1 bad line: line 9: hotel '77' is not in hotel_info",
        ),
        (
            "test_set.csv",
            "9,1,http://x,../..,2017\n",
            "line 5: expected plain names of folders and a file, got '7/1/../..",
        ),
        (
            "test_set.csv",
            "9,1,http://x,..,2017\n",
            "line 5: expected plain names of folders and a file, got '7/1/../9'",
        ),
        ("test_set.csv", ",1,http://x,t,2017\n", "line 5: expected plain names of folders and a file, got '7/1/t/'"),
        ("test_set.csv", "9,1,http://x,t\n", "line 5: expected 5 fields, got 4"),
        ("chain_info.csv", "8\n", "line 3: expected 2 fields, got 1"),
    ],
)
def test_bad_lines(root: Path, table: str, line: str, message: str) -> None:
    with (root / "input/dataset" / table).open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=message):
        Hotel50K(root).listing()


@pytest.mark.parametrize("table", ["train_set.csv", "test_set.csv", "hotel_info.csv", "chain_info.csv"])
def test_table_without_header(root: Path, table: str) -> None:
    path = root / "input/dataset" / table
    path.write_text(path.read_text(encoding="utf-8").split("\n", 1)[1], encoding="utf-8")
    with pytest.raises(DataError, match=rf"{table}, line 1: expected the header .*_id,.*got '"):
        Hotel50K(root).listing()


def test_hotel_name_that_is_not_utf8_stays_readable(root: Path) -> None:
    path = root / "input/dataset/hotel_info.csv"
    path.write_bytes(path.read_bytes().replace("Hôtel n° 1".encode(), "Hôtel n° 1".encode("latin-1")))
    assert Hotel50K(root).listing().class_columns["1"]["hotel_name"] == r"H\xf4tel n\xb0 1"


def test_missing_parts(root: Path) -> None:
    (root / "images/test/unoccluded").rename(root / "images/test/others")
    with pytest.raises(
        DataError, match=r"expected images/train, images/test/unoccluded, images/test/unoccluded missing"
    ):
        Hotel50K(root).listing()
    (root / "input/dataset/hotel_info.csv").unlink()
    with pytest.raises(DataError, match=r"hotel_info\.csv missing; found chain_info\.csv, test_set\.csv"):
        Hotel50K(root).listing()
