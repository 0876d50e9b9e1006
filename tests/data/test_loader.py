"""Loaders over real shards: order, workers, ranks, resume, signals."""

import io
import multiprocessing
import pickle
import subprocess
from multiprocessing.process import BaseProcess

import numpy as np
import pytest
import torch
from loader_cases import SETTINGS, SIZES, assert_same, load, train_table, write_shards
from PIL import Image

from gcahng.data.dataset import TrainImages
from gcahng.data.eval_loader import eval_loader
from gcahng.data.images.transforms import eval_transform, train_draws, train_transform
from gcahng.data.loader import TrainLoader, train_loader
from gcahng.data.plans.plan import make_plan
from gcahng.data.shards.reader import ShardSet
from gcahng.errors import ConfigError, DataError, InputError


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("loader") / "shards")


def children_since(before: set[int]) -> list[BaseProcess]:
    """Processes that this test began; those of another one may take seconds to end on a busy machine."""
    return [child for child in multiprocessing.active_children() if child.pid not in before]


@pytest.fixture
def before() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


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
        class_ids = torch.from_numpy(table.class_ids.astype(np.int64))[batch.labels]
        assert torch.equal(class_ids, torch.from_numpy(shards.class_ids(batch.rows)))


def test_images_are_drawn_by_their_position_in_the_epoch(shards):
    for index, batch in enumerate(load(shards, sampler="released")):
        for place, row in enumerate(batch.rows.tolist()):
            image = Image.open(io.BytesIO(shards.read(row))).convert("RGB")
            draws = train_draws(5, 1, index * 6 + place)
            assert torch.equal(batch.images[place], train_transform(image, SETTINGS, draws))


def test_ranks_share_the_batches_and_know_all_sizes(shards):
    """See test_ranks.py for ranks in processes of their own."""
    whole, table = load(shards, num_classes=5), train_table(shards)
    options = SIZES | {"num_classes": 5, "transform": SETTINGS}
    loaders = [TrainLoader(shards, table, rank=rank, world_size=3, **options) for rank in range(3)]
    assert {loader.rank_sizes for loader in loaders} == {(2, 2, 1)}
    parts = [list(loader.epoch_iterator(1)) for loader in loaders]
    for batches in zip(whole, *parts, strict=True):
        batch, mine = batches[0], batches[1:]
        assert torch.equal(torch.cat([part.classes for part in mine]), batch.classes)
        for name in ("images", "labels", "rows"):
            joined = torch.cat([getattr(part, name).unflatten(0, (2, -1)) for part in mine], 1)
            assert torch.equal(joined.flatten(0, 1), getattr(batch, name)), name


def test_repairs_of_the_sampler_are_counted(shards):
    options = {"sampler": "sample", "passes": 20, "num_classes": 4}
    plan = make_plan(train_table(shards), epoch=1, **(SIZES | options))
    batches = load(shards, 2, **options)
    assert [batch.repaired for batch in batches] == [plan.batch(i).repaired for i in range(len(plan))]
    assert len(batches) == 30 and sum(batch.repaired for batch in batches) > 5


@pytest.mark.parametrize("sampler", ["uniform", "released", "filled", "sample"])
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
def test_one_loader_serves_many_epochs(shards, before, num_workers):
    loader = TrainLoader(shards, train_table(shards), transform=SETTINGS, num_workers=num_workers, **SIZES)
    children = []
    for epoch in (0, 3):
        assert_same(list(loader.epoch_iterator(epoch)), load(shards, 0, epoch=epoch))
        children.append({worker.pid for worker in children_since(before)})
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
        assert class_ids.tolist() == shards.class_ids(rows).tolist()
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
        ({"passes": 2}, ConfigError, r"`passes` is 2, but an epoch of the sampler 'uniform'"),
        ({"world_size": 4}, InputError, r"`num_classes` .* expected 4 or more, got 3"),
        ({"rank": 2, "world_size": 2}, InputError, r"`rank` must be from 0 to 1, got 2"),
    ],
)
def test_impossible_arguments_are_named_before_the_first_batch(shards, change, error, message):
    arguments = SIZES | {"epoch": 1, "transform": SETTINGS} | change
    with pytest.raises(error, match=message):
        train_loader(shards, train_table(shards), **arguments)


def test_an_impossible_batch_size_is_named(shards):
    with pytest.raises(InputError, match="`batch_size` must be at least 1, got 0"):
        eval_loader(shards, np.arange(3), transform=SETTINGS, batch_size=0)


def test_workers_leave_signals_to_the_main_process(shards, before):
    """A scheduler signals the whole group; the step in progress still gets its batches."""
    loader = TrainLoader(shards, train_table(shards), transform=SETTINGS, num_workers=2, **SIZES)
    batches = iter(loader.epoch_iterator(1))
    received = [next(batches)]
    workers = children_since(before)
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


def test_workers_obey_a_signal_of_their_parent(shards, before):
    loader = TrainLoader(shards, train_table(shards), transform=SETTINGS, num_workers=1, **SIZES)
    list(loader.epoch_iterator(1))
    (worker,) = children_since(before)
    worker.terminate()
    worker.join(timeout=5)
    assert worker.exitcode == 0


def test_workers_end_at_an_error(tmp_path, before):
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
    assert children_since(before) == []
