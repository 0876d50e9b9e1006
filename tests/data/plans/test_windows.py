"""Windows of the sampler "uniform": which shards they are, and that the guarantees hold across them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.plan import coverage_epochs, make_plan
from gcahng.data.plans.shard_layout import ShardLayout
from gcahng.data.plans.windows import ShardGrouping, home_shards, training_shards


def sharded_table(
    counts: list[int], shards: list[list[int]], window_bytes: int, *, drop: tuple[int, ...] = ()
) -> ClassTable:
    """A class-major set: `shards` names each tar's classes in order; a class named in several tars is split evenly.

    A tar has 100 bytes per image. Classes in `drop` lie in the tars but not in the table.
    """
    tars_of = [sum(c in tar for tar in shards) for c in range(len(counts))]
    left, seen = list(counts), [0] * len(counts)
    class_id, num_samples = [], []
    for tar in shards:
        before = len(class_id)
        for c in tar:
            seen[c] += 1
            share = left[c] if seen[c] == tars_of[c] else counts[c] // tars_of[c]
            left[c] -= share
            class_id += [c] * share
        num_samples.append(len(class_id) - before)
    ids = np.array(class_id)
    layout = ShardLayout.build(num_samples, [100 * n for n in num_samples], window_bytes)
    return ClassTable.build(ids, np.flatnonzero(~np.isin(ids, drop)), layout=layout)


@st.composite
def cases(draw):
    counts = draw(st.lists(st.integers(1, 9), min_size=4, max_size=40))
    order = draw(st.permutations(range(len(counts))))
    cuts = sorted(draw(st.sets(st.integers(1, len(counts) - 1), max_size=10)))
    shards = [list(part) for part in np.split(np.array(order), cuts)]
    for at in range(len(shards) - 1):
        # A large class may go on in the next tar, as the converter writes it.
        if counts[shards[at][-1]] > 1 and draw(st.integers(0, 4)) == 0:
            shards[at + 1].insert(0, shards[at][-1])
    num_classes = draw(st.integers(1, max(1, len(counts) // 2)))
    sizes = {"num_classes": num_classes, "num_samples": draw(st.integers(1, 4))}
    table = sharded_table(counts, shards, draw(st.integers(1, 2000)))
    return table, sizes, draw(st.integers(0, 3))


def grouping(table: ClassTable, num_classes: int) -> ShardGrouping:
    return ShardGrouping(table, home_shards(table, table.layout), table.layout, num_classes)


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(0, 30))
def test_windows_divide_the_shards(case, epoch):
    table, sizes, seed = case
    layout, num_classes = table.layout, sizes["num_classes"]
    homes = [int(layout.shard_of(table.rows_of(label)[:1])[0]) for label in range(table.num_classes)]
    windows = grouping(table, num_classes).windows(seed, epoch)
    assert sorted(home for window in windows for home in window.homes.tolist()) == sorted(set(homes))
    for window in windows:
        inside = [label for label in range(table.num_classes) if homes[label] in window.homes]
        assert window.num_classes == len(inside)
        rows = np.concatenate([table.rows_of(label) for label in inside])
        assert window.shards.tolist() == sorted(set(layout.shard_of(rows).tolist()))
        if len(windows) > 1:
            assert window.num_classes >= 2 * num_classes
            assert layout.sizes[window.shards].sum() >= layout.window_bytes
            # It is as small as that allows, but for the last one, which takes what is left.
            shorter = grouping_prefix(table, homes, window.homes[:-1])
            if window is not windows[-1]:
                assert len(shorter[0]) < 2 * num_classes or shorter[1] < layout.window_bytes


def grouping_prefix(table: ClassTable, homes: list[int], chosen: np.ndarray) -> tuple[list[int], int]:
    """Labels of some home shards and the bytes of all shards that these labels reach into."""
    labels = [label for label, home in enumerate(homes) if home in chosen]
    touched = {int(s) for label in labels for s in table.layout.shard_of(table.rows_of(label))}
    return labels, sum(int(table.layout.sizes[s]) for s in touched)


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(0, 30))
def test_batches_read_the_shards_of_their_windows_alone(case, epoch):
    table, sizes, seed = case
    layout, num_classes = table.layout, sizes["num_classes"]
    plan = make_plan(table, seed=seed, epoch=epoch, **sizes)
    windows = grouping(table, num_classes).windows(seed, epoch)
    next_first = grouping(table, num_classes).windows(seed, epoch + 1)[0]
    window_of = {home: number for number, window in enumerate(windows) for home in window.homes.tolist()}
    homes = home_shards(table, layout)
    at = 0
    visits = len(plan) * num_classes // table.num_classes
    for index in range(len(plan)):
        batch = plan.batch(index)
        touched = sorted({window_of[int(homes[label])] for label in batch.labels})
        assert touched[0] >= at, "a window that was left comes again"
        at = touched[-1]
        if visits:
            assert len(touched) <= 2 and touched[-1] - touched[0] == len(touched) - 1
        present, following = plan.shards(index)
        assert present.tolist() == sorted({s for w in touched for s in windows[w].shards.tolist()})
        assert set(layout.shard_of(batch.rows.ravel()).tolist()) <= set(present.tolist())
        if visits:
            after = windows[at + 1] if at + 1 < len(windows) else next_first
            assert following.tolist() == after.shards.tolist()


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(0, 30))
def test_batches_are_distinct_and_visits_even(case, epoch):
    table, sizes, seed = case
    plan, visits = make_plan(table, seed=seed, epoch=epoch, **sizes), np.zeros(table.num_classes, int)
    for index in range(len(plan)):
        batch = plan.batch(index)
        assert batch.labels.shape == (sizes["num_classes"],) and batch.repaired == 0
        visits[batch.labels] += 1
        assert np.unique(batch.labels).size == batch.labels.size
        for place, label in enumerate(batch.labels.tolist()):
            images = table.rows_of(label)
            assert np.isin(batch.rows[:, place], images).all()
            if images.size >= sizes["num_samples"]:
                assert np.unique(batch.rows[:, place]).size == sizes["num_samples"]
    assert visits.max() - visits.min() <= 1
    if len(plan) * sizes["num_classes"] >= table.num_classes:
        assert visits.min() >= 1


@settings(max_examples=50, deadline=None)
@given(cases())
def test_every_image_is_shown_in_time(case):
    table, sizes, seed = case
    seen, visits = set(), np.zeros(table.num_classes, int)
    for epoch in range(coverage_epochs(table, **sizes)):
        plan = make_plan(table, seed=seed, epoch=epoch, **sizes)
        for index in range(len(plan)):
            batch = plan.batch(index)
            visits[batch.labels] += 1
            seen.update(batch.rows.ravel().tolist())
        assert visits.max() - visits.min() <= 1
    assert seen == set(table.rows.tolist())


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 9), st.data())
def test_any_order_of_calls_gives_the_same_batches(case, epoch, data):
    table, sizes, seed = case
    plan = make_plan(table, seed=seed, epoch=epoch, **sizes)
    forward = [plan.batch(index) for index in range(len(plan))]
    for index in data.draw(st.lists(st.integers(0, len(plan) - 1), max_size=8)):
        for again in (plan.batch(index), make_plan(table, seed=seed, epoch=epoch, **sizes).batch(index)):
            assert np.array_equal(again.labels, forward[index].labels)
            assert np.array_equal(again.rows, forward[index].rows)


EIGHT = [[4 * tar + i for i in range(4)] for tar in range(8)]  # 8 tars of 4 classes


def test_windows_change_the_order_of_an_epoch_and_not_its_visits():
    small, large = (sharded_table([6] * 32, EIGHT, size) for size in (4800, 10**6))
    order = {}
    for name, table in (("windows", small), ("one", large)):
        plan = make_plan(table, seed=1, epoch=3, num_classes=3, num_samples=2)
        batches = [plan.batch(index) for index in range(len(plan))]
        order[name] = np.concatenate([batch.labels for batch in batches])
        shown = np.sort(np.concatenate([batch.rows.ravel() for batch in batches]))
        order[name + " images"] = shown
    assert not np.array_equal(order["windows"], order["one"])
    for kind in ("", " images"):
        assert np.array_equal(np.sort(order["windows" + kind]), np.sort(order["one" + kind]))


def test_one_window_is_the_plan_without_windows():
    table, bare = sharded_table([6] * 32, EIGHT, 19200), ClassTable.build(np.repeat(np.arange(32), 6))
    for epoch in range(4):
        plans = [make_plan(t, seed=1, epoch=epoch, num_classes=5, num_samples=3) for t in (table, bare)]
        for index in range(len(plans[0])):
            assert np.array_equal(plans[0].batch(index).rows, plans[1].batch(index).rows)
        assert plans[0].shards(0)[0].tolist() == plans[0].shards(0)[1].tolist() == list(range(8))
        assert plans[1].shards(0)[0].size == plans[1].shards(0)[1].size == 0


@pytest.mark.parametrize("num_samples", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [3, 5, 7])
def test_no_border_of_rounds_or_windows_repeats_a_class(num_classes, num_samples):
    """Windows of 8 or 16 classes that begin anywhere in a batch, with up to six rounds each."""
    table = sharded_table([6] * 32, EIGHT, 4800)
    for seed in range(12):
        plan = make_plan(table, seed=seed, epoch=seed, num_classes=num_classes, num_samples=num_samples)
        assert len({tuple(plan.shards(index)[0]) for index in range(len(plan))}) >= 2
        for index in range(len(plan)):
            assert np.unique(plan.batch(index).labels).size == num_classes


def test_windows_are_drawn_anew_by_seed_and_epoch():
    table = sharded_table([6] * 32, EIGHT, 4800)
    orders = {
        tuple(tuple(window.homes.tolist()) for window in grouping(table, 3).windows(seed, epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9 and {len(order) for order in orders} == {4}
    first = [grouping(table, 3).windows(0, epoch)[0].homes[0] for epoch in range(800)]
    assert np.abs(np.bincount(first) - 100).max() < 50  # 100 expected, deviation 9.4


def test_a_windows_rounds_differ_from_each_other_and_between_windows():
    """Visits inside a window come in fresh orders: no pair of classes is bound together."""
    table, met = sharded_table([6] * 32, EIGHT, 4800), np.zeros((32, 32), bool)
    for epoch in range(100):
        plan = make_plan(table, seed=0, epoch=epoch, num_classes=4, num_samples=2)
        for index in range(len(plan)):
            labels = plan.batch(index).labels
            met[np.ix_(labels, labels)] = True
    assert met.all()


def test_coverage_of_all_small_sets():
    """Every number of classes, P, K and window size in reach, with windows of one to three tars."""
    for num_classes, batch_classes, num_samples in itertools.product(range(4, 9), (1, 2, 3), (1, 2, 3)):
        counts = [1 + (3 * c + num_classes) % 5 for c in range(num_classes)]
        for per_tar, window_bytes in itertools.product((1, 3), (1, 900)):
            tars = [list(range(c, min(c + per_tar, num_classes))) for c in range(0, num_classes, per_tar)]
            table = sharded_table(counts, tars, window_bytes)
            sizes = {"num_classes": batch_classes, "num_samples": num_samples}
            stated, seen = coverage_epochs(table, **sizes), set()
            for epoch in range(stated):
                plan = make_plan(table, seed=num_classes, epoch=epoch, **sizes)
                for index in range(len(plan)):
                    seen.update(plan.batch(index).rows.ravel().tolist())
            assert len(seen) == table.num_samples, (num_classes, sizes, per_tar, window_bytes)


def test_small_shards_gather_until_there_are_classes_enough():
    table = sharded_table([6] * 32, EIGHT, 1)
    windows = grouping(table, 7).windows(0, 0)
    assert [window.num_classes for window in windows] == [16, 16]


@pytest.mark.parametrize("epoch", range(4))
def test_a_class_brings_all_its_shards_along(epoch):
    """Class 4 fills tar 1 from the middle on, all of tar 2 and the beginning of tar 3."""
    shards = [[0, 1, 2], [3, 4], [4], [4, 5, 6], [7, 8, 9]]
    table = sharded_table([6, 6, 6, 6, 60, 6, 6, 6, 6, 6], shards, 1)
    windows = grouping(table, 1).windows(0, epoch)
    (with_4,) = [window for window in windows if 1 in window.homes]
    assert {1, 2, 3} <= set(with_4.shards.tolist())
    (with_5,) = [window for window in windows if 3 in window.homes]
    assert 3 in with_5.shards and (with_5 is with_4 or 1 not in with_5.shards)
    assert not any(2 in window.homes for window in windows)


def test_a_scattered_class_brings_all_its_shards_along():
    ids = np.array([0, 1, 0, 2, 3, 3, 0, 4, 4, 5, 5, 5])
    layout = ShardLayout.build([2, 2, 2, 3, 3], [200, 200, 200, 300, 300], 1)
    table = ClassTable.build(ids, layout=layout)
    windows = grouping(table, 1).windows(0, 0)
    (with_0,) = [window for window in windows if 0 in window.homes]
    assert {0, 1, 3} <= set(with_0.shards.tolist())
    assert training_shards(table).tolist() == [0, 1, 2, 3, 4]


def test_shards_without_training_classes_are_never_read():
    table = sharded_table([6] * 32, EIGHT, 1, drop=tuple(range(8, 12)))
    assert training_shards(table).tolist() == [0, 1, 3, 4, 5, 6, 7]
    shards = {s for window in grouping(table, 2).windows(0, 0) for s in window.shards.tolist()}
    assert shards == {0, 1, 3, 4, 5, 6, 7}
    assert training_shards(ClassTable.build(np.arange(4))).size == 0
