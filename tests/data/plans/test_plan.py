"""Plans by name: purity over processes, own samplers, and messages."""

import json
import subprocess
import sys

import numpy as np
import pytest

from gcahng.data.plans.batch_plan import ShardedPlan
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.plan import BatchPlan, coverage_epochs, make_plan, num_batches
from gcahng.errors import ConfigError, InputError

TABLE = ClassTable.build(np.repeat(np.arange(6), [5, 4, 3, 6, 2, 9]))
SIZES = {"seed": 0, "epoch": 0, "num_classes": 3, "num_samples": 2}

OTHER_PROCESS = """
import json, sys
import numpy as np
from gcahng.data.plans.plan import make_plan
from gcahng.data.plans.class_table import ClassTable
table = ClassTable.build(np.repeat(np.arange(6), [5, 4, 3, 6, 2, 9]))
plan = make_plan(table, seed=11, epoch=7, num_classes=4, num_samples=2, sampler=sys.argv[1])
print(json.dumps([plan.batch(i).rows.tolist() for i in range(len(plan))]))
"""

OWN_SAMPLERS = """
import numpy as np
from gcahng.data.plans.plan import BatchPlan


class FirstClasses:
    '''The first P classes, the first K images of each, in every batch.'''

    def __init__(self, request):
        self.labels = np.arange(request.num_classes)
        columns = [request.table.rows_of(p)[: request.num_samples] for p in range(request.num_classes)]
        self.rows = np.stack(columns, axis=1)

    def __len__(self):
        return 2

    def batch(self, index):
        return BatchPlan(self.labels, self.rows)


class Neighbours:
    '''Batch i: class i and those whose centres are nearest to its own; the images at random.'''

    def __init__(self, request):
        self.request = request
        centres = request.class_centres
        if centres is None:  # before the first centres are known
            centres = np.random.default_rng(request.seed).normal(size=(request.table.num_classes, 2))
        self.near = np.argsort(np.linalg.norm(centres[:, None] - centres, axis=-1), axis=1, kind="stable")

    def __len__(self):
        return self.request.table.num_classes * (self.request.passes or 1)

    def batch(self, index):
        request = self.request
        labels = self.near[index % request.table.num_classes, : request.num_classes]
        draws = np.random.default_rng((request.seed, request.epoch, index))
        columns = [draws.permutation(request.table.rows_of(p))[: request.num_samples] for p in labels.tolist()]
        return BatchPlan(labels, np.stack(columns, axis=1), repaired=index)

    def shards(self, index):
        return np.array([index], np.int32), np.array([index + 1], np.int32)


class OneClass(FirstClasses):
    def batch(self, index):
        return BatchPlan(self.labels * 0, self.rows)


class Transposed(FirstClasses):
    def batch(self, index):
        return BatchPlan(self.labels, self.rows.T)


class OtherClass(FirstClasses):
    def batch(self, index):
        return BatchPlan(self.labels[::-1], self.rows)


class Empty(FirstClasses):
    def __len__(self):
        return 0


def no_plan(request):
    return [[0, 1]]


constant = 3
"""


@pytest.fixture
def own_samplers(tmp_path, monkeypatch):
    (tmp_path / "own_samplers.py").write_text(OWN_SAMPLERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_samplers", None)


@pytest.mark.parametrize("sampler", ["uniform", "released", "filled", "sample"])
def test_another_process_makes_the_same_plan(sampler):
    out = subprocess.run([sys.executable, "-c", OTHER_PROCESS, sampler], capture_output=True, text=True, check=True)
    plan = make_plan(TABLE, seed=11, epoch=7, num_classes=4, num_samples=2, sampler=sampler)
    assert json.loads(out.stdout) == [plan.batch(i).rows.tolist() for i in range(len(plan))]


PINNED = ([4, 3, 0], [[19, 14, 1], [18, 17, 0]])


def test_a_plan_is_pinned():
    """Checkpoints hold (epoch, batch) alone: a change of the plan would change resumed runs."""
    batch = make_plan(TABLE, **(SIZES | {"epoch": 2})).batch(1)
    assert (batch.labels.tolist(), batch.rows.tolist()) == PINNED


def test_an_epoch_has_the_released_length():
    assert num_batches(5864, 27, 3) == 72  # CUB
    assert num_batches(59551, 40, 2) == 744  # SOP
    assert num_batches(6, 3, 2) == 1 and num_batches(1, 3, 2) == 1
    assert num_batches(12, 3, 2) == 1 and num_batches(13, 3, 2) == 2


def test_coverage_is_stated_for_known_sets():
    even = ClassTable.build(np.repeat(np.arange(10), 6))
    assert coverage_epochs(even, 5, 2) == 2  # 5 batches of 5: 2.5 visits an epoch, 3 needed
    skewed = ClassTable.build(np.repeat(np.arange(10), [60] + [2] * 9))
    assert coverage_epochs(skewed, 5, 2) == 9  # 7 batches: 3.5 visits an epoch, 30 needed


def test_an_own_sampler_is_loaded_by_its_path(own_samplers):
    plan = make_plan(TABLE, sampler="own_samplers:FirstClasses", **SIZES)
    assert len(plan) == 2
    assert plan.batch(1).labels.tolist() == [0, 1, 2]
    assert plan.batch(1).rows.tolist() == [[0, 5, 9], [1, 6, 10]]
    assert isinstance(plan.batch(0), BatchPlan)


CENTRES = np.array([[0, 0], [9, 0], [1, 0], [10, 1], [0, 2], [8, 0.5]])


def test_a_sampler_of_similar_classes_is_given_their_centres(own_samplers):
    """It has passes, repairs and shards too: whatever the package's samplers have."""
    options = SIZES | {"sampler": "own_samplers:Neighbours", "passes": 2}
    plan = make_plan(TABLE, class_centres=CENTRES, **options)
    assert len(plan) == 12
    assert [set(plan.batch(index).labels.tolist()) for index in (0, 1, 2, 9)] == [
        {0, 2, 4},
        {1, 3, 5},
        {0, 2, 4},
        {1, 3, 5},
    ]
    assert plan.batch(7).repaired == 7
    assert isinstance(plan, ShardedPlan) and [part.tolist() for part in plan.shards(3)] == [[3], [4]]
    assert len(make_plan(TABLE, **(options | {"passes": None}))) == 6
    assert not isinstance(make_plan(TABLE, sampler="own_samplers:FirstClasses", **SIZES), ShardedPlan)


@pytest.mark.parametrize("shape", [(5, 2), (6,), (6, 2, 2)])
def test_centres_of_another_shape_are_refused(shape):
    message = rf"`class_centres` must have one row per training class: expected \(6, D\), got \({shape[0]},"
    with pytest.raises(InputError, match=message):
        make_plan(TABLE, class_centres=np.zeros(shape), **SIZES)


@pytest.mark.parametrize("sampler", ["uniform", "released"])
def test_samplers_without_passes_take_none(sampler):
    with pytest.raises(ConfigError, match=rf"`passes` is 2, but an epoch of the sampler '{sampler}' does not consist"):
        make_plan(TABLE, sampler=sampler, passes=2, **SIZES)


def test_less_than_one_pass_is_refused():
    with pytest.raises(InputError, match=r"`passes` .* must be at least 1, got 0"):
        make_plan(TABLE, sampler="sample", passes=0, **SIZES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OneClass", r"own_samplers:OneClass, batch 0: `labels` must be 3 distinct classes, got 1"),
        ("Transposed", r"`rows` must be integers of shape \(2, 3\), got int64 of shape \(3, 2\)"),
        ("OtherClass", r"rows \[0, 1\] are not all samples of label 2"),
    ],
)
def test_a_wrong_batch_of_an_own_sampler_is_named(own_samplers, name, message):
    plan = make_plan(TABLE, sampler=f"own_samplers:{name}", **SIZES)
    with pytest.raises(InputError, match=message):
        plan.batch(0)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("own_samplers:no_plan", r"must return a plan with `len\(plan\)`.*, got list"),
        ("own_samplers:constant", r"must name a callable, got int"),
        ("own_samplers:Empty", r"must return a plan of at least 1 batch, got 0"),
        ("own_samplers:missing", r"has no name `missing`"),
        ("unifrom", r"must be one of uniform, released, filled, sample or a dotted path, got 'unifrom'"),
    ],
)
def test_a_sampler_that_cannot_be_used_is_named(own_samplers, sampler, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(TABLE, sampler=sampler, **SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 7}, r"`num_classes` .* is 7, but there are only 6 training classes: exp"),
        ({"num_classes": 0}, r"`num_classes` .* must be at least 1, got 0"),
        ({"num_samples": 0}, r"`num_samples` .* must be at least 1, got 0"),
        ({"epoch": -1}, r"`epoch` must be 0 or more, got -1"),
        ({"seed": -5}, r"`seed` must be an integer .* got -5"),
    ],
)
def test_impossible_sizes_are_named(change, message):
    with pytest.raises(InputError, match=message):
        make_plan(TABLE, **(SIZES | change))


def test_too_few_classes_because_small_ones_were_dropped():
    table = ClassTable.build(np.repeat(np.arange(6), [5, 4, 3, 6, 2, 9]), samples_per_class=4, small_classes="drop")
    with pytest.raises(InputError, match=r"only 4 training classes \(2 small ones were dropped\)"):
        make_plan(table, **(SIZES | {"num_classes": 5, "num_samples": 4}))
    with pytest.raises(InputError, match="only 4 training classes"):
        coverage_epochs(table, 5, 4)
