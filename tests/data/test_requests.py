"""What the image source is told of the shards that come next."""

import numpy as np

from gcahng.data.plans.batch_plan import BatchPlan
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.plan import make_plan
from gcahng.data.plans.shard_layout import ShardLayout
from gcahng.data.requests import Requests

EVERYTHING = slice(0, 3)


def windowed_table(window_bytes: int) -> ClassTable:
    """12 tars of 3 classes of 8 images, 800 bytes a class."""
    layout = ShardLayout.build([24] * 12, [2400] * 12, window_bytes)
    return ClassTable.build(np.repeat(np.arange(36), 8), layout=layout)


def announced(table: ClassTable, in_flight: int, epochs: int = 1, start_batch: int = 0, **options):
    """(batches asked for before, present, following) of every announcement, and the plans."""
    told: list[tuple[int, list[int], list[int]]] = []
    asked = 0

    def expect(present: np.ndarray, following: np.ndarray) -> None:
        told.append((asked, present.tolist(), following.tolist()))

    requests = Requests(EVERYTHING, expect, lambda: np.arange(12, dtype=np.int32), in_flight)
    plans = [make_plan(table, seed=0, epoch=e, num_classes=3, num_samples=2, **options) for e in range(epochs)]
    for epoch, plan in enumerate(plans):
        requests.begin(plan, epoch, start_batch)
        for _ in requests:
            asked += 1
    return told, plans


def test_each_window_is_announced_with_the_one_after_it():
    told, (plan,) = announced(windowed_table(4800), in_flight=1)
    assert told[0][0] == 0
    starts = [entry[0] for entry in told]
    for index in range(len(plan)):
        present, following = (part.tolist() for part in plan.shards(index))
        _, now, after = told[np.searchsorted(starts, index, side="right") - 1]
        assert (now, after) == (present, following)
    # 6 windows of two tars, and borders between them.
    assert 6 <= len(told) <= 11
    for earlier, later in zip(told, told[1:], strict=False):
        assert set(later[1]) <= set(earlier[1]) | set(earlier[2]), "a shard is read that nobody announced"


def test_the_next_epoch_follows_the_last_window():
    told, plans = announced(windowed_table(4800), in_flight=1, epochs=2)
    first_of_second = next(entry for entry in told if entry[0] == len(plans[0]))
    last_of_first = [entry for entry in told if entry[0] < len(plans[0])][-1]
    assert set(first_of_second[1]) <= set(last_of_first[2])


def test_shards_of_unanswered_requests_stay():
    table = windowed_table(4800)
    told, (plan,) = announced(table, in_flight=5)
    for index in range(len(plan)):
        asked_then = [entry for entry in told if entry[0] <= index][-1][1]
        still_read = {s for i in range(max(0, index - 4), index + 1) for s in plan.shards(i)[0].tolist()}
        assert still_read == set(asked_then)


def test_a_resumed_epoch_announces_where_it_begins():
    table = windowed_table(4800)
    told, (plan,) = announced(table, in_flight=1, start_batch=30)
    assert told[0][1:] == tuple(part.tolist() for part in plan.shards(30))


def test_one_window_is_announced_once():
    told, _ = announced(windowed_table(10**9), in_flight=3, epochs=3)
    assert told == [(0, list(range(12)), list(range(12)))]


def test_a_plan_without_windows_reads_everything():
    told, _ = announced(windowed_table(4800), in_flight=3, epochs=3, sampler="released")
    assert told == [(0, list(range(12)), [])]


def test_a_table_without_shards_announces_nothing():
    told, _ = announced(ClassTable.build(np.repeat(np.arange(36), 8)), in_flight=3)
    assert told == []


class Counted:
    """A plan of three batches with repairs, 5 classes x 2 images."""

    def __len__(self) -> int:
        return 3

    def batch(self, index: int) -> BatchPlan:
        return BatchPlan(np.arange(5) + index, np.arange(10).reshape(2, 5) + 100 * index, repaired=index + 4)


def test_ranks_ask_for_their_columns_with_places_of_the_whole_batch():
    asked = []
    for classes in (slice(0, 2), slice(2, 4), slice(4, 5)):
        requests = Requests(classes, None, lambda: np.arange(12, dtype=np.int32), 1)
        requests.begin(Counted(), 6, 1)
        asked.append(list(requests))
    for index, parts in enumerate(zip(*asked, strict=True), 1):
        plan = Counted().batch(index)
        assert [part.epoch for part in parts] == [6, 6, 6]
        assert np.array_equal(np.concatenate([part.labels for part in parts]), plan.labels)
        assert np.array_equal(np.concatenate([part.rows for part in parts], axis=1), plan.rows)
        places = np.concatenate([part.positions for part in parts], axis=1)
        assert np.array_equal(places, np.arange(10 * index, 10 * index + 10).reshape(2, 5))
        assert [part.repaired for part in parts] == [index + 4, 0, 0]
