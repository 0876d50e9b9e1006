"""Source `folder`: both layouts, class-disjoint splits, and folders that are not what they seem."""

import os
from pathlib import Path

import pytest
from PIL import Image

from gcahng.data.conversion.convert import convert
from gcahng.data.shards.reader import ShardSet
from gcahng.data.sources.folder import Folder
from gcahng.data.sources.source import class_disjoint_split, seeded_order
from gcahng.errors import DataError, InputError


def picture(path: Path, value: int = 0, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 50, 255 - value)).save(path)


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    directory = tmp_path / "birds"
    for i, name in enumerate(["finch", "gull", "owl", "wren"]):
        for j, suffix in enumerate([".jpg", ".JPEG", ".png", ".webp"]):
            picture(directory / name / f"{j}{suffix}", 20 * i + j)
    return directory


def test_class_folders_are_split_by_seed(birds: Path) -> None:
    listing = Folder(birds, seed=0).listing()
    split = {item.class_name: item.split for item in listing.items}
    assert sorted(split.values()) == ["test", "test", "train", "train"]
    assert [i.source for i in listing.items if i.class_name == "gull"] == [
        "gull/0.jpg",
        "gull/1.JPEG",
        "gull/2.png",
        "gull/3.webp",
    ]
    splits = {
        frozenset(i.class_name for i in Folder(birds, seed=seed).listing().items if i.split == "test")
        for seed in range(8)
    }
    assert len(splits) > 1


def test_test_share(birds: Path) -> None:
    items = Folder(birds, test_share=0.25).listing().items
    assert len({i.class_name for i in items if i.split == "test"}) == 1
    assert len({i.class_name for i in items if i.split == "train"}) == 3


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_test_share_out_of_range(birds: Path, share: float) -> None:
    with pytest.raises(InputError, match=rf"`test_share` must be a share .* got {share}"):
        Folder(birds, test_share=share).listing()


def test_given_splits_are_taken(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "owl" / "a.png")
    picture(tmp_path / "test" / "gull" / "b.png")
    listing = Folder(tmp_path, seed=5).listing()
    assert [(i.class_name, i.split, i.source) for i in listing.items] == [
        ("owl", "train", "train/owl/a.png"),
        ("gull", "test", "test/gull/b.png"),
    ]


def test_written_members_are_jpg_or_png_by_content(birds: Path, tmp_path: Path) -> None:
    (birds / "owl" / "2.png").write_bytes((birds / "owl" / "0.jpg").read_bytes())
    convert(Folder(birds), tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    content = {shards.source(row): shards.read(row) for row in range(len(shards))}
    assert content["owl/0.jpg"] == (birds / "owl" / "0.jpg").read_bytes()
    assert content["owl/2.png"][:3] == b"\xff\xd8\xff"
    assert content["gull/3.webp"][:4] == b"\x89PNG"
    assert set(content) == {
        f"{c}/{f}" for c in ("finch", "gull", "owl", "wren") for f in ("0.jpg", "1.JPEG", "2.png", "3.webp")
    }


def test_other_files_are_counted(birds: Path) -> None:
    (birds / "owl" / "notes.txt").write_text("hoo")
    (birds / ".hidden").mkdir()
    listing = Folder(birds).listing()
    assert listing.extra["ignored_files"] == 1
    assert len(listing.items) == 16


def test_empty_class_folder_is_a_fault(birds: Path) -> None:
    (birds / "crow").mkdir()
    (fault,) = Folder(birds).listing().faults
    assert fault.source == "crow"
    assert fault.reason.startswith("the class folder has no .jpg, .jpeg, .png, .webp files")


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere cannot be read \(No such file or directory\)"):
        Folder(tmp_path / "nowhere").listing()


def test_no_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="expected one folder per class, .* got no folders"):
        Folder(tmp_path).listing()


@pytest.mark.parametrize(
    "names",
    [
        ["train"],
        ["test"],
        ["train", "test", "val"],
        ["train", "query"],
        ["train", "test", "gallery"],
        ["query", "gallery"],
        ["query", "gallery", "test"],
        ["train", "query", "gallery", "owls"],
    ],
)
def test_half_of_the_splits_or_more(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        picture(tmp_path / name / "owl" / "a.png")
    got = ", ".join(f"{name}/" for name in sorted(names))
    with pytest.raises(DataError, match=f"expected train/ with test/, or with query/ and .* got {got}. Mo"):
        Folder(tmp_path).listing()


@pytest.mark.parametrize("names", [["train", "query", "gallery"], ["train", "test", "query", "gallery"]])
def test_query_and_gallery(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        picture(tmp_path / name / ("gull" if name == "train" else "owl") / "a.png")
    listing = Folder(tmp_path).listing()
    assert [i.split for i in listing.items] == names
    assert [i.source for i in listing.items if i.class_name == "owl"] == [f"{n}/owl/a.png" for n in names[1:]]


def test_classes_may_be_called_query_or_gallery(tmp_path: Path) -> None:
    picture(tmp_path / "query" / "a.png")
    picture(tmp_path / "shop" / "b.png")
    assert {i.class_name for i in Folder(tmp_path).listing().items} == {"query", "shop"}


def test_one_class_cannot_be_split(tmp_path: Path) -> None:
    picture(tmp_path / "owl" / "a.png")
    with pytest.raises(DataError, match=r"expected at least 2 classes, got 1 \(owl\)"):
        Folder(tmp_path).listing()


def test_split_does_not_depend_on_the_order_of_names() -> None:
    names = [f"class {i}" for i in range(50)]
    assert class_disjoint_split(names, 3) == class_disjoint_split(names[::-1], 3)


def test_added_class_keeps_the_order_of_the_others() -> None:
    names = [f"class {i}" for i in range(20)]
    longer = seeded_order([*names, "new"], 1, "order")
    longer.remove("new")
    assert longer == seeded_order(names, 1, "order")
    assert longer != seeded_order(names, 2, "order")
    assert longer != seeded_order(names, 1, "split")


def test_nothing_in_a_wrong_place_is_passed_over(birds: Path) -> None:
    picture(birds / "owl" / "young" / "a.png")
    picture(birds / "loose.JPG")
    (birds / "owl" / "notes.txt").write_text("dear")
    (birds / "owl" / ".thumbnails").mkdir()
    listing = Folder(birds).listing()
    assert [(fault.source, fault.reason.split(".")[0]) for fault in listing.faults] == [
        ("loose.JPG", "the image is in no class folder"),
        ("owl/young", "a class folder cannot hold folders"),
    ]
    assert listing.extra == {"ignored_files": 1}
    assert len(listing.items) == 16


def test_loose_image_beside_the_classes_of_a_split(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "owl" / "a.png")
    picture(tmp_path / "test" / "gull" / "b.png")
    picture(tmp_path / "test" / "c.png")
    assert [fault.source for fault in Folder(tmp_path).listing().faults] == ["test/c.png"]


@pytest.mark.parametrize("out", ["shards", "owl/shards", "."])
def test_shards_inside_of_the_folder_of_classes_are_refused(birds: Path, out: str) -> None:
    with pytest.raises(InputError, match="must not be inside of the source folder, whose folders are classes"):
        convert(Folder(birds), birds / out)
    assert sorted(path.name for path in birds.iterdir()) == ["finch", "gull", "owl", "wren"]


def test_class_folder_that_cannot_be_read(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: Path) -> object:  # permissions do not stop a test that runs as root
        if Path(path).name == "owl":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"birds/owl cannot be read \(Permission denied\)\. .* check permissions"):
        Folder(birds).listing()
