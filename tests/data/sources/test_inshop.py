"""Source `inshop`: wherever img.zip was unpacked, three splits, and lists that are not the distributed one."""

from pathlib import Path

import pytest
from official_layouts import inshop_list, write_inshop

from gcahng.data.sources.inshop import InShop
from gcahng.errors import DataError


@pytest.mark.parametrize("images", ["img", "Img/img", "img/img", "Img/img/img"])
@pytest.mark.parametrize("list_folder", [".", "Eval"])
def test_unpacked_anywhere(tmp_path: Path, images: str, list_folder: str) -> None:
    expected = write_inshop(tmp_path / images, tmp_path / list_folder)
    source = InShop(tmp_path)
    listing = source.listing()
    assert {i.source: (i.class_name, i.split) for i in listing.items} == expected.items
    assert {i.source: source.load(i) for i in listing.items} == {k: p.read_bytes() for k, p in expected.files.items()}
    assert not listing.faults


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_inshop(tmp_path / "Img" / "img", tmp_path / "Eval")
    return tmp_path


def test_splits_and_categories(root: Path) -> None:
    listing = InShop(root).listing()
    splits = {
        split: {i.class_name for i in listing.items if i.split == split} for split in ("train", "query", "gallery")
    }
    assert splits["train"] == {"id_00000001", "id_00000002", "id_00000003"}
    assert splits["query"] == splits["gallery"] == {"id_00000004", "id_00000005"}
    assert listing.class_columns["id_00000001"] == {"category": "WOMEN/Dresses"}
    assert listing.class_columns["id_00000004"] == {"category": "MEN/Denim"}


def test_other_folder_of_the_same_images(root: Path) -> None:
    expected = write_inshop(root / "img_highres", root / "Eval")
    (root / "Img" / "img").rename(root / "elsewhere")
    source = InShop(root, image_folder="img_highres")
    listing = source.listing()
    assert [i.source for i in listing.items] == list(expected.items)
    assert source.load(listing.items[0]) == expected.files[listing.items[0].source].read_bytes()


def test_item_of_two_categories_keeps_them_image_by_image(root: Path) -> None:
    path = root / "Eval" / "list_eval_partition.txt"
    moved = "WOMEN/Dresses/id_00000001/00_1_front.jpg"
    new = root / "Img/img/WOMEN/Tops/id_00000001/00_1_front.jpg"
    new.parent.mkdir(parents=True)
    (root / "Img/img" / moved).rename(new)
    path.write_text(path.read_text().replace(moved, moved.replace("Dresses", "Tops")))
    listing = InShop(root).listing()
    assert "id_00000001" not in listing.class_columns
    assert [i.columns for i in listing.items if i.class_name == "id_00000001"] == [
        {"category": "WOMEN/Tops"},
        {"category": "WOMEN/Dresses"},
        {"category": "WOMEN/Dresses"},
    ]


def test_missing_images(root: Path) -> None:
    (root / "Img/img").rename(root / "elsewhere")
    with pytest.raises(DataError, match=r"expected img/MEN, img/WOMEN, img/MEN, img/WOMEN missing; found Eval/, Img/"):
        InShop(root).listing()


def test_folder_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found a folder that cannot be read \(File name too long\)"):
        InShop(tmp_path / ("x" * 300)).listing()


def test_missing_list(root: Path) -> None:
    (root / "Eval" / "list_eval_partition.txt").unlink()
    with pytest.raises(DataError, match=r"Eval is not .* list_eval_partition\.txt missing; found an empty folder"):
        InShop(root).listing()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("img/a/b/id_1/1.jpg", "id_1", "val")], "line 3: expected the status train, query, gallery, got 'val'"),
        ([("img/../../x.jpg", "id_1", "train")], "line 3: the path .* leads out"),
        ([("other/x.jpg", "id_1", "train")], "line 3: expected a path below img/, got 'other/x.jpg'"),
    ],
)
def test_bad_lines(root: Path, rows: list[tuple[str, str, str]], message: str) -> None:
    (root / "Eval" / "list_eval_partition.txt").write_text(inshop_list(rows))
    with pytest.raises(DataError, match=message):
        InShop(root).listing()


def test_count_of_the_first_line(root: Path) -> None:
    path = root / "Eval" / "list_eval_partition.txt"
    path.write_text(path.read_text().replace("15\n", "16\n", 1))
    with pytest.raises(DataError, match=r"line 1: expected the number of images, 15 as there are lines, got '16'"):
        InShop(root).listing()


def test_header(root: Path) -> None:
    path = root / "Eval" / "list_eval_partition.txt"
    path.write_text(path.read_text().replace("evaluation_status", "status", 1))
    with pytest.raises(DataError, match="line 2: expected the header 'image_name item_id evaluation_status', got"):
        InShop(root).listing()
