"""The class table: labels, small classes, held-out classes, and its messages."""

import numpy as np
import pytest

from gcahng.data.plans.class_table import ClassTable, split_validation
from gcahng.errors import InputError

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
