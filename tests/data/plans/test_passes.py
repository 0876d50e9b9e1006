"""The samplers that go over the classes in passes: their laws, their repairs, small classes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcahng.data.draws import Purpose, permutation, stream
from gcahng.data.plans import passes as passes_module
from gcahng.data.plans.batch_plan import BatchPlan
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.plan import make_plan
from gcahng.errors import InputError

BOTH = ["filled", "sample"]


def make_table(counts: list[int]) -> ClassTable:
    class_id = np.repeat(np.arange(len(counts)) * 10, counts)
    return ClassTable.build(np.random.default_rng(0).permutation(class_id))


def all_batches(table: ClassTable, **options) -> list[BatchPlan]:
    plan = make_plan(table, **({"seed": 0, "epoch": 0} | options))
    return [plan.batch(index) for index in range(len(plan))]


def filled_size(longest: int, num_samples: int) -> int:
    """M by the words of the law: to the next multiple of K, or down where less than 0.3 K are over."""
    down = longest // num_samples * num_samples
    over = longest - down
    return max(num_samples, down if over == 0 or over < int(0.3 * num_samples) else down + num_samples)


@st.composite
def cases(draw):
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=20))
    sizes = {
        "num_classes": draw(st.integers(1, len(counts))),
        "num_samples": draw(st.integers(1, 5)),
        "passes": draw(st.integers(1, 4)),
    }
    return counts, sizes, draw(st.integers(0, 3)), draw(st.integers(0, 20))


@settings(max_examples=120, deadline=None)
@given(cases(), st.sampled_from(BOTH))
def test_batches_are_distinct_classes_of_distinct_images(case, sampler):
    counts, sizes, seed, epoch = case
    table = make_table(counts)
    batches = all_batches(table, seed=seed, epoch=epoch, sampler=sampler, **sizes)
    groups = filled_size(max(counts), sizes["num_samples"]) // sizes["num_samples"] if sampler == "filled" else 1
    # A last batch that is not full is left out.
    assert len(batches) == max(1, sizes["passes"] * groups * len(counts) // sizes["num_classes"])
    for batch in batches:
        assert batch.rows.shape == (sizes["num_samples"], sizes["num_classes"])
        assert np.unique(batch.labels).size == sizes["num_classes"]
        for place, label in enumerate(batch.labels.tolist()):
            images, column = table.rows_of(label), batch.rows[:, place]
            assert np.isin(column, images).all()
            if images.size >= sizes["num_samples"]:
                assert np.unique(column).size == sizes["num_samples"]


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from(BOTH))
def test_passes_hold_each_class_once_per_round(case, sampler):
    counts, sizes, seed, epoch = case
    batches = all_batches(make_table(counts), seed=seed, epoch=epoch, sampler=sampler, **sizes)
    labels, total = np.concatenate([batch.labels for batch in batches]), len(counts)
    rounds = [labels[start : start + total] for start in range(0, labels.size, total)]
    assert all(np.unique(part).size == part.size for part in rounds)
    groups = filled_size(max(counts), sizes["num_samples"]) // sizes["num_samples"] if sampler == "filled" else 1
    for start in range(0, len(rounds), groups):
        same = rounds[start : start + groups]  # one pass, in the same order every time
        assert all(np.array_equal(part, same[0][: part.size]) for part in same)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_classes_that_make_room_are_counted(case):
    """`sample`: a shuffle per pass; where a batch spans two, the plain shuffles name some classes twice."""
    counts, sizes, seed, epoch = case
    batches = all_batches(make_table(counts), seed=seed, epoch=epoch, sampler="sample", **sizes)
    total, block = len(counts), sizes["num_classes"]
    labels = np.concatenate([batch.labels for batch in batches])
    for index, batch in enumerate(batches):
        border = -(-(index * block) // total) * total  # the next pass begins here
        clashes = 0
        if index * block < border < (index + 1) * block:
            words = stream(seed, Purpose.PASS_CLASSES, epoch, border // total)
            drawn = permutation(words, total)[: (index + 1) * block - border]
            clashes = np.isin(drawn, labels[index * block : border]).sum()
        assert batch.repaired == clashes


def test_sample_draws_images_without_preference():
    """Each image of a class comes equally often, in small classes and in large ones, over epochs and passes."""
    table, seen = make_table([4, 70]), Counter()
    for epoch in range(150):
        batches = all_batches(table, epoch=epoch, num_classes=2, num_samples=3, sampler="sample", passes=4)
        for batch in batches:
            seen.update(batch.rows.ravel().tolist())
    for label, size in ((0, 4), (1, 70)):
        expected = 150 * 4 * 3 / size
        found = np.array([seen[row] for row in table.rows_of(label).tolist()])
        assert np.abs(found - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize(("size", "num_samples"), [(3, 2), (6, 2), (90, 2), (3, 5)])
def test_sample_draws_images_anew_in_every_pass(size, num_samples):
    """Of small classes, of large ones, and of those with fewer than K images."""
    batches = all_batches(make_table([size]), num_classes=1, num_samples=num_samples, sampler="sample", passes=30)
    assert len({tuple(batch.rows.ravel().tolist()) for batch in batches}) > 3


def test_sample_orders_classes_anew_in_every_pass():
    table = make_table([4] * 6)
    orders = {
        tuple(batch.labels.tolist())
        for epoch in range(5)
        for batch in all_batches(table, epoch=epoch, num_classes=6, num_samples=2, sampler="sample", passes=5)
    }
    assert len(orders) > 20


@pytest.mark.parametrize("sampler", BOTH)
def test_small_classes_show_their_images_again(sampler):
    """Classes of 2 and 3 images, K = 5."""
    for batch in all_batches(make_table([2, 3, 5]), num_classes=3, num_samples=5, sampler=sampler, passes=3):
        assert batch.rows.shape == (5, 3)
        if sampler == "sample":
            for label, each in ((0, [2, 3]), (1, [1, 2, 2])):
                column = batch.rows[:, batch.labels.tolist().index(label)]
                assert sorted(np.unique(column, return_counts=True)[1].tolist()) == each


@pytest.mark.parametrize(
    ("longest", "num_samples", "size"),
    [
        (60, 2, 60),
        (59, 2, 60),
        (60, 7, 63),
        (57, 7, 56),
        (58, 7, 63),
        (50, 7, 49),
        (51, 7, 56),
        (2, 10, 10),
        (3, 10, 10),
        (1, 4, 4),
    ],
)
def test_filled_takes_so_many_images_of_each_class(longest, num_samples, size):
    """K = 7: one image over is cut, two are filled up. A set of short classes only still gives a group."""
    assert filled_size(longest, num_samples) == size
    batches = all_batches(make_table([longest, 1]), num_classes=2, num_samples=num_samples, sampler="filled")
    assert len(batches) == size // num_samples


def test_filled_shows_every_image_in_every_pass():
    table = make_table([13, 5, 1, 12, 8])
    batches = all_batches(table, num_classes=5, num_samples=2, sampler="filled", passes=2)
    assert len(batches) == 14
    for start in (0, 7):
        rows = np.concatenate([batch.rows.ravel() for batch in batches[start : start + 7]])
        assert np.array_equal(np.unique(rows), np.arange(39))
    first, second = (np.sort(np.concatenate([b.rows.ravel() for b in batches[s : s + 7]])) for s in (0, 7))
    assert not np.array_equal(first, second)  # the fillings are drawn anew


def test_filled_cuts_the_longest_class():
    """K = 7, 57 images: one is left out, another one in every epoch."""
    table, left_out = make_table([57, 30]), set()
    for epoch in range(30):
        rows = np.concatenate(
            [b.rows.ravel() for b in all_batches(table, epoch=epoch, num_classes=2, num_samples=7, sampler="filled")]
        )
        (missing,) = set(table.rows_of(0).tolist()) - set(rows.tolist())
        left_out.add(missing)
    assert len(left_out) > 15


def test_filled_repairs_groups_with_an_image_twice(monkeypatch):
    table = make_table([40, 3, 4, 2])
    options = {"num_classes": 3, "num_samples": 3, "sampler": "filled", "seed": 5}
    repaired = all_batches(table, **options)
    monkeypatch.setattr(passes_module, "_make_distinct", lambda places, size: 0)
    drawn = all_batches(table, **options)
    total = 0
    for batch, raw in zip(repaired, drawn, strict=True):
        assert np.array_equal(batch.labels, raw.labels)
        expected = raw.rows.copy()
        for place, label in enumerate(batch.labels.tolist()):
            images, column = table.rows_of(label).tolist(), expected[:, place]
            if len(images) < 3:
                continue
            for at in range(1, 3):
                if column[at] in column[:at]:
                    ring = images[images.index(column[at]) + 1 :] + images[: images.index(column[at])]
                    column[at] = next(row for row in ring if row not in column)
        assert np.array_equal(batch.rows, expected)
        assert batch.repaired == (expected != raw.rows).sum()
        total += batch.repaired
    assert total > 10


@pytest.mark.parametrize("sampler", BOTH)
def test_a_batch_does_not_depend_on_the_order_of_calls(sampler):
    table = make_table([3, 9, 4, 30, 2, 8, 8, 90])
    options = {"seed": 4, "epoch": 6, "num_classes": 5, "num_samples": 3, "sampler": sampler, "passes": 12}
    plan = make_plan(table, **options)
    forward = [plan.batch(index) for index in range(len(plan))]
    for index in (len(plan) - 1, 0, 17, 3, 17, 10):
        for again in (plan.batch(index), make_plan(table, **options).batch(index)):
            assert np.array_equal(again.labels, forward[index].labels)
            assert np.array_equal(again.rows, forward[index].rows)
            assert again.repaired == forward[index].repaired


@pytest.mark.parametrize("sampler", BOTH)
def test_seeds_and_epochs_differ(sampler):
    table = make_table([10] * 20)
    options = {"num_classes": 5, "num_samples": 2, "sampler": sampler}
    plans = [make_plan(table, seed=s, epoch=e, **options) for s, e in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(plan.batch(0).rows.ravel().tolist()) for plan in plans}) == 3


@pytest.mark.parametrize("sampler", BOTH)
def test_a_batch_beyond_the_epoch_is_named(sampler):
    plan = make_plan(make_table([2] * 6), seed=0, epoch=0, num_classes=2, num_samples=2, sampler=sampler)
    assert len(plan) == 3
    with pytest.raises(InputError, match=r"`index` of a batch must be from 0 to 2, got 3"):
        plan.batch(3)
