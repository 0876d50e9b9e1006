"""Dealing in blocks: distinct inside a block, even over blocks, the same in any order of calls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcahng.data.draws import Purpose, stream
from gcahng.data.plans.deal import Deal


def make_deal(size: int, block: int, seed: int = 0, first: np.ndarray | None = None) -> Deal:
    return Deal(size, block, lambda draw, index: stream(seed, Purpose.CLASS_IMAGES, 5, draw, index), first)


@st.composite
def sizes(draw):
    size = draw(st.integers(1, 40))
    return size, draw(st.integers(0, size)), draw(st.integers(0, 5))


@settings(max_examples=150, deadline=None)
@given(sizes())
def test_blocks_are_distinct_and_counts_even(case):
    size, block, seed = case
    deal, counts = make_deal(size, block, seed), np.zeros(size, int)
    for index in range(30):
        assert np.array_equal(deal.count_before(index, np.arange(size)), counts)
        dealt = deal.block(index)
        assert dealt.shape == (block,) and np.unique(dealt).size == block
        counts[dealt] += 1
        assert counts.max() - counts.min() <= 1


@settings(max_examples=100, deadline=None)
@given(sizes(), st.data())
def test_first_numbers_come_once_more(case, data):
    size, block, seed = case
    extra = data.draw(st.permutations(range(size)))[: data.draw(st.integers(0, size - 1))]
    # As many blocks as hold the extra numbers and whole rounds, if there is such a number.
    whole = [n for n in range(1, 60) if n * block % size == len(extra) and n * block >= len(extra)]
    first = np.array(extra, dtype=np.int64)
    deal, counts = make_deal(size, block, seed, first), np.zeros(size, int)
    for index in range(whole[0] if whole else 0):
        assert np.array_equal(deal.count_before(index, np.arange(size)), counts)
        dealt = deal.block(index)
        assert np.unique(dealt).size == block
        counts[dealt] += 1
    if whole:
        rounds = (whole[0] * block - len(extra)) // size
        expected = np.full(size, rounds)
        expected[first] += 1
        assert np.array_equal(counts, expected)


@pytest.mark.parametrize(("size", "block"), [(10, 3), (10, 7), (9, 9), (7, 2), (100, 33)])
def test_any_order_of_calls_gives_the_same_blocks(size, block):
    deal = make_deal(size, block)
    forward = [deal.block(index) for index in range(40)]
    for index in reversed(range(40)):
        assert np.array_equal(make_deal(size, block).block(index), forward[index])
        assert np.array_equal(deal.block(index), forward[index])


@pytest.mark.parametrize(("size", "block"), [(12, 5), (12, 8), (6, 6)])
def test_every_number_comes_at_every_place(size, block):
    """No place of a block, and no block beside a mended border, is reserved for some numbers."""
    seen = np.zeros((block, size), int)
    for seed in range(400):
        dealt = make_deal(size, block, seed).block(2)
        seen[np.arange(block), dealt] += 1
    expected = 400 / size
    assert np.abs(seen - expected).max() < 6 * np.sqrt(expected), seen


def test_far_blocks_cost_no_more():
    """A run of a billion blocks is entered at its end in a few rounds' time."""
    dealt = make_deal(1000, 3).block(10**9)
    assert np.unique(dealt).size == 3
    assert make_deal(1000, 999).count_before(10**9, np.arange(1000)).sum() == 999 * 10**9
