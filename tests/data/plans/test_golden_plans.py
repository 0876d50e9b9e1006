"""Plans that earlier releases made: a run that was begun then goes on with the same batches now.

The digests were taken before plans had windows and images were worked out for many classes at once.
They hold for data that fit into one window.
"""

import hashlib

import numpy as np
import pytest

from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.plan import make_plan

CASES = {
    "even": ([6] * 20, 5, 2),
    "skewed": ([60] + [2] * 9 + [7] * 14, 6, 2),
    "most classes": ([5, 9, 3, 7, 12, 2, 8], 5, 2),
    "all classes": ([4, 6, 5], 3, 2),
    "small classes": ([1, 2, 9, 3, 4, 1, 8], 2, 4),
    "large class": ([700, 12, 30, 9], 2, 3),
    "few visits": ([2] * 30, 4, 5),
    "many": ([1 + i % 7 for i in range(5000)], 64, 2),
}
DIGESTS = {
    ("even", "uniform"): "25e5ee21be893408",
    ("even", "released"): "9a4d4cc5615af037",
    ("skewed", "uniform"): "d0eb5da4b6c605dd",
    ("skewed", "released"): "bb4bede3fda2c3bb",
    ("most classes", "uniform"): "a34030df5054bdd6",
    ("most classes", "released"): "93ceaa166e631af8",
    ("all classes", "uniform"): "a31c81d5342b88e0",
    ("all classes", "released"): "a6d725831c96c835",
    ("small classes", "uniform"): "26a388c5072c93d1",
    ("small classes", "released"): "0c96fadbd912d181",
    ("large class", "uniform"): "ae7c18f142b589b5",
    ("large class", "released"): "4d69c884fda2c9c1",
    ("few visits", "uniform"): "eb473e10da46f4dc",
    ("few visits", "released"): "f9228e023ef69c0b",
    ("many", "uniform"): "c50655e82e6d84c5",
}


@pytest.mark.parametrize(("case", "sampler"), DIGESTS)
def test_plans_are_those_of_earlier_releases(case, sampler):
    counts, num_classes, num_samples = CASES[case]
    class_id = np.repeat(np.arange(len(counts)) * 10, counts)
    table = ClassTable.build(np.random.default_rng(0).permutation(class_id))
    digest = hashlib.sha256()
    for seed in (0, 11):
        for epoch in (0, 1, 2, 17):
            options = {"seed": seed, "epoch": epoch, "sampler": sampler}
            plan = make_plan(table, num_classes=num_classes, num_samples=num_samples, **options)
            for index in range(len(plan)):
                batch = plan.batch(index)
                digest.update(batch.labels.astype("<i8").tobytes() + batch.rows.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[case, sampler]
