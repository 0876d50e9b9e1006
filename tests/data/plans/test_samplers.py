"""The laws of the samplers: distinct classes, even visits, coverage, purity, small classes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.plan import coverage_epochs, make_plan
from gcahng.errors import InputError

SAMPLERS = ["uniform", "released"]


def make_table(counts: list[int]) -> ClassTable:
    class_id = np.repeat(np.arange(len(counts)) * 10, counts)
    return ClassTable.build(np.random.default_rng(0).permutation(class_id))


@st.composite
def cases(draw):
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=30))
    num_classes = draw(st.integers(1, len(counts)))
    sizes = {"num_classes": num_classes, "num_samples": draw(st.integers(1, 5))}
    return make_table(counts), sizes, draw(st.integers(0, 3))


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from(SAMPLERS), st.integers(0, 40))
def test_batches_are_distinct_classes_of_their_own_images(case, sampler, epoch):
    table, sizes, seed = case
    plan = make_plan(table, seed=seed, epoch=epoch, sampler=sampler, **sizes)
    batch_size = sizes["num_classes"] * sizes["num_samples"]
    assert len(plan) == max(1, int(np.ceil(table.num_samples / batch_size)) - 1)
    for index in range(len(plan)):
        batch = plan.batch(index)
        assert batch.labels.dtype == batch.rows.dtype == np.int64
        assert batch.rows.shape == (sizes["num_samples"], sizes["num_classes"])
        assert np.unique(batch.labels).size == sizes["num_classes"]
        for place, label in enumerate(batch.labels):
            images = table.rows_of(label)
            assert np.isin(batch.rows[:, place], images).all()
            if images.size >= sizes["num_samples"]:
                assert np.unique(batch.rows[:, place]).size == sizes["num_samples"]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_uniform_visits_evenly_and_covers_every_image(case):
    table, sizes, seed = case
    seen, visits = set(), np.zeros(table.num_classes, int)
    for epoch in range(coverage_epochs(table, **sizes)):
        plan = make_plan(table, seed=seed, epoch=epoch, **sizes)
        in_epoch = np.zeros(table.num_classes, int)
        for index in range(len(plan)):
            batch = plan.batch(index)
            in_epoch[batch.labels] += 1
            seen.update(batch.rows.ravel().tolist())
        assert in_epoch.max() - in_epoch.min() <= 1
        if len(plan) * sizes["num_classes"] >= table.num_classes:
            assert in_epoch.min() >= 1
        visits += in_epoch
        assert visits.max() - visits.min() <= 1
    assert len(seen) == table.num_samples


def test_uniform_covers_again_in_the_middle_of_a_run():
    table, sizes = make_table([5, 9, 3, 7, 12, 2, 8]), {"num_classes": 3, "num_samples": 2}
    within = 2 * coverage_epochs(table, **sizes)
    for start in range(11, 40, 7):
        seen = set()
        for epoch in range(start, start + within):
            plan = make_plan(table, seed=0, epoch=epoch, **sizes)
            for index in range(len(plan)):
                seen.update(plan.batch(index).rows.ravel().tolist())
        assert len(seen) == table.num_samples


@pytest.mark.parametrize("size", [4, 5, 6, 700])
def test_uniform_goes_through_all_images_of_a_class_before_it_repeats_one(size):
    """Over epochs, also where the class is small (K..2K images) or large (kept between visits)."""
    table, sizes = make_table([size, 3]), {"num_classes": 2, "num_samples": 3}
    counts, epoch = np.zeros(table.num_samples, int), 0
    while counts.sum() < 6 * 2 * size:
        plan = make_plan(table, seed=0, epoch=epoch, **sizes)
        for index in range(len(plan)):
            batch = plan.batch(index)
            np.add.at(counts, batch.rows.ravel(), 1)
            of_class = counts[table.rows_of(0)]
            assert of_class.max() - of_class.min() <= 1
        epoch += 1
    assert counts[table.rows_of(0)].min() >= 2


def test_uniform_shows_all_images_of_a_small_class_at_every_visit():
    table = make_table([2, 2, 9])
    plan = make_plan(table, seed=0, epoch=0, num_classes=1, num_samples=5)
    for epoch in range(20):
        plan = make_plan(table, seed=0, epoch=epoch, num_classes=1, num_samples=5)
        for index in range(len(plan)):
            batch = plan.batch(index)
            images, counts = np.unique(batch.rows, return_counts=True)
            if batch.labels[0] < 2:
                assert images.size == 2 and sorted(counts.tolist()) == [2, 3]


def test_uniform_mixes_classes_over_epochs():
    """Where an epoch visits half of the classes, every pair still meets in some batch."""
    table, met = make_table([2] * 8), np.zeros((8, 8), bool)
    for epoch in range(200):
        plan = make_plan(table, seed=0, epoch=epoch, num_classes=2, num_samples=3)
        for index in range(len(plan)):
            first, second = plan.batch(index).labels
            met[first, second] = met[second, first] = True
    assert met.sum() == 8 * 7


def test_released_draws_classes_anew_in_every_batch():
    """Visits within an epoch are binomial: some classes come often, some not at all."""
    table = make_table([6] * 100)
    visits = np.zeros(100, int)
    for epoch in range(30):
        plan = make_plan(table, seed=0, epoch=epoch, num_classes=10, num_samples=2, sampler="released")
        for index in range(len(plan)):
            visits[plan.batch(index).labels] += 1
    mean = 30 * 29 * 10 / 100
    spread = np.sqrt(30 * 29 * 0.1 * 0.9)
    assert visits.sum() == mean * 100
    assert 0.7 * spread < visits.std() < 1.3 * spread


@pytest.mark.parametrize("size", [7, 600])
def test_released_goes_through_a_shuffle_and_passes_over_its_rest(size):
    """K = 3: of 7 images two visits take 6 different ones, then the class is shuffled again."""
    table = make_table([size])
    plan = make_plan(table, seed=0, epoch=0, num_classes=1, num_samples=3, sampler="released")
    per_shuffle = size // 3
    columns = [plan.batch(index).rows[:, 0] for index in range(len(plan))]
    for start in range(0, len(columns), per_shuffle):
        rows = np.concatenate(columns[start : start + per_shuffle])
        assert np.unique(rows).size == rows.size


def test_released_shuffles_again_when_a_class_is_used_up():
    table = make_table([4, 400])
    plan = make_plan(table, seed=0, epoch=0, num_classes=2, num_samples=2, sampler="released")
    visits = []
    for index in range(len(plan)):
        batch = plan.batch(index)
        visits.append(batch.rows[:, batch.labels.tolist().index(0)])
    pairs = [np.concatenate(visits[i : i + 2]) for i in range(0, len(visits) - 1, 2)]
    assert all(np.unique(pair).size == 4 for pair in pairs)
    assert len({tuple(pair.tolist()) for pair in pairs}) > 10


def test_released_draws_small_classes_with_replacement():
    table = make_table([2, 200])
    plan = make_plan(table, seed=0, epoch=0, num_classes=2, num_samples=3, sampler="released")
    numbers = []
    for index in range(len(plan)):
        batch = plan.batch(index)
        numbers.append(np.unique(batch.rows[:, batch.labels.tolist().index(0)]).size)
    # Three independent draws of two images are all the same one in a quarter of the visits.
    assert 0.05 < np.mean(np.array(numbers) == 1) < 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_does_not_depend_on_the_order_of_calls(sampler):
    table = make_table([3, 9, 4, 30, 2, 8, 8, 600])
    options = {"seed": 4, "epoch": 6, "num_classes": 3, "num_samples": 3, "sampler": sampler}
    plan = make_plan(table, **options)
    forward = [plan.batch(index) for index in range(len(plan))]
    for index in (len(plan) - 1, 0, 17, 3, 17):
        for again in (plan.batch(index), make_plan(table, **options).batch(index)):
            assert np.array_equal(again.labels, forward[index].labels)
            assert np.array_equal(again.rows, forward[index].rows)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds_and_epochs_differ(sampler):
    table = make_table([10] * 20)
    options = {"num_classes": 5, "num_samples": 2, "sampler": sampler}
    plans = [make_plan(table, seed=s, epoch=e, **options) for s, e in ((0, 0), (1, 0), (0, 1))]
    first = {tuple(plan.batch(0).rows.ravel().tolist()) for plan in plans}
    assert len(first) == 3


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("index", [-1, 3])
def test_a_batch_beyond_the_epoch_is_named(sampler, index):
    plan = make_plan(make_table([8, 8]), seed=0, epoch=0, num_classes=2, num_samples=2, sampler=sampler)
    with pytest.raises(InputError, match=rf"`index` of a batch must be from 0 to 2, got {index}"):
        plan.batch(index)
