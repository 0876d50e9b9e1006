"""One shuffle of all numbers after another, mended where a block spans two of them.

The numbers 0..size-1 are dealt round after round, each round in its own random order. The sequence
is cut into blocks, and a block that spans two rounds could hold a number twice. The later round is
then mended: its first numbers are taken, in its own order, from those that the block does not hold
yet. Any place of the sequence can be asked for at once, however far in.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gcahng.data.draws import permutation

Numbers = NDArray[np.int64]
Value = TypeVar("Value")

_BEFORE = -1  # key of the places of `first`


class Rounds:
    """An endless sequence of the numbers 0..size-1 whose blocks hold no number twice.

    Mending reaches only the first `block` places of a round. When blocks are at most half of the
    numbers, the places at a round's end, which the next round must avoid, are hence never mended,
    and no round depends on more than the one before it. With larger blocks a round depends on all
    before it.

    Keeps two rounds of 4 bytes per number.

    Args:
        size: How many numbers there are.
        block: Places of a block, at most `size`.
        words: Generator for a round's number; must be a pure function.
        first: Distinct numbers that are dealt before the first round, in this order.
        offset: Places of the first block that lie before this sequence, filled with other things.
        repeats: How often a round is dealt, in the same order, before the next one.
    """

    def __init__(
        self,
        size: int,
        block: int,
        words: Callable[[int], np.random.Philox],
        *,
        first: Numbers | None = None,
        offset: int = 0,
        repeats: int = 1,
    ) -> None:
        assert 0 <= block <= size, (block, size)
        self.size = size
        self._block = block
        self._words = words
        self._first = np.empty(0, np.int32) if first is None else first.astype(np.int32)
        self._in_first: NDArray[np.bool_] | None = None
        self._offset = offset
        self._repeats = repeats
        self._orders: dict[int, tuple[NDArray[np.int32], int]] = {}
        self._places: dict[int, NDArray[np.int32]] = {}

    def slots(self, start: int, count: int) -> Numbers:
        """Numbers `start` to `start + count` of the sequence."""
        lead = self._first.size
        pieces = [self._first[start : start + count]]
        place, stop = max(0, start - lead), start + count - lead
        while place < stop:
            cycle, inside = divmod(place, self.size)
            order = self._order(cycle // self._repeats)
            pieces.append(order[inside : inside + stop - place])
            place += pieces[-1].size
        return np.concatenate(pieces).astype(np.int64)

    def count_before(self, slot: int, numbers: Numbers) -> Numbers:
        """How often each of `numbers` occurs in the first `slot` places."""
        place = slot - self._first.size
        if place <= 0:
            return (self._places_of(_BEFORE)[numbers] < slot).astype(np.int64)
        cycle, inside = divmod(place, self.size)
        count = cycle + (self._places_of(cycle // self._repeats)[numbers] < inside)
        if self._first.size:
            if self._in_first is None:
                self._in_first = np.zeros(self.size, bool)
                self._in_first[self._first] = True
            count = count + self._in_first[numbers]
        return count

    def mended(self, turn: int) -> int:
        """How many numbers at the beginning of round `turn` had to make room for others."""
        self._order(turn)
        return self._orders[turn][1]

    def _order(self, turn: int) -> NDArray[np.int32]:
        kept = self._orders.get(turn)
        if kept is not None:
            return kept[0]
        if 2 * self._block > self.size:
            earlier = max((t for t in self._orders if t < turn), default=-1)
            for before in range(earlier + 1, turn):
                _remember(self._orders, before, self._mend(before), 2)
        _remember(self._orders, turn, self._mend(turn), 2)
        return self._orders[turn][0]

    def _mend(self, turn: int) -> tuple[NDArray[np.int32], int]:
        """Round `turn`, its head free of what the block it begins in already holds."""
        order = self._shuffle(turn)
        start = self._first.size + turn * self._repeats * self.size
        taken = (self._offset + start) % self._block if self._block else 0
        if taken == 0:
            return order, 0
        if turn == 0:
            previous = self._first
        else:
            previous = self._orders[turn - 1][0] if turn - 1 in self._orders else self._shuffle(turn - 1)
        head, room = order[: self._block], self._block - taken
        free = ~np.isin(head, previous[max(0, previous.size - taken) :])
        mended = room - int(free[:room].sum())
        free &= np.cumsum(free) <= room
        order[: self._block] = np.concatenate([head[free], head[~free]])
        return order, mended

    def _shuffle(self, turn: int) -> NDArray[np.int32]:
        return permutation(self._words(turn), self.size).astype(np.int32)

    def _places_of(self, turn: int) -> NDArray[np.int32]:
        places = self._places.get(turn)
        if places is None:
            order = self._first if turn == _BEFORE else self._order(turn)
            places = np.full(self.size, np.iinfo(np.int32).max, np.int32)
            places[order] = np.arange(order.size, dtype=np.int32)
            _remember(self._places, turn, places, 1)
        return places


def _remember(cache: dict[int, Value], turn: int, value: Value, keep: int) -> None:
    """Keep the last `keep` rounds: a block spans no more than two."""
    if len(cache) >= keep:
        del cache[min(cache)]
    cache[turn] = value
