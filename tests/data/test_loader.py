"""Loaders over real shards: order, workers, resume, damaged images, signals."""

import io
import multiprocessing
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gcahng.data.dataset import Batch, TrainImages
from gcahng.data.eval_loader import eval_loader
from gcahng.data.images.transforms import (
    eval_transform,
    train_draws,
    train_transform,
    transform_settings,
)
from gcahng.data.loader import TrainLoader, train_loader
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.plan import make_plan
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.writer import Sample, ShardWriter
from gcahng.errors import ConfigError, DataError, InputError

SETTINGS = transform_settings("gca_hng", image_size=16)
SIZES = {"seed": 5, "num_classes": 3, "num_samples": 2}
COUNTS = [6, 5, 4, 7, 2, 6]


def encode(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (24, 20 + seed % 9, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(directory: Path, broken: tuple[int, ...] = ()) -> ShardSet:
    """Classes of COUNTS images and one test class of 5, tars of about 12 images.

    The images of the rows in `broken` are cut: the shards are whole, what they hold is not.
    """
    directory.mkdir()
    writer = ShardWriter(directory, shard_bytes=20_000)
    row = 0
    for class_number, count in enumerate([*COUNTS, 5]):
        split = "train" if class_number < len(COUNTS) else "test"
        for _ in range(count):
            content = encode(row)[: 200 if row in broken else None]
            writer.write(Sample(content, "png", f"class {class_number}", split, f"{row}.png"))
            row += 1
    writer.finish("test", 0, {})
    return ShardSet.open(directory)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("loader") / "shards")


def train_table(shards: ShardSet, **options: object) -> ClassTable:
    return ClassTable.build(shards.class_id, shards.split_samples("train"), **options)


def load(shards: ShardSet, num_workers: int = 0, **options: object) -> list[Batch]:
    arguments = SIZES | {"epoch": 1, "transform": SETTINGS} | options
    return list(train_loader(shards, train_table(shards), num_workers=num_workers, **arguments))


def assert_same(got: list[Batch], want: list[Batch]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        for name in ("images", "labels", "rows", "classes"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert (a.num_samples, a.skipped, a.problems) == (b.num_samples, b.skipped, b.problems)


def test_batches_follow_the_plan(shards):
    table = train_table(shards)
    plan = make_plan(table, epoch=1, **SIZES)
    loader = train_loader(shards, table, epoch=1, transform=SETTINGS, num_workers=0, **SIZES)
    batches = list(loader)
    assert len(loader) == len(batches) == len(plan) == 4
    for index, batch in enumerate(batches):
        planned = plan.batch(index)
        assert batch.images.shape == (6, 3, 16, 16) and batch.images.dtype == torch.uint8
        assert batch.rows.tolist() == planned.rows.ravel().tolist()
        assert batch.classes.tolist() == planned.labels.tolist()
        assert batch.labels.tolist() == planned.labels.tolist() * 2
        assert batch.labels.dtype == batch.rows.dtype == batch.classes.dtype == torch.int64
        assert (batch.num_samples, batch.skipped, batch.problems) == (2, 0, ())
        class_ids = torch.from_numpy(table.class_ids)[batch.labels]
        assert torch.equal(class_ids, torch.from_numpy(shards.class_id)[batch.rows])


def test_images_are_drawn_by_their_position_in_the_epoch(shards):
    for index, batch in enumerate(load(shards, sampler="released")):
        for place, row in enumerate(batch.rows.tolist()):
            image = Image.open(io.BytesIO(shards.read(row))).convert("RGB")
            draws = train_draws(5, 1, index * 6 + place)
            assert torch.equal(batch.images[place], train_transform(image, SETTINGS, draws))


@pytest.mark.parametrize("sampler", ["uniform", "released"])
def test_workers_change_nothing(shards, sampler):
    assert_same(load(shards, 2, sampler=sampler), load(shards, 0, sampler=sampler))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_started_epoch_continues_where_it_was_left(shards, num_workers):
    whole = load(shards, 0)
    for start in (1, 3, 4):
        rest = load(shards, num_workers, start_batch=start)
        assert_same(rest, whole[start:])
    loader = train_loader(shards, train_table(shards), epoch=1, start_batch=3, transform=SETTINGS, **SIZES)
    assert len(loader) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_loader_serves_many_epochs(shards, num_workers):
    loader = TrainLoader(shards, train_table(shards), transform=SETTINGS, num_workers=num_workers, **SIZES)
    children = []
    for epoch in (0, 3):
        assert_same(list(loader.epoch_iterator(epoch)), load(shards, 0, epoch=epoch))
        children.append({worker.pid for worker in multiprocessing.active_children()})
    assert len(children[0]) == num_workers and children[0] == children[1]
    # An epoch that is left early does not leak into the next one.
    assert_same([next(iter(loader.epoch_iterator(2)))], load(shards, 0, epoch=2)[:1])
    assert_same(list(loader.epoch_iterator(1, 2)), load(shards, 0, epoch=1)[2:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_epochs_at_once_are_refused(shards, num_workers):
    loader = TrainLoader(shards, train_table(shards), transform=SETTINGS, num_workers=num_workers, **SIZES)
    first = iter(loader.epoch_iterator(0))
    next(first)
    next(iter(loader.epoch_iterator(1)))
    with pytest.raises(InputError, match="iterator of epoch 0 is no longer valid"):
        next(first)


def test_loading_leaves_the_global_generators_alone(shards):
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    load(shards, 0), load(shards, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert pickle.dumps(np.random.get_state()) == numpy_before


def test_small_classes_are_repeated(shards):
    """Class 4 has two images: a batch of three of each class shows one of them twice."""
    batches = load(shards, num_samples=3, num_classes=6)
    for batch in batches:
        rows = batch.rows.view(3, 6)[:, batch.classes.tolist().index(4)]
        assert rows.unique().numel() == 2
    assert len(batches) == 1


def test_batches_move_as_a_whole(shards):
    batch = load(shards)[0]
    moved = batch.to("meta")
    assert moved.images.device.type == moved.rows.device.type == "meta"
    assert moved.num_samples == 2 and moved.images.shape == batch.images.shape


def test_the_data_set_survives_pickling(shards):
    images = TrainImages(shards, train_table(shards), SETTINGS, 5, "fail")
    request = next(iter_requests(shards))
    copy = pickle.loads(pickle.dumps(images))
    assert_same([copy[request]], [images[request]])


def iter_requests(shards: ShardSet):
    loader = TrainLoader(shards, train_table(shards), transform=SETTINGS, **SIZES)
    loader._requests.begin(loader.plan(1), 1, 0)
    return iter(loader._requests)


# --- damaged images -------------------------------------------------------------------------------


def flip_byte(shards: ShardSet, directory: Path, row: int) -> None:
    """Damage the stored bytes of one image."""
    path = directory / shards.manifest.shards[shards.shard[row]].name
    content = bytearray(path.read_bytes())
    content[int(shards.offset[row]) + 60] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cut_image_stops_the_run_with_shard_and_key(tmp_path, num_workers):
    shards = write_shards(tmp_path / "shards", broken=(13,))
    name = shards.manifest.shards[shards.shard[13]].name
    message = rf"^Shard {name}: the image of sample 000000013 cannot be decoded as PNG"
    with pytest.raises(DataError, match=message) as caught:
        load(shards, num_workers, num_classes=6)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_shard_stops_the_run_with_shard_and_key(tmp_path, num_workers):
    shards = write_shards(tmp_path / "shards")
    flip_byte(shards, tmp_path / "shards", 13)
    name = shards.manifest.shards[shards.shard[13]].name
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


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_sees_every_row_once_and_in_order(shards, num_workers):
    rows = np.concatenate([shards.split_samples("test"), shards.split_samples("train")[::-1]])
    loader = eval_loader(shards, rows, transform=SETTINGS, batch_size=4, num_workers=num_workers)
    for _ in range(2):  # it can be iterated again
        batches = list(loader)
        assert [images.shape[0] for images, _, _ in batches] == [4] * 8 + [3]
        assert len(loader) == 9
        assert torch.cat([r for _, _, r in batches]).tolist() == rows.tolist()
        class_ids = torch.cat([c for _, c, _ in batches])
        assert class_ids.dtype == torch.int64
        assert class_ids.tolist() == shards.class_id[rows].tolist()
        images = torch.cat([images for images, _, _ in batches])
        for place, row in enumerate(rows.tolist()):
            image = Image.open(io.BytesIO(shards.read(row))).convert("RGB")
            assert torch.equal(images[place], eval_transform(image, SETTINGS))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_stops_at_an_unreadable_image(tmp_path, num_workers):
    shards = write_shards(tmp_path / "shards", broken=(31,))
    rows = shards.split_samples("test")
    loader = eval_loader(shards, rows, transform=SETTINGS, batch_size=2, num_workers=num_workers)
    with pytest.raises(DataError, match=r"^Shard .*: the image of sample 000000031 cannot be deco"):
        list(loader)


def test_evaluation_of_nothing_is_empty(shards):
    loader = eval_loader(shards, np.array([], int), transform=SETTINGS, batch_size=2)
    assert len(loader) == 0 and list(loader) == []


# --- arguments and processes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"on_error": "ignore"}, InputError, r"`on_error` must be 'fail' or 'skip', got 'ignore'"),
        ({"num_workers": -1}, InputError, r"`num_workers` must be 0 or more, got -1"),
        ({"start_batch": 5}, InputError, r"`start_batch` must be from 0 to 4, got 5: epoch 1 has"),
        ({"start_batch": -1}, InputError, r"`start_batch` must be from 0 to 4, got -1"),
        ({"num_classes": 7}, InputError, r"only 6 training classes"),
        ({"sampler": "balanced"}, ConfigError, r"`sampler` must be one of"),
    ],
)
def test_impossible_arguments_are_named_before_the_first_batch(shards, change, error, message):
    arguments = SIZES | {"epoch": 1, "transform": SETTINGS} | change
    with pytest.raises(error, match=message):
        train_loader(shards, train_table(shards), **arguments)


def test_an_impossible_batch_size_is_named(shards):
    with pytest.raises(InputError, match="`batch_size` must be at least 1, got 0"):
        eval_loader(shards, np.arange(3), transform=SETTINGS, batch_size=0)


def test_workers_leave_signals_to_the_main_process(shards):
    """A scheduler signals the whole group; the step in progress still gets its batches."""
    loader = TrainLoader(shards, train_table(shards), transform=SETTINGS, num_workers=2, **SIZES)
    batches = iter(loader.epoch_iterator(1))
    received = [next(batches)]
    workers = multiprocessing.active_children()
    for worker in workers:
        for name in ("TERM", "INT"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    received.extend(batches)
    assert_same(received, load(shards, 0))
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    loader.close()
    for worker in workers:
        worker.join(timeout=5)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_workers_obey_a_signal_of_their_parent(shards):
    loader = TrainLoader(shards, train_table(shards), transform=SETTINGS, num_workers=1, **SIZES)
    list(loader.epoch_iterator(1))
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(timeout=5)
    assert worker.exitcode == 0


def test_workers_end_at_an_error(tmp_path):
    shards = write_shards(tmp_path / "shards", broken=(13, 31))
    sizes = SIZES | {"num_classes": 6}
    loader = TrainLoader(shards, train_table(shards), transform=SETTINGS, num_workers=2, **sizes)
    with pytest.raises(DataError) as train_error:
        list(loader.epoch_iterator(1))
    test_rows = shards.split_samples("test")
    with pytest.raises(DataError) as eval_error:
        list(eval_loader(shards, test_rows, transform=SETTINGS, batch_size=2, num_workers=2))
    # The tracebacks are still alive here, and hold what they hold.
    assert train_error.tb is not None and eval_error.tb is not None
    assert multiprocessing.active_children() == []
