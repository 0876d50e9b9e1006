"""Source `cub`: classes, not the official image split, decide; damaged tables are refused."""

from pathlib import Path

import pytest
from official_layouts import write_cub

from gcahng.data.sources.cub import Cub
from gcahng.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cub(tmp_path / "CUB_200_2011", {1: 3, 100: 2, 101: 3, 200: 2})
    return tmp_path / "CUB_200_2011"


def test_classes_decide(root: Path) -> None:
    items = Cub(root).listing().items
    split = {item.class_name: item.split for item in items}
    assert split == {"001.Bird_1": "train", "100.Bird_100": "train", "101.Bird_101": "test", "200.Bird_200": "test"}
    assert [i.source for i in items][:1] == ["images/001.Bird_1/Bird_0000_1.jpg"]
    assert Cub(root).load(items[0]) == (root / items[0].source).read_bytes()


def test_folder_above_is_taken_too(root: Path) -> None:
    assert Cub(root.parent).listing() == Cub(root).listing()
    item = Cub(root).listing().items[0]
    assert Cub(root.parent).load(item) == Cub(root).load(item)


def test_lines_in_another_order(root: Path) -> None:
    before = {(i.source, i.class_name, i.split) for i in Cub(root).listing().items}
    labels = root / "image_class_labels.txt"
    labels.write_text("\n".join(reversed(labels.read_text().split("\n"))).strip() + "\n")
    assert {(i.source, i.class_name, i.split) for i in Cub(root).listing().items} == before


def test_missing_image_is_a_fault(root: Path) -> None:
    (root / "images/001.Bird_1/Bird_0001_2.jpg").unlink()
    listing = Cub(root).listing()
    assert [f.source for f in listing.faults] == ["images/001.Bird_1/Bird_0001_2.jpg"]
    assert listing.faults[0].reason == "there is no such file. Unpack CUB_200_2011.tgz again."
    assert len(listing.items) == 9


@pytest.mark.parametrize("name", ["images.txt", "image_class_labels.txt", "classes.txt"])
def test_missing_table(root: Path, name: str) -> None:
    (root / name).unlink()
    with pytest.raises(DataError, match=rf"not CUB-200-2011 as distributed: expected images\.txt.*{name} missing"):
        Cub(root).listing()


def test_another_folder_names_the_layout(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(DataError) as error:
        Cub(tmp_path).listing()
    assert "found notes/." in str(error.value)
    assert "CUB_200_2011/image_class_labels.txt   image id, class id" in str(error.value)
    with pytest.raises(DataError, match="found no such folder"):
        Cub(tmp_path / "nowhere").listing()
    with pytest.raises(DataError, match=r"found a folder that cannot be read \(File name too long\)"):
        Cub(tmp_path / ("x" * 300)).listing()
    with pytest.raises(DataError, match="found an empty folder"):
        Cub(tmp_path / "notes").listing()


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "images.txt",
            "x.jpg\n",
            r"images\.txt: 1 bad line: line 11: expected 2 fields \(image_id path\), got 'x.jpg'",
        ),
        ("images.txt", "99 001.Bird_1/x.jpg\n", "line 11: image 99 has no class in image_class_labels"),
        ("images.txt", "1 001.Bird_1/x.jpg\n", "line 11: image 1 has no class in .*, or comes twice"),
        ("images.txt", "99 ../../x.jpg\n", r"line 11: the path '../../x.jpg' leads out of"),
        ("images.txt", "99 /etc/x.jpg\n", r"line 11: the path '/etc/x.jpg' leads out of"),
        ("image_class_labels.txt", "99 1\n", r"images\.txt: 1 bad line: image 99 of image_class_labels.txt is missing"),
        ("image_class_labels.txt", "1 1\n", "line 11: image 1 comes twice"),
        ("image_class_labels.txt", "99 201\n", "line 11: class '201' is not in classes.txt"),
        ("image_class_labels.txt", "99 x\n", "line 11: class 'x' is not in classes.txt"),
        ("classes.txt", "201 x\n", "line 201: expected a class id from 1 to 200, got '201'"),
        ("classes.txt", "7 x\n", "line 201: class 7 x comes twice"),
    ],
)
def test_bad_lines(root: Path, name: str, lines: str, message: str) -> None:
    with (root / name).open("a") as file:
        file.write(lines)
    with pytest.raises(DataError, match=message):
        Cub(root).listing()


def test_first_bad_lines_are_listed_and_the_others_counted(root: Path) -> None:
    with (root / "images.txt").open("a") as file:
        file.writelines(f"{900 + i} 001.Bird_1/{i}.jpg\n" for i in range(7))
    with pytest.raises(DataError, match=r"7 bad lines: line 11: .*; line 15: .*; and 2 more\. Unpack CUB") as error:
        Cub(root).listing()
    assert "line 16" not in str(error.value)


def test_table_that_is_no_text(root: Path) -> None:
    (root / "classes.txt").write_bytes(b"1 \xff\xfe\n")
    with pytest.raises(DataError, match=r"classes\.txt is not UTF-8 \(invalid start byte at byte 2\)"):
        Cub(root).listing()


def test_folder_above_of_an_incomplete_set_is_not_blamed(root: Path) -> None:
    (root / "images.txt").unlink()
    root.rename(root.with_name("CUB_200_2011"))
    with pytest.raises(DataError, match=r"CUB_200_2011 is not .* images, images\.txt missing; found classes\.txt"):
        Cub(root.parent).listing()


def test_folder_that_cannot_be_listed(root: Path) -> None:
    folder = root / "images/001.Bird_1"
    folder.rename(root / "moved")
    folder.write_text("no folder")  # permissions do not stop a test that runs as root
    reasons = {fault.reason for fault in Cub(root).listing().faults}
    assert reasons == {f"the folder {folder} cannot be read (Not a directory). Check its permissions."}
