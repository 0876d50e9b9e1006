"""Damaged images in real shards: which one is named, which one takes its place."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_cases import SETTINGS, SIZES, assert_same, load, train_table, write_shards
from PIL import Image

from gcahng.data.eval_loader import eval_loader
from gcahng.data.images.transforms import train_draws, train_transform, transform_settings
from gcahng.data.plans.plan import make_plan
from gcahng.data.shards.reader import ShardSet
from gcahng.errors import DataError


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("loader") / "shards")


def flip_byte(shards: ShardSet, directory: Path, row: int) -> None:
    """Damage the stored bytes of one image."""
    path = directory / shards.shard_name(row)
    content = bytearray(path.read_bytes())
    content[shards.record(row).offset + 60] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cut_image_stops_the_run_with_shard_and_key(tmp_path, num_workers):
    shards = write_shards(tmp_path / "shards", broken=(13,))
    name = shards.shard_name(13)
    message = rf"^Shard {name}: the image of sample 000000013 cannot be decoded as PNG"
    with pytest.raises(DataError, match=message) as caught:
        load(shards, num_workers, num_classes=6)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_shard_stops_the_run_with_shard_and_key(tmp_path, num_workers):
    shards = write_shards(tmp_path / "shards")
    flip_byte(shards, tmp_path / "shards", 13)
    name = shards.shard_name(13)
    with pytest.raises(DataError, match=rf"Shard {name}: .* sample 000000013 is damaged: .*crc32"):
        load(shards, num_workers, num_classes=6)


def test_skipping_takes_the_next_image_of_the_class(tmp_path):
    """Rows 11 to 14 are class 2; 12 is damaged in the shard and 13 is cut."""
    shards = write_shards(tmp_path / "shards", broken=(13,))
    flip_byte(shards, tmp_path / "shards", 12)
    skipped = 0
    for epoch in range(6):
        plan = make_plan(train_table(shards), epoch=epoch, **SIZES)
        want = load(write_shards(tmp_path / f"whole {epoch}"), epoch=epoch)
        for index, batch in enumerate(load(shards, epoch=epoch, on_error="skip")):
            planned = plan.batch(index).rows
            expected, here = replaced(planned, {12, 13}, range(11, 15))
            assert batch.rows.tolist() == expected.ravel().tolist()
            assert batch.skipped == len(batch.problems) == here
            assert batch.images.shape == (6, 3, 16, 16)
            same = torch.from_numpy(expected == planned).ravel()
            assert torch.equal(batch.images[same], want[index].images[same])
            skipped += here
    assert skipped >= 6


def replaced(planned: np.ndarray, broken: set[int], class_rows: range) -> tuple[np.ndarray, int]:
    """Plainly: each broken image gives way to the next good one that its column does not hold."""
    rows, count = planned.copy(), 0
    order = list(class_rows)
    for place in range(rows.shape[1]):
        for group in range(rows.shape[0]):
            if rows[group, place] in broken:
                after = order.index(rows[group, place])
                ring = order[after + 1 :] + order[:after]
                good = [row for row in ring if row not in broken]
                unused = [row for row in good if row not in rows[:, place]]
                rows[group, place] = (unused or good)[0]
                count += 1
    return rows, count


def test_skipped_images_are_named_and_workers_change_nothing(tmp_path):
    shards = write_shards(tmp_path / "shards", broken=(13, 2, 30))
    batches = load(shards, 0, num_classes=6, on_error="skip", epoch=0)
    problems = [problem for batch in batches for problem in batch.problems]
    assert any("sample 000000013 cannot be decoded" in problem for problem in problems)
    assert_same(load(shards, 2, num_classes=6, on_error="skip", epoch=0), batches)


def test_a_replacement_is_drawn_like_the_image_it_replaces(tmp_path):
    shards = write_shards(tmp_path / "shards", broken=(22,))  # 22 and 23 are class 4
    batch = load(shards, num_classes=6, on_error="skip")[0]
    column = batch.classes.tolist().index(4)
    assert batch.rows.view(2, 6)[:, column].tolist() == [23, 23] and batch.skipped == 1
    image = Image.open(io.BytesIO(shards.read(23))).convert("RGB")
    for place in (column, 6 + column):
        expected = train_transform(image, SETTINGS, train_draws(5, 1, place))
        assert torch.equal(batch.images[place], expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_class_without_a_readable_image_is_an_error(tmp_path, num_workers):
    shards = write_shards(tmp_path / "shards", broken=(22, 23))
    message = r"Class 4 has no readable image: expected at least one of 2, .*sample 0000000(22|23)"
    with pytest.raises(DataError, match=message):
        load(shards, num_workers, num_classes=6, on_error="skip")


def test_an_image_too_small_for_its_crop_is_named(shards):
    settings = transform_settings("sct_cub", train_resize=None)
    with pytest.raises(DataError, match=r"^Shard .*: the image of sample \d{9}: the image has .* 24"):
        load(shards, transform=settings)


def test_the_pixel_limit_reaches_the_workers(shards):
    with pytest.raises(DataError, match=r"^Shard .*: .* has too many pixels: expected at most 100"):
        load(shards, 2, max_pixels=100)
    rows = shards.split_samples("test")
    with pytest.raises(DataError, match="expected at most 100"):
        list(eval_loader(shards, rows, transform=SETTINGS, batch_size=2, max_pixels=100))
