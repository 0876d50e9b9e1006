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

from gcahng.data.draws import permutation
from gcahng.data.plans.rounds import Numbers, Rounds


class Draw(IntEnum):
    """What a `Deal` asks its generator for."""

    ROUND = 0
    BLOCK_ORDER = 1


class Deal:
    """Endless blocks of distinct numbers out of 0..size-1.

    Counts of any two numbers differ by at most 1 over the first blocks, whatever their number
    (with `first`: once counted from the second round on).

    Blocks of more than half of the numbers are dealt by the numbers that they leave out, which are
    less than half: so no round depends on more than the one before it (see `Rounds`).

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
        self._words = words
        self._leaves_out = 2 * block > size
        self._step = size - block if self._leaves_out else block
        if self._leaves_out and first is not None and first.size:
            # Dealing `first` once more is leaving the others out once more.
            first = self._complement(first)
        self._rounds = Rounds(size, self._step, lambda turn: words(Draw.ROUND, turn), first=first)

    def block(self, index: int) -> Numbers:
        """Block number `index`: (block,) distinct numbers in random order."""
        dealt = self._rounds.slots(index * self._step, self._step)
        if not self._leaves_out:
            return dealt
        kept = self._complement(dealt)
        return kept[permutation(self._words(Draw.BLOCK_ORDER, index), kept.size)]

    def count_before(self, index: int, numbers: Numbers) -> Numbers:
        """How often each of `numbers` occurs in the blocks before block `index`."""
        count = self._rounds.count_before(index * self._step, numbers)
        return index - count if self._leaves_out else count

    def _complement(self, numbers: Numbers) -> Numbers:
        rest = np.ones(self.size, bool)
        rest[numbers] = False
        return np.flatnonzero(rest)
