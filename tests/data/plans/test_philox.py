"""Words of many streams at once are the words of each of them."""

import numpy as np
import pytest

from gcahng.data.draws import Purpose, permutation, stream
from gcahng.data.plans.philox import row_permutations, stream_words


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_words_of_all_streams(seed):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 70, 40)
    a, b = rng.integers(0, 2**62, (2, 40))
    words = stream_words(seed, Purpose.CLASS_IMAGES, counts, a, b, 3)
    assert words.shape == (40, counts.max()) and words.dtype == np.uint64
    for row, count in enumerate(counts.tolist()):
        want = stream(seed, Purpose.CLASS_IMAGES, int(a[row]), int(b[row]), 3).random_raw(count)
        assert np.array_equal(words[row, :count], want)
        assert (words[row, count:] == 2**64 - 1).all()


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0], [1], [4], [5]])
def test_few_words_or_none(counts):
    words = stream_words(1, Purpose.TRANSFORM, np.array(counts, int), 0, 0, 0)
    assert words.shape == (len(counts), max(counts, default=0))


def test_orders_of_rows_are_the_streams_permutations():
    counts, labels = np.array([3, 1, 9, 0, 9]), np.arange(5)
    orders = row_permutations(stream_words(4, Purpose.CLASS_IMAGES, counts, labels, 0, 1))
    for row, count in enumerate(counts.tolist()):
        want = permutation(stream(4, Purpose.CLASS_IMAGES, row, 0, 1), count)
        assert np.array_equal(orders[row, :count], want)
