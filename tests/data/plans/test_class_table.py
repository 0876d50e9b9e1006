"""The class table: labels, small classes, held-out classes, and its messages."""

from pathlib import Path

import numpy as np
import pytest

from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.validation_classes import split_validation
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.writer import Sample, ShardWriter
from gcahng.errors import DataError, InputError

CLASS_ID = np.array([7, 3, 7, 9, 3, 3, 5, 7])


def test_labels_count_class_ids_in_ascending_order():
    table = ClassTable.build(CLASS_ID)
    assert table.num_classes == 4 and table.num_samples == 8
    assert table.class_ids.tolist() == [3, 5, 7, 9]
    assert [table.rows_of(label).tolist() for label in range(4)] == [[1, 4, 5], [6], [0, 2, 7], [3]]
    assert table.counts.tolist() == [3, 1, 3, 1]


def test_only_the_given_rows_are_taken_whatever_their_order():
    table = ClassTable.build(CLASS_ID, np.array([7, 4, 0]))
    assert table.class_ids.tolist() == [3, 7]
    assert table.rows.tolist() == [4, 0, 7]


def test_rows_and_labels_of_an_unsorted_set_agree():
    rng = np.random.default_rng(0)
    class_id = rng.integers(100, 160, 2000)
    rows = rng.permutation(2000)[:1500]
    table = ClassTable.build(class_id, rows)
    for label in range(table.num_classes):
        expected = np.sort(rows[class_id[rows] == table.class_ids[label]])
        assert np.array_equal(table.rows_of(label), expected)


def test_small_classes_are_repeated_and_listed():
    table = ClassTable.build(CLASS_ID, samples_per_class=2)
    assert table.num_classes == 4
    assert table.repeated.tolist() == [5, 9] and table.dropped.size == 0


def test_small_classes_are_dropped_and_listed():
    table = ClassTable.build(CLASS_ID, samples_per_class=2, small_classes="drop")
    assert table.class_ids.tolist() == [3, 7] and table.rows.tolist() == [1, 4, 5, 0, 2, 7]
    assert table.dropped.tolist() == [5, 9] and table.repeated.size == 0


def test_nothing_is_listed_where_every_class_is_large_enough():
    table = ClassTable.build(CLASS_ID, samples_per_class=1, small_classes="drop")
    assert table.dropped.size == 0 and table.repeated.size == 0 and table.num_classes == 4


def test_validation_holds_out_whole_classes():
    class_id = np.repeat(np.arange(100, 140), 3)
    table = ClassTable.build(class_id)
    train, held_out = split_validation(table, 0.25, seed=1)
    assert held_out.size == 10 and train.num_classes == 30
    assert np.array_equal(np.union1d(train.class_ids, held_out), table.class_ids)
    rows = table.rows_of_classes(held_out)
    assert np.array_equal(rows, np.flatnonzero(np.isin(class_id, held_out)))
    assert np.array_equal(np.sort(np.concatenate([rows, train.rows])), np.arange(120))
    assert np.array_equal(class_id[train.rows_of(4)], np.full(3, train.class_ids[4]))


def test_validation_is_a_function_of_the_seed():
    table = ClassTable.build(np.arange(50))
    first, again, other = (split_validation(table, 0.3, seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_validation_of_nothing_changes_nothing():
    table = ClassTable.build(CLASS_ID)
    train, held_out = split_validation(table, 0.0, seed=0)
    assert held_out.size == 0 and np.array_equal(train.rows, table.rows)


def test_small_classes_stay_listed_only_where_they_stay():
    table = ClassTable.build(np.repeat(np.arange(20), 1 + np.arange(20) % 2), samples_per_class=2)
    train, held_out = split_validation(table, 0.5, seed=0)
    assert np.array_equal(train.repeated, np.setdiff1d(np.arange(0, 20, 2), held_out))


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_are_taken_by_label_and_place(shuffled):
    rng = np.random.default_rng(0)
    class_id = np.repeat(rng.permutation(30), rng.integers(1, 9, 30))
    class_id = rng.permutation(class_id) if shuffled else class_id
    table = ClassTable.build(class_id)
    assert (table.scattered.size > 0) == shuffled
    labels = rng.integers(0, 30, (4, 50))
    places = rng.integers(0, table.counts[labels])
    want = [table.rows_of(int(label))[place] for label, place in zip(labels.flat, places.flat, strict=True)]
    assert table.take(labels, places).ravel().tolist() == want
    assert np.array_equal(table.rows, np.concatenate([table.rows_of(label) for label in range(30)]))


def test_a_class_in_a_row_takes_no_list_of_rows():
    """A class-major set, in any order of classes: two numbers of 4 bytes and one of 2 for each."""
    order = np.random.default_rng(0).permutation(1000)
    table = ClassTable.build(np.repeat(order, 1 + order % 5))
    assert table.scattered.size == 0
    assert [a.itemsize for a in (table.class_ids, table.firsts, table.lengths)] == [4, 4, 2]
    assert table.rows_of(7).tolist() == np.flatnonzero(np.repeat(order, 1 + order % 5) == 7).tolist()


def test_scattered_classes_keep_their_rows_when_others_leave():
    class_id = np.array([4, 4, 1, 2, 1, 3, 3, 2, 0, 4])
    table = ClassTable.build(class_id)
    assert table.firsts.tolist()[0] == 8 and (table.firsts[[1, 2, 4]] < 0).all() and table.firsts[3] == 5
    kept = table.select(np.array([0, 2, 4]))
    assert [kept.rows_of(label).tolist() for label in range(3)] == [[8], [3, 7], [0, 1, 9]]
    assert kept.scattered.tolist() == [3, 7, 0, 1, 9]
    assert table.select(np.array([0, 3])).scattered.size == 0


def test_numbers_that_need_more_bytes_have_them():
    wide = ClassTable.build(np.array([5, 2**40, 5]))
    assert wide.class_ids.dtype == np.int64 and wide.class_ids.tolist() == [5, 2**40]
    long = ClassTable.build(np.zeros(40_000, int))
    assert long.counts.tolist() == [40_000] and long.num_samples == 40_000


def write_shards(directory: Path, classes: list[tuple[str, int, str]], shard_bytes: int) -> ShardSet:
    """Tars of images that nobody decodes: (class, images, split) in writing order."""
    directory.mkdir()
    writer = ShardWriter(directory, shard_bytes=shard_bytes)
    for name, count, split in classes:
        for number in range(count):
            writer.write(Sample(b"x" * 600, "png", name, split, f"{name} {number}"))
    writer.finish("test", 0, {}, window_bytes=5000)
    return ShardSet.open(directory)


MIXED = [("b", 3, "train"), ("a", 30, "train"), ("d", 1, "train"), ("q", 4, "test"), ("c", 7, "train")]


@pytest.mark.parametrize("small_classes", ["repeat", "drop"])
def test_the_table_of_a_split_is_that_of_its_rows(tmp_path, small_classes):
    shards = write_shards(tmp_path / "shards", MIXED, shard_bytes=8000)
    options = {"samples_per_class": 2, "small_classes": small_classes}
    table = ClassTable.from_shards(shards, "train", **options)
    want = ClassTable.build(shards.class_ids(), shards.split_samples("train"), **options)
    for name in ("class_ids", "firsts", "lengths", "rows", "scattered", "repeated", "dropped"):
        assert np.array_equal(getattr(table, name), getattr(want, name)), name
    assert table.num_samples == 41 - (small_classes == "drop")
    assert len(shards.manifest.shards) > 3
    layout = table.layout
    assert layout.window_bytes == 5000
    assert layout.sizes.tolist() == [info.bytes for info in shards.manifest.shards]
    rows = np.arange(len(shards))
    assert np.array_equal(layout.shard_of(rows), shards.shard_of(rows))
    validation_free, _ = split_validation(table, 0.4, seed=0)
    assert validation_free.layout is layout


def test_an_unknown_split_is_named(tmp_path):
    shards = write_shards(tmp_path / "shards", MIXED, shard_bytes=8000)
    with pytest.raises(DataError, match="Split 'validation' does not exist"):
        ClassTable.from_shards(shards, "validation")
    with pytest.raises(InputError, match=r"must be 'repeat' or 'drop', got 'pad'"):
        ClassTable.from_shards(shards, "train", small_classes="pad")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_id": np.array([0.0, 1.0])}, r"`class_id` must be .* integers, got float64"),
        ({"class_id": np.array(["a"])}, r"`class_id` must be .* integers, got <U1"),
        ({"rows": np.array([[1]])}, r"`rows` must be a one-dim.* of shape \(1, 1\)"),
        ({"rows": np.array([], int)}, r"`rows` is empty: expected at least one training image"),
        ({"rows": np.array([0, 8])}, r"positions in `class_id`: expected 0 to 7, got 8"),
        ({"rows": np.array([-1])}, r"expected 0 to 7, got -1"),
        ({"rows": np.array([2, 5, 2])}, r"must not repeat a sample: row 2 occurs more than once"),
        ({"small_classes": "ignore"}, r"must be 'repeat' or 'drop', got 'ignore'"),
        ({"samples_per_class": 0}, r"`samples_per_class` must be at least 1, got 0"),
        (
            {"samples_per_class": 4, "small_classes": "drop"},
            r"every class is small: expected a class with at least 4 images, got at most 3",
        ),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        ClassTable.build(**{"class_id": CLASS_ID, **arguments})


@pytest.mark.parametrize("label", [-1, 4])
def test_an_unknown_label_is_named(label):
    with pytest.raises(InputError, match=rf"`label` must be from 0 to 3, got {label}"):
        ClassTable.build(CLASS_ID).rows_of(label)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_an_impossible_share_is_named(share):
    with pytest.raises(InputError, match=rf"`share` .* from 0 to below 1, got {share}"):
        split_validation(ClassTable.build(CLASS_ID), share, seed=0)


def test_a_share_that_leaves_no_class_is_refused():
    with pytest.raises(InputError, match=r"`share` 0.9 of 4 classes holds out 4: expected at least"):
        split_validation(ClassTable.build(CLASS_ID), 0.9, seed=0)
