"""Rounds against a plain loop that mends one shuffle after the other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcahng.data.draws import Purpose, permutation, stream
from gcahng.data.plans.rounds import Rounds


def words(seed: int, turn: int) -> np.random.Philox:
    return stream(seed, Purpose.CLASS_ROUNDS, 3, 0, turn)


def plainly(size: int, block: int, seed: int, first: list[int], offset: int, repeats: int, turns: int):
    """The sequence number by number, and how many numbers each round's head gave up."""
    sequence, mended = list(first), []
    for turn in range(turns):
        order = permutation(words(seed, turn), size).tolist()
        taken = (offset + len(sequence)) % block if block else 0
        held = set(sequence[max(0, len(sequence) - taken) :]) if taken else set()
        room = block - taken if taken else 0
        free = [number for number in order[:block] if number not in held][:room]
        mended.append(sum(number in held for number in order[:room]))
        head = free + [number for number in order[:block] if number not in free]
        sequence += (head + order[block:]) * repeats
    return sequence, mended


@st.composite
def cases(draw):
    size = draw(st.integers(1, 25))
    block = draw(st.integers(0, size))
    first = draw(st.permutations(range(size)))[: draw(st.integers(0, size))]
    offset = draw(st.integers(0, max(0, block - 1)))
    return size, block, draw(st.integers(0, 5)), first, offset, draw(st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_rounds_are_the_plain_sequence(case, data):
    size, block, seed, first, offset, repeats = case
    want, mended = plainly(size, block, seed, first, offset, repeats, turns=6)
    options = {"first": np.array(first, int), "offset": offset, "repeats": repeats}
    rounds = Rounds(size, block, lambda turn: words(seed, turn), **options)
    for start in data.draw(st.lists(st.integers(0, len(want)), max_size=6)):
        count = data.draw(st.integers(0, len(want) - start))
        assert rounds.slots(start, count).tolist() == want[start : start + count]
        before = [want[:start].count(number) for number in range(size)]
        assert rounds.count_before(start, np.arange(size)).tolist() == before
    for turn in data.draw(st.permutations(range(6))):
        assert rounds.mended(turn) == mended[turn]


@settings(max_examples=100, deadline=None)
@given(cases())
def test_no_block_holds_a_number_twice(case):
    size, block, seed, first, offset, repeats = case
    options = {"first": np.array(first, int), "offset": offset, "repeats": repeats}
    rounds = Rounds(size, block, lambda turn: words(seed, turn), **options)
    length = len(first) + 5 * size * repeats
    start = 0
    while block and start < length:
        stop = min(length, (start + offset) // block * block + block - offset)
        dealt = rounds.slots(start, stop - start)
        assert np.unique(dealt).size == dealt.size
        start = stop


@pytest.mark.parametrize(("size", "block"), [(1000, 400), (1000, 30)])
def test_far_places_cost_no_more_with_blocks_of_at_most_half(size, block):
    asked = []

    def counted(turn: int) -> np.random.Philox:
        asked.append(turn)
        return words(0, turn)

    rounds = Rounds(size, block, counted)
    rounds.slots(10**9 + 7, block)
    assert len(asked) <= 3 and min(asked) > 10**5


def test_two_rounds_are_kept():
    asked = []

    def counted(turn: int) -> np.random.Philox:
        asked.append(turn)
        return words(0, turn)

    rounds = Rounds(20, 6, counted)
    for start in range(0, 200, 6):
        rounds.count_before(start, rounds.slots(start, 6))
    assert len(asked) == len(set(asked)) == 11
