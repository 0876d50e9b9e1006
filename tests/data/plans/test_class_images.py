"""The images of a batch's classes, worked out together, against one deal per class."""

import numpy as np
import pytest

from gcahng.data.draws import Purpose, permutation, stream
from gcahng.data.plans import class_images
from gcahng.data.plans.class_images import ClassImages
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.deal import Deal

SIZES = [*range(1, 34), 63, 64, 65, 200]


def plainly(table: ClassTable, label: int, visit: int, num_samples: int) -> np.ndarray:
    rows = table.rows_of(label)
    if rows.size < num_samples:
        words = stream(7, Purpose.SMALL_CLASS_IMAGES, label, visit)
        orders = [permutation(words, rows.size) for _ in range(-(-num_samples // rows.size))]
        return rows[np.concatenate(orders)[:num_samples]]
    deal = Deal(rows.size, num_samples, lambda draw, i: stream(7, Purpose.CLASS_IMAGES, label, draw, i))
    return rows[deal.block(visit)]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("latest", [6, 40, 10**9])
def test_images_are_those_of_one_deal_per_class(num_samples, latest):
    rng = np.random.default_rng(num_samples)
    table = ClassTable.build(rng.permutation(np.repeat(np.arange(len(SIZES)), SIZES)))
    images = ClassImages(table, 7, num_samples)
    for _ in range(12):
        labels = rng.permutation(len(SIZES))[: rng.integers(1, len(SIZES) + 1)]
        visits = rng.integers(0, latest, labels.size)
        rows = images.rows(labels, visits)
        assert rows.shape == (num_samples, labels.size)
        for place, (label, visit) in enumerate(zip(labels.tolist(), visits.tolist(), strict=True)):
            want = plainly(table, label, visit, num_samples)
            assert np.array_equal(rows[:, place], want), (SIZES[label], visit)


def test_every_visit_of_small_sizes():
    """All sizes below 12, all K, the first 60 visits: every kind of border between two rounds."""
    table = ClassTable.build(np.repeat(np.arange(11), np.arange(1, 12)))
    labels = np.arange(11)
    for num_samples in range(1, 12):
        images = ClassImages(table, 7, num_samples)
        for visit in range(60):
            rows = images.rows(labels, np.full(11, visit))
            for label in range(11):
                assert np.array_equal(rows[:, label], plainly(table, label, visit, num_samples))


def test_deals_of_large_classes_are_kept_and_bounded(monkeypatch):
    table = ClassTable.build(np.repeat(np.arange(40), 100))
    monkeypatch.setattr(class_images, "_KEPT_NUMBERS", 5 * (2 * 100 + 500))
    images = ClassImages(table, 7, 2)
    for visit in range(3):
        rows = images.rows(np.arange(40), np.full(40, visit))
        for label in range(40):
            assert np.array_equal(rows[:, label], plainly(table, label, visit, 2))
        assert len(images._deals) == 5
