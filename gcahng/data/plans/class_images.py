"""The images of a class over its visits, for many classes at once.

Each class deals its images K per visit with `gcahng.data.plans.deal.Deal`. A batch visits hundreds of
classes of a few images each, for which a deal takes longer than its handful of words; so the visits
of small classes are worked out here as rows of arrays, with the same result.
"""

import numpy as np
from numpy.typing import NDArray

from gcahng.data.draws import Purpose, stream
from gcahng.data.plans.bounded_cache import BoundedCache
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.deal import Deal, Draw
from gcahng.data.plans.philox import Words, row_permutations, stream_words

Numbers = NDArray[np.int64]

IN_ROWS = 64  # images below which classes are worked out together
_KEPT_NUMBERS = 2_000_000  # bound on the deals that are kept, 4 bytes each
_DEAL_NUMBERS = 500  # what a deal takes beside its numbers


class ClassImages:
    """Every image of a class comes again only after all the others.

    Of a class with fewer than K images every visit shows all, each floor(K / n) or ceil(K / n) times.

    Args:
        table: Training classes.
        seed: Seed of the run.
        num_samples: K.
    """

    def __init__(self, table: ClassTable, seed: int, num_samples: int) -> None:
        self._table = table
        self._seed = seed
        self._num_samples = num_samples
        self._deals: BoundedCache[Deal] = BoundedCache(_KEPT_NUMBERS)

    def rows(self, labels: Numbers, visits: Numbers) -> Numbers:
        """The images of visit number `visits[p]` of the run to class `labels[p]`.

        Args:
            labels: (P,) distinct labels.
            visits: (P,) visits, counted from 0 over the whole run.
        Returns:
            (K, P) sample rows.
        """
        sizes = self._table.lengths[labels].astype(np.int64)
        places = np.empty((labels.size, self._num_samples), np.int64)
        small = sizes < self._num_samples
        together = (sizes < IN_ROWS) & ~small
        for chosen, work_out in ((small, self._repeated), (together, self._dealt)):
            if chosen.any():
                places[chosen] = work_out(labels[chosen], visits[chosen], sizes[chosen])
        for p in np.flatnonzero(~small & ~together).tolist():
            places[p] = self._deal(int(labels[p]), int(sizes[p])).block(int(visits[p]))
        return self._table.take(labels, places.T)

    def _repeated(self, labels: Numbers, visits: Numbers, sizes: Numbers) -> Numbers:
        """(n, K) places in classes of fewer than K images."""
        counts = repeated_counts(sizes, self._num_samples)
        words = stream_words(self._seed, Purpose.SMALL_CLASS_IMAGES, counts, labels, visits, 0)
        return repeated_places(words, sizes, self._num_samples)

    def _dealt(self, labels: Numbers, visits: Numbers, sizes: Numbers) -> Numbers:
        """(n, K) places in classes of at least K images; `Deal.block` for each of them."""
        count = self._num_samples
        leaves_out = 2 * count > sizes
        step = np.where(leaves_out, sizes - count, count)
        dealt = self._slots(labels, sizes, visits, step)
        if not leaves_out.any():
            return dealt
        rest = np.arange(int(sizes.max())) < sizes[:, None]
        some, of_step = np.nonzero(np.arange(count) < step[:, None])
        rest[some, dealt[some, of_step]] = False
        kept = np.argsort(~rest, axis=1, kind="stable")[:, :count]
        words = stream_words(
            self._seed,
            Purpose.CLASS_IMAGES,
            np.where(leaves_out, count, 0),
            labels,
            Draw.BLOCK_ORDER,
            visits,
        )
        order = row_permutations(words)
        return np.where(leaves_out[:, None], np.take_along_axis(kept, order, axis=1), dealt)

    def _slots(self, labels: Numbers, sizes: Numbers, visits: Numbers, step: Numbers) -> Numbers:
        """(n, K) numbers `visit * step` to `(visit + 1) * step` of each class's rounds; what is beyond is any.

        A block is at most half of a round, so it lies inside one round, or begins in one and ends in
        the next, or begins behind the places that such a block took of its round. The last two need
        two rounds: see `Rounds`, which mends them in the same way.
        """
        turn, place = visits * step // sizes, visits * step % sizes
        spans = place + step > sizes
        # Places of the later round's first block that the earlier round fills.
        taken = np.where(spans, sizes - place, np.where(place < step, (step - place) % np.maximum(step, 1), 0))
        border = taken > 0
        column = np.arange(self._num_samples)
        dealt = np.zeros((labels.size, self._num_samples), np.int64)
        of = np.flatnonzero(border)
        later_turn = turn[of] + spans[of]
        # One call for all orders: it costs the same for any number of classes.
        orders = self._orders(
            np.concatenate([labels[~border], labels[of], labels[of]]),
            np.concatenate([sizes[~border], sizes[of], sizes[of]]),
            np.concatenate([turn[~border], later_turn - 1, later_turn]),
        )
        inside, earlier, later = np.split(orders, [labels.size - of.size, labels.size])
        dealt[~border] = _columns(inside, place[~border, None] + column)
        if of.size:
            taken, size, width = taken[of, None], sizes[of, None], step[of, None]
            tail = np.where(column < taken, _columns(earlier, size - taken + column), -1)
            head = _mended(later, tail, taken, width, column)
            spanning = np.where(column < taken, tail, _columns(head, column - taken))
            behind = np.where(
                column < taken, _columns(head, width - taken + column), _columns(later, width + column - taken)
            )
            dealt[of] = np.where(spans[of, None], spanning, behind)
        return dealt

    def _orders(self, labels: Numbers, sizes: Numbers, turns: Numbers) -> Numbers:
        words = stream_words(self._seed, Purpose.CLASS_IMAGES, sizes, labels, Draw.ROUND, turns)
        return row_permutations(words)

    def _deal(self, label: int, size: int) -> Deal:
        """The deal of a larger class, kept between its visits as long as there is room."""

        def make() -> Deal:
            return Deal(
                size,
                self._num_samples,
                lambda draw, index: stream(self._seed, Purpose.CLASS_IMAGES, label, draw, index),
            )

        return self._deals.get(label, make, 2 * size + _DEAL_NUMBERS)


def repeated_counts(sizes: Numbers, num_samples: int) -> Numbers:
    """Words that `repeated_places` takes for classes of these sizes."""
    return -(-num_samples // sizes) * sizes


def repeated_places(words: Words, sizes: Numbers, num_samples: int) -> Numbers:
    """Images of classes that have too few: all in one random order, then all in another, and so on.

    Args:
        words: (n, ...) words of each class.
        sizes: (n,) images of each class.
        num_samples: K.
    Returns:
        (n, K) places in each class.
    """
    width = int(sizes.max())
    orders = []
    for turn in range(-(-num_samples // int(sizes.min()))):
        at = turn * sizes[:, None] + np.arange(width)
        mine = (np.arange(width) < sizes[:, None]) & (at < words.shape[1])
        keys = np.take_along_axis(words, np.minimum(at, words.shape[1] - 1), axis=1)
        orders.append(row_permutations(np.where(mine, keys, np.uint64(2**64 - 1))))
    turn_of, place = np.divmod(np.arange(num_samples), sizes[:, None])
    return np.stack(orders)[turn_of, np.arange(sizes.size)[:, None], place]


def _columns(table: Numbers, columns: Numbers) -> Numbers:
    """Columns of each row, clipped where they are beyond and not used."""
    if not table.size:
        return np.zeros(columns.shape, np.int64)
    return np.take_along_axis(table, np.clip(columns, 0, table.shape[1] - 1), axis=1)


def _mended(later: Numbers, tail: Numbers, taken: Numbers, step: Numbers, column: Numbers) -> Numbers:
    """The first `step` numbers of rounds: first those that fill up the block with `tail`, then the others."""
    head = _columns(later, np.broadcast_to(column, tail.shape))
    inside = column < step
    free = inside & ~(head[:, :, None] == tail[:, None, :]).any(2)
    free &= np.cumsum(free, axis=1) <= step - taken
    rank = np.where(free, 0, np.where(inside, 1, 2))
    return np.take_along_axis(head, np.argsort(rank, axis=1, kind="stable"), axis=1)
