"""Dealing without replacement, for ever, with random access.

The numbers 0..size-1 are dealt in blocks of `block` distinct numbers. One shuffled round of all
numbers follows the other, a new one beginning wherever the last one ends, inside a block or not.
Any block and the number of earlier occurrences of any number cost one or two rounds, however far
in, so a plan needs no state: batches of classes, the images of a class over its visits, and the
classes that an epoch visits once more than the others are all dealt this way.
"""

from collections.abc import Callable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from gcahng.data.plans.draws import permutation

Numbers = NDArray[np.int64]


class Draw(IntEnum):
    """What a `Deal` asks its generator for."""

    ROUND = 0
    BLOCK_ORDER = 1


class Deal:
    """Endless blocks of distinct numbers out of 0..size-1.

    Counts of any two numbers differ by at most 1 over the first blocks, whatever their number
    (with `first`: once counted from the second round on).

    A block that spans two rounds could hold a number twice. The second round is then mended: its
    first numbers are taken, in its own order, from those that the block does not hold yet. This
    reaches only the first `block` places of a round. When blocks are at most half of the numbers,
    the places at a round's end, which the next round must avoid, are hence never mended, and no
    round depends on more than the one before it. Larger blocks are dealt by the numbers that they
    leave out, which are less than half.

    Args:
        size: How many numbers there are.
        block: How many a block holds, at most `size`.
        words: Generator for (Draw, round or block number); must be a pure function.
        first: Distinct numbers that are dealt before the first whole round, in this order.
    """

    def __init__(
        self,
        size: int,
        block: int,
        words: Callable[[Draw, int], np.random.Philox],
        first: Numbers | None = None,
    ) -> None:
        assert 0 <= block <= size, (block, size)
        self.size = size
        self.block_size = block
        self._words = words
        self._leaves_out = 2 * block > size
        self._step = size - block if self._leaves_out else block
        self._first = np.empty(0, np.int64) if first is None else first
        if self._leaves_out and self._first.size:
            # Dealing `first` once more is leaving the others out once more.
            self._first = self._complement(self._first)
        self._rounds: dict[int, Numbers] = {}
        self._places: dict[int, Numbers] = {}

    def block(self, index: int) -> Numbers:
        """Block number `index`: (block,) distinct numbers in random order."""
        dealt = self._slots(index * self._step, self._step)
        if not self._leaves_out:
            return dealt
        kept = self._complement(dealt)
        return kept[permutation(self._words(Draw.BLOCK_ORDER, index), kept.size)]

    def count_before(self, index: int, numbers: Numbers) -> Numbers:
        """How often each of `numbers` occurs in the blocks before block `index`."""
        slot = index * self._step
        if slot <= self._first.size:
            count = np.isin(numbers, self._first[:slot]).astype(np.int64)
        else:
            turn, place = divmod(slot - self._first.size, self.size)
            count = turn + (self._place_in_round(turn)[numbers] < place)
            if self._first.size:
                count = count + np.isin(numbers, self._first)
        return index - count if self._leaves_out else count

    def _slots(self, start: int, count: int) -> Numbers:
        """Numbers `start` to `start + count` of the endless sequence, dealt or left out."""
        pieces = [self._first[start : start + count]]
        count -= pieces[0].size
        position = max(0, start - self._first.size)
        while count:
            turn, place = divmod(position, self.size)
            pieces.append(self._round(turn)[place : place + count])
            count -= pieces[-1].size
            position += pieces[-1].size
        return np.concatenate(pieces)

    def _shuffled(self, turn: int) -> Numbers:
        return permutation(self._words(Draw.ROUND, turn), self.size)

    def _round(self, turn: int) -> Numbers:
        order = self._rounds.get(turn)
        if order is None:
            order = self._mended(turn)
            _remember(self._rounds, turn, order)
        return order

    def _mended(self, turn: int) -> Numbers:
        """Round `turn`, its head free of what the block it begins in already holds."""
        order = self._shuffled(turn)
        held = (self._first.size + turn * self.size) % self._step
        if held == 0:
            return order
        if turn == 0:
            previous = self._first
        else:
            previous = self._rounds[turn - 1] if turn - 1 in self._rounds else self._shuffled(turn - 1)
        head = order[: self._step]
        free = ~np.isin(head, previous[previous.size - held :])
        free &= np.cumsum(free) <= self._step - held
        order[: self._step] = np.concatenate([head[free], head[~free]])
        return order

    def _place_in_round(self, turn: int) -> Numbers:
        places = self._places.get(turn)
        if places is None:
            places = np.empty(self.size, np.int64)
            places[self._round(turn)] = np.arange(self.size)
            _remember(self._places, turn, places)
        return places

    def _complement(self, numbers: Numbers) -> Numbers:
        rest = np.ones(self.size, bool)
        rest[numbers] = False
        return np.flatnonzero(rest)


def _remember(cache: dict[int, Numbers], turn: int, value: Numbers) -> None:
    """Keep the last two rounds: a block spans no more."""
    if len(cache) > 1:
        del cache[min(cache)]
    cache[turn] = value
