"""Source `sop`: both lists, super classes, and lists that are not the distributed ones."""

from pathlib import Path

import pytest
from official_layouts import write_sop

from gcahng.data.conversion.convert import convert
from gcahng.data.sources.sop import StanfordOnlineProducts
from gcahng.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_sop(tmp_path / "Stanford_Online_Products", {1: 3, 2: 2}, {3: 2, 4: 2})
    return tmp_path / "Stanford_Online_Products"


def test_lists_are_the_splits(root: Path) -> None:
    listing = StanfordOnlineProducts(root).listing()
    assert [(i.class_name, i.split, i.source) for i in listing.items][:1] == [
        ("1", "train", "bicycle_final/110001_0.JPG")
    ]
    assert {i.class_name: i.split for i in listing.items} == {"1": "train", "2": "train", "3": "test", "4": "test"}
    assert listing.class_columns == {
        name: {"super_class_id": "1", "super_class": "bicycle"}
        if name in "13"
        else {"super_class_id": "2", "super_class": "cabinet"}
        for name in "1234"
    }
    assert all(item.columns == {} for item in listing.items)
    assert StanfordOnlineProducts(root.parent).listing() == listing


def test_class_in_two_super_classes_keeps_them_image_by_image(root: Path) -> None:
    path = root / "Ebay_train.txt"
    path.write_text(path.read_text().replace("2 1 1 bicycle", "2 1 7 bicycle"))
    listing = StanfordOnlineProducts(root).listing()
    assert set(listing.class_columns) == {"2", "3", "4"}
    own = [item.columns["super_class_id"] for item in listing.items if item.class_name == "1"]
    assert own == ["1", "7", "1"]


def test_image_listed_twice_is_a_fault(root: Path, tmp_path: Path) -> None:
    with (root / "Ebay_test.txt").open("a") as file:
        file.write("9 4 2 bicycle_final/110001_0.JPG\n")
    source = StanfordOnlineProducts(root)
    with pytest.raises(DataError, match=r"bicycle_final/110001_0\.JPG: the image is listed twice"):
        convert(source, tmp_path / "out", allow_mismatch=True)
    manifest = convert(source, tmp_path / "out", allow_mismatch=True, on_error="skip")
    assert [entry["source"] for entry in manifest.extra["skipped"]] == ["bicycle_final/110001_0.JPG"]
    assert manifest.num_samples == 9


def test_one_list_is_missing(root: Path) -> None:
    (root / "Ebay_test.txt").unlink()
    with pytest.raises(
        DataError, match=r"expected Ebay_train\.txt, Ebay_test\.txt, Ebay_test\.txt missing; found Ebay_t"
    ):
        StanfordOnlineProducts(root).listing()


@pytest.mark.parametrize("header", ["", "image_id class_id path\n", "image_id,class_id,super_class_id,path\n"])
def test_header(root: Path, header: str) -> None:
    path = root / "Ebay_train.txt"
    path.write_text(header + path.read_text().split("\n", 1)[1])
    with pytest.raises(DataError, match=r"line 1: expected the header 'image_id class_id super_class_id path', got '"):
        StanfordOnlineProducts(root).listing()


def test_empty_list(root: Path) -> None:
    (root / "Ebay_train.txt").write_text("")
    with pytest.raises(DataError, match="line 1: expected the header .*, got ''"):
        StanfordOnlineProducts(root).listing()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("9 4 2\n", "line 6: expected 4 fields .* got '9 4 2'"),
        ("\n9 4 2 x.JPG\n", "line 6: expected 4 fields .* got ''"),
        ("9 4 2 a/../../x.JPG\n", r"line 6: the path 'a/\.\./\.\./x\.JPG' leads out"),
    ],
)
def test_bad_lines(root: Path, line: str, message: str) -> None:
    with (root / "Ebay_test.txt").open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=message):
        StanfordOnlineProducts(root).listing()


def test_byte_order_mark_and_windows_line_ends(root: Path) -> None:
    before = StanfordOnlineProducts(root).listing()
    path = root / "Ebay_train.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert StanfordOnlineProducts(root).listing() == before
