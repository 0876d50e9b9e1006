"""Streaming images of plain tars: once each over ranks and workers, in an order that can be restored."""

import io
import multiprocessing
from collections import Counter
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image
from tar_cases import picture, write_tar

from gcahng.data.images.transforms import eval_transform, transform_settings
from gcahng.data.tars.loader import TarBatch, TarLoader, restore_order, tar_loader
from gcahng.errors import ConfigError, DataError, InputError

SETTINGS = transform_settings("gca_hng", image_size=16)
COUNTS = (7, 1, 5)
KEYS = [f"s/{number:03d}" for number in range(sum(COUNTS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of 7, 1 and 5 samples by webdataset's own writer."""
    folder = tmp_path_factory.mktemp("tars")
    number = 0
    for tar, count in enumerate(COUNTS):
        with webdataset.TarWriter(str(folder / f"test-{tar}.tar")) as writer:
            for _ in range(count):
                extension = "png" if number % 3 else "jpg"
                image = picture(number, "PNG" if number % 3 else "JPEG")
                record = {"class_name": f"c{number % 4}"}
                writer.write({"__key__": KEYS[number], extension: image, "json": record, "id": b"1"})
                number += 1
    return folder


def load(folder: Path, num_workers: int = 0, pattern: str = "test-{0..2}.tar", **options) -> tuple[TarLoader, list]:
    arguments = {"transform": SETTINGS, "batch_size": 3, "num_workers": num_workers} | options
    loader = tar_loader(f"{folder}/{pattern}", **arguments)
    return loader, list(loader)


def together(batches: list[TarBatch]) -> tuple[torch.Tensor, list, list]:
    """Images, labels and keys in the order of the tars."""
    return restore_order(
        torch.cat([batch.order for batch in batches]),
        torch.cat([batch.images for batch in batches]),
        [label for batch in batches for label in batch.labels],
        [key for batch in batches for key in batch.keys],
    )


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_image_once_over_ranks_and_workers(folder: Path, num_workers: int, world_size: int) -> None:
    """Also where there are fewer tars than readers, which makes other tools fail or hang."""
    batches: list[TarBatch] = []
    passed_over: Counter[str] = Counter()
    for rank in range(world_size):
        loader, mine = load(folder, num_workers, rank=rank, world_size=world_size)
        assert all(0 < len(batch.keys) <= 3 for batch in mine)
        assert loader.counts.images == sum(len(batch.keys) for batch in mine) and loader.counts.skipped == 0
        passed_over += loader.counts.passed_over
        batches += mine
    images, labels, keys = together(batches)
    assert keys == KEYS and labels == [f"c{number % 4}" for number in range(len(KEYS))]
    assert passed_over == Counter({".id": len(KEYS)})
    assert images.dtype == torch.uint8
    for number in range(len(KEYS)):
        image = Image.open(io.BytesIO(picture(number, "PNG" if number % 3 else "JPEG"))).convert("RGB")
        assert torch.equal(images[number], eval_transform(image, SETTINGS))


def test_one_tar_and_two_workers(folder: Path) -> None:
    loader, batches = load(folder, 2, "test-0.tar")
    assert together(batches)[2] == KEYS[:7]
    assert sorted(len(batch.keys) for batch in batches) == [1, 3, 3]
    assert together(list(loader))[2] == KEYS[:7]  # it can be iterated again
    assert loader.counts.images == 7 and loader.counts.passed_over == {".id": 7}


def test_order_counts_tars_and_positions(folder: Path) -> None:
    _, batches = load(folder, batch_size=100)
    (batch,) = batches
    want = [[tar, position] for tar, count in enumerate(COUNTS) for position in range(count)]
    assert batch.order.tolist() == want and batch.order.dtype == torch.int64
    images, labels, order, keys = batch
    assert images.shape == (13, 3, 16, 16) and len(labels) == len(order) == len(keys) == 13


def test_restore_order() -> None:
    order = torch.tensor([[1, 0], [0, 10], [0, 2]])
    names, numbers = restore_order(order, ["c", "b", "a"], torch.tensor([2, 1, 0]))
    assert names == ["a", "b", "c"] and numbers.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"`order` holds \[0, 2\] twice"):
        restore_order(torch.tensor([[0, 2], [1, 2], [0, 2]]))
    with pytest.raises(InputError, match="Column 1 must have one entry per image: expected 3, got 2"):
        restore_order(order, ["c", "b", "a"], [1, 2])


def broken_tar(tmp_path: Path) -> Path:
    files = []
    for number in range(6):
        content = picture(number)
        files += [] if number == 3 else [(f"{number}.jpg", content[:700] if number == 1 else content)]
        files += [(f"{number}.cls", b"1")]
    return write_tar(tmp_path / "a.tar", files).parent


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_fail(tmp_path: Path, num_workers: int) -> None:
    with pytest.raises(DataError, match=r"^Tar .*/a.tar: (the image of )?sample '[13]'"):
        load(broken_tar(tmp_path), num_workers, "a.tar", batch_size=1)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_may_be_skipped_and_are_counted(tmp_path: Path, num_workers: int) -> None:
    loader, batches = load(broken_tar(tmp_path), num_workers, "a.tar", on_error="skip")
    _, _, keys = together(batches)
    assert keys == ["0", "2", "4", "5"]
    assert torch.cat([b.order for b in batches])[:, 1].sort().values.tolist() == [0, 2, 4, 5]
    assert (loader.counts.images, loader.counts.skipped) == (4, 2)
    second, first = sorted(loader.counts.problems)
    assert f"{tmp_path}/a.tar: the image of sample '1' cannot be decoded as JPEG" in first
    assert "sample '3' must have one image: expected one member of jpg, jpeg, png, webp, got none" in second


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_tar_is_never_skipped(folder: Path, tmp_path: Path, num_workers: int) -> None:
    content = (folder / "test-0.tar").read_bytes()
    cut = len(content.rstrip(b"\0")) // 512 * 512 - 1024
    (tmp_path / "test-0.tar").write_bytes(content[:cut])
    with pytest.raises(DataError, match=r"^Tar .*/test-0.tar .*; the last whole member is 's/\d+\.[a-z]+'\."):
        load(tmp_path, num_workers, "test-0.tar", on_error="skip")


def test_a_missing_label_is_never_skipped(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.jpg": picture(0), "x.cls": b"1", "y.jpg": picture(1)})
    with pytest.raises(DataError, match=r"^Tar .*/a.tar: sample 'y' has no label"):
        load(tmp_path, pattern="a.tar", on_error="skip")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labels_are_of_one_kind(tmp_path: Path, num_workers: int) -> None:
    for number, members in enumerate([{"cls": b"1"}, {"json": b'{"label": 1}'}]):
        files = {f"{number}.{extension}": content for extension, content in members.items()}
        write_tar(tmp_path / f"{number}.tar", files | {f"{number}.jpg": picture(0)})
    message = r"1.tar: sample '1' has a number in field 'label' of .json, others have a number in .cls"
    with pytest.raises(DataError, match=message):
        load(tmp_path, num_workers, "{0..1}.tar")


def test_labels_of_one_batch_are_of_one_kind(tmp_path: Path) -> None:
    files = {"a.cls": b"1", "a.jpg": picture(0), "b.jpg": picture(1), "b.json": b'{"class": "x"}'}
    write_tar(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match="'b' has a name in field 'class' of .json, others have a number in .cls"):
        load(tmp_path, pattern="a.tar")


def test_a_label_field(tmp_path: Path) -> None:
    record = b'{"class_name": "x", "species": 7}'
    write_tar(tmp_path / "a.tar", {"a.cls": b"1", "a.jpg": picture(0), "a.json": record})
    assert [load(tmp_path, pattern="a.tar", label_field=f)[1][0].labels for f in (None, "species", "class_name")] == [
        [1],
        [7],
        ["x"],
    ]


def test_dangerous_members_are_passed_over(tmp_path: Path) -> None:
    """webdataset's decoder would unpickle them."""
    bomb = b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    files = {f"a.{extension}": bomb for extension in ("pyd", "pickle", "pth", "npy", "npz", "pkl")}
    write_tar(tmp_path / "a.tar", {"a.cls": b"1", "a.jpg": picture(0)} | files)
    loader, batches = load(tmp_path, pattern="a.tar")
    assert len(batches) == 1 and not (tmp_path / "ran").exists()
    assert loader.counts.passed_over == {f".{e}": 1 for e in ("pyd", "pickle", "pth", "npy", "npz", "pkl")}


def test_extensions_are_counted_within_bounds(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"a.x{number}": b"" for number in range(150)})
    loader, batches = load(tmp_path, pattern="a.tar")
    assert batches == [] and len(loader.counts.passed_over) == 101 and loader.counts.passed_over["others"] == 50


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, InputError, "`batch_size` must be at least 1, got 0"),
        ({"num_workers": -1}, InputError, "`num_workers` must be 0 or more, got -1"),
        ({"max_member_bytes": 0}, InputError, "`max_member_bytes` must be at least 1, got 0"),
        ({"on_error": "ignore"}, InputError, "`on_error` must be 'fail' or 'skip', got 'ignore'"),
        ({"rank": 2, "world_size": 2}, InputError, "`rank` must be from 0 to 1, got 2"),
        ({"rank": -1}, InputError, "`rank` must be from 0 to 0, got -1"),
        ({"locations": "pipe:cat x.tar"}, InputError, "is a command"),
        ({"locations": "nowhere://x/a.tar"}, ConfigError, "the scheme `nowhere` is unknown"),
        ({"locations": "https:/h/a.tar"}, ConfigError, "lacks a slash"),
    ],
)
def test_impossible_arguments(folder: Path, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"locations": f"{folder}/test-*.tar", "transform": SETTINGS, "batch_size": 2} | change
    with pytest.raises(error, match=message):
        tar_loader(**arguments)


def test_limits_reach_the_reader(folder: Path) -> None:
    with pytest.raises(DataError, match="has a member that is too large: expected at most 100 bytes"):
        load(folder, 1, max_member_bytes=100)
    with pytest.raises(DataError, match="the image of sample 's/000' has too many pixels: expected at most 99"):
        load(folder, max_pixels=99)
