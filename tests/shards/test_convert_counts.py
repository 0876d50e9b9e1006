"""The published counts: exactly these pass, and a difference stops with a table, unless it is allowed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from official_layouts import car_names, encoded, inshop_list, put, write_cars_annotations, write_cub

from gcahng.data.conversion.protocol import check_protocol, count_items, unseen_test_classes
from gcahng.data.shards.manifest import Manifest
from gcahng.data.sources.cars import Cars
from gcahng.data.sources.inshop import InShop
from gcahng.data.sources.sop import StanfordOnlineProducts
from gcahng.data.sources.source import Source
from gcahng.errors import DataError
from shards.convert import main


def shares(total: int, parts: int) -> list[int]:
    """`total` images dealt to `parts` classes."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def write_full_cars(root: Path) -> Source:
    """16,185 paths of 128 files: the folders are links to one."""
    side = 128
    (root / "car_ims").mkdir(parents=True)
    (root / "all").mkdir()
    for i in range(side):
        (root / "all" / f"{i}.jpg").touch()
        (root / "car_ims" / f"{i}").symlink_to(root / "all")
    class_ids = [i + 1 for i, count in enumerate(shares(8054, 98) + shares(8131, 98)) for _ in range(count)]
    annotations = [(f"car_ims/{i // side}/{i % side}.jpg", class_id) for i, class_id in enumerate(class_ids)]
    fields = ("relative_im_path", "class")  # to write all of them takes seconds
    write_cars_annotations(root / "cars_annos.mat", annotations, car_names(), fields)
    return Cars(root)


def write_full_sop(root: Path) -> Source:
    """120,053 paths of 347 files: the folders are links to one."""
    side = 347
    (root / "all").mkdir(parents=True)
    for i in range(side):
        (root / "all" / f"{i}.JPG").touch()
    for i in range(side):
        (root / f"f{i}_final").symlink_to(root / "all")
    image, class_id = 0, 0
    for name, images, classes in (("Ebay_train.txt", 59551, 11318), ("Ebay_test.txt", 60502, 11316)):
        lines = ["image_id class_id super_class_id path\n"]
        for count in shares(images, classes):
            class_id += 1
            for _ in range(count):
                lines.append(f"{image + 1} {class_id} 1 f{image // side}_final/{image % side}.JPG\n")
                image += 1
        (root / name).write_text("".join(lines))
    return StanfordOnlineProducts(root)


def write_full_inshop(root: Path) -> Source:
    """52,712 paths: the folders of the 7,982 items are links to one."""
    items = root / "img" / "WOMEN" / "Dresses"
    items.mkdir(parents=True)
    (root / "all").mkdir()
    for i in range(12):
        (root / "all" / f"{i}.jpg").touch()
    rows = []
    test = list(zip(shares(14218, 3985), shares(12612, 3985), strict=True))
    parts = [{"train": n} for n in shares(25882, 3997)] + [{"query": q, "gallery": g} for q, g in test]
    for i, counts in enumerate(parts, start=1):
        (items / f"id_{i:08d}").symlink_to(root / "all")
        statuses = [status for status, count in counts.items() for _ in range(count)]
        rows += [(f"img/WOMEN/Dresses/id_{i:08d}/{j}.jpg", f"id_{i:08d}", status) for j, status in enumerate(statuses)]
    (root / "list_eval_partition.txt").write_text(inshop_list(rows))
    return InShop(root)


@pytest.mark.parametrize(
    ("write", "splits"),
    [
        (write_full_cars, {"train": (98, 8054), "test": (98, 8131)}),
        (write_full_sop, {"train": (11318, 59551), "test": (11316, 60502)}),
        (write_full_inshop, {"train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)}),
    ],
)
def test_listing_of_full_size(
    write: Callable[[Path], Source], splits: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    listing = write(tmp_path / "full").listing()
    assert not listing.faults
    found = count_items(listing.items)
    assert found == {split: {"classes": c, "images": i} for split, (c, i) in splits.items()}
    assert listing.published is not None
    names = {split: {i.class_name for i in listing.items if i.split == split} for split in splits}
    assert all(not names["train"] & names[split] for split in splits if split != "train")
    checked = check_protocol(listing.published, found, unseen_test_classes([]), allow_mismatch=False, stage="as listed")
    assert checked is not None and checked["matches"]
    found["train"]["images"] -= 1
    with pytest.raises(DataError, match=rf"train +images +{splits['train'][1]} +{splits['train'][1] - 1} +-1"):
        check_protocol(listing.published, found, [], allow_mismatch=False, stage="as listed")


def write_full_cub(root: Path) -> None:
    """11,788 pictures of 8 x 8 pixels."""
    counts = shares(5864, 100) + shares(5924, 100)
    root.mkdir()
    write_cub(root, {})
    number, images, labels = 0, [], []
    for class_id, count in enumerate(counts, start=1):
        folder = f"{class_id:03d}.Bird_{class_id}"
        (root / "images" / folder).mkdir(parents=True)
        for _ in range(count):
            number += 1
            (root / "images" / folder / f"{number}.jpg").write_bytes(encoded(number, size=(8, 8)))
            images.append(f"{number} {folder}/{number}.jpg\n")
            labels.append(f"{number} {class_id}\n")
    (root / "images.txt").write_text("".join(images))
    (root / "image_class_labels.txt").write_text("".join(labels))


def test_conversion_of_full_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All 11,788 images of CUB, with the exact counts and without --allow-mismatch; then with one image less."""
    write_full_cub(tmp_path / "cub")
    command = ["cub", "--source", str(tmp_path / "cub"), "--workers", "1", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    splits = Manifest.load(tmp_path / "out").splits
    assert splits == {"train": {"classes": 100, "images": 5864}, "test": {"classes": 100, "images": 5924}}
    assert "100 classes / 5864 images, test 100 classes / 5924 images: as published" in capsys.readouterr().out

    for name in ("images.txt", "image_class_labels.txt"):
        path = tmp_path / "cub" / name
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert main([*command, "--out", str(tmp_path / "less")]) == 2
    message = capsys.readouterr().err
    assert "error: CUB-200-2011 as listed by source 'cub' differs from what its authors published" in message
    assert [line.split() for line in message.splitlines() if line.startswith("  train  images")] == [
        ["train", "images", "5864", "5863", "-1"]
    ]
    assert "--allow-mismatch" in message
    assert not (tmp_path / "less").exists()


def test_official_split_of_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same classes on both sides, as some converters make them: not a retrieval of unseen classes."""
    put(tmp_path / "a.jpg", 1)
    put(tmp_path / "b.jpg", 2)
    (tmp_path / "table.csv").write_text("path,class,split\na.jpg,owl,train\nb.jpg,owl,test\n")
    options = ["--source", str(tmp_path / "table.csv"), "--out", str(tmp_path / "out"), "--workers", "1", "--quiet"]
    assert main(["csv", *options]) == 2
    assert "error: Class 'owl' is in train and in test" in capsys.readouterr().err
    assert main(["csv", *options, "--allow-mismatch"]) == 0
    assert "NOT class-disjoint: 1 classes" in capsys.readouterr().out
