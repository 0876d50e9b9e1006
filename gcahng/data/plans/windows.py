"""Windows: the shards of an epoch, grouped so that few of them are read at a time.

Remote shards are fetched whole and kept in a bounded cache, so an epoch must not need all at once.
Its shards are put in a random order and cut into windows of at least `window_bytes`. A class lives
in the window of its home shard, the one of its first row, and is visited in that window alone.

Every window has at least 2 P classes: then a batch reaches into two windows at most when an epoch
visits every class, and the rounds of a window's classes mend as they should (see `Rounds`).
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gcahng.data.draws import Purpose, permutation, stream
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.shard_layout import ShardLayout

Shards = NDArray[np.int32]

_AT_ONCE = 1 << 16  # classes looked up together, to need little memory at once


@dataclass(frozen=True, eq=False)
class Window:
    """Some shards whose classes are visited together.

    Attributes:
        homes: Shards whose first rows of classes make up the window.
        shards: These and all others that its classes reach into, ascending.
        num_classes: How many classes that are.
    """

    homes: Shards
    shards: Shards
    num_classes: int


def home_shards(table: ClassTable, layout: ShardLayout) -> Shards:
    """(N,) the shard of each class's first row."""
    homes = np.empty(table.num_classes, np.int32)
    for start in range(0, table.num_classes, _AT_ONCE):
        labels = np.arange(start, min(start + _AT_ONCE, table.num_classes))
        homes[labels] = layout.shard_of(table.take(labels, np.zeros(1, np.int64)))
    return homes


def training_shards(table: ClassTable) -> Shards:
    """All shards with a row of the table, ascending; none where it lies in no shards."""
    if table.layout is None:
        return np.empty(0, np.int32)
    homes = home_shards(table, table.layout)
    beyond = _shards_beyond(table, homes, table.layout)
    return _ascending({*np.unique(homes).tolist(), *(shard for more in beyond.values() for shard in more)})


class ShardGrouping:
    """How the shards of a table are grouped in each epoch.

    Args:
        table: Training classes.
        homes: `home_shards(table)`.
        layout: The table's shards.
        num_classes: P, classes per batch.
    """

    def __init__(self, table: ClassTable, homes: Shards, layout: ShardLayout, num_classes: int) -> None:
        self._sizes = layout.sizes
        self._window_bytes = layout.window_bytes
        self._min_classes = 2 * num_classes
        self._counts = np.bincount(homes, minlength=layout.sizes.size)
        self._beyond = _shards_beyond(table, homes, layout)

    def windows(self, seed: int, epoch: int) -> list[Window]:
        """The windows of an epoch, in reading order; at least one.

        A last window that would be too small joins the one before it.
        """
        used = np.flatnonzero(self._counts)
        order = used[permutation(stream(seed, Purpose.WINDOW_SHARDS, epoch), used.size)]
        groups: list[list[int]] = [[]]
        shards: set[int] = set()
        size = classes = 0
        for home in order.tolist():
            added = {home, *self._beyond.get(home, ())} - shards
            groups[-1].append(home)
            shards |= added
            size += sum(int(self._sizes[shard]) for shard in added)
            classes += int(self._counts[home])
            if size >= self._window_bytes and classes >= self._min_classes:
                groups.append([])
                shards, size, classes = set(), 0, 0
        rest = groups.pop()
        if groups:
            groups[-1] += rest
        else:
            groups = [rest]
        return [self._window(homes) for homes in groups]

    def _window(self, homes: list[int]) -> Window:
        beyond = (shard for home in homes for shard in self._beyond.get(home, ()))
        return Window(
            np.asarray(homes, np.int32), _ascending({*homes, *beyond}), int(self._counts[np.asarray(homes)].sum())
        )


def _shards_beyond(table: ClassTable, homes: Shards, layout: ShardLayout) -> dict[int, set[int]]:
    """For a home shard the other shards that its classes reach into."""
    beyond: defaultdict[int, set[int]] = defaultdict(set)
    ends = table.firsts.astype(np.int64) + table.lengths
    reaching = np.flatnonzero((table.firsts >= 0) & (ends > layout.starts[homes + 1]))
    for home, last in zip(homes[reaching].tolist(), layout.shard_of(ends[reaching] - 1).tolist(), strict=True):
        beyond[home].update(range(home + 1, last + 1))
    for label in np.flatnonzero(table.firsts < 0).tolist():
        touched = np.unique(layout.shard_of(table.rows_of(label))).tolist()
        beyond[int(homes[label])].update(touched[1:])
    return dict(beyond)


def _ascending(shards: set[int]) -> Shards:
    return np.asarray(sorted(shards), np.int32)
