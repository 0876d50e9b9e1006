"""The requests of an epoch, as one rank makes them: the sampler of torch's DataLoader.

Every rank plans whole batches and asks for its classes of each, so ranks agree without a word. It
also tells the source of the images which shards come next.
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gcahng.data.dataset import TrainRequest
from gcahng.data.plans.batch_plan import EpochPlan, ShardedPlan

Shards = NDArray[np.int32]
Expect = Callable[[Shards, Shards], None]


class Requests:
    """Requests of the epoch that was begun last.

    Args:
        classes: The rank's part of a batch's classes.
        expect: Told (present, following) whenever the shards that batches read change; None where
            nobody wants to know.
        all_shards: Told once as present where a plan does not know its shards.
        in_flight: Requests that may be made before the first of them is answered. So many batches
            keep the shards they read.
    """

    def __init__(self, classes: slice, expect: Expect | None, all_shards: Callable[[], Shards], in_flight: int) -> None:
        self.run = 0
        self._classes = classes
        self._all_shards = all_shards
        self._announcer = None if expect is None else _Announcer(expect, in_flight)
        self._epoch: tuple[EpochPlan, int, int] | None = None

    def begin(self, plan: EpochPlan, epoch: int, start_batch: int) -> None:
        """Go on with an epoch from one of its batches on."""
        self.run += 1
        self._epoch = (plan, epoch, start_batch)

    def __iter__(self) -> Iterator[TrainRequest]:
        assert self._epoch is not None, "no epoch was begun"
        plan, epoch, start_batch = self._epoch
        sharded = plan if isinstance(plan, ShardedPlan) else None
        if sharded is None:
            self._announce(lambda: (self._all_shards(), np.empty(0, np.int32)))
        for index in range(start_batch, len(plan)):
            if sharded is not None:
                self._announce(partial(sharded.shards, index))
            batch = plan.batch(index)
            first = index * batch.rows.size
            positions = np.arange(first, first + batch.rows.size).reshape(batch.rows.shape)
            yield TrainRequest(
                epoch=epoch,
                labels=batch.labels[self._classes],
                rows=batch.rows[:, self._classes],
                positions=positions[:, self._classes],
                repaired=batch.repaired if self._classes.start == 0 else 0,
            )

    def _announce(self, shards: Callable[[], tuple[Shards, Shards]]) -> None:
        if self._announcer is not None:
            self._announcer.reads(*shards())


class _Announcer:
    """Tells of shards only when they change, and of those still being read as present."""

    def __init__(self, expect: Expect, in_flight: int) -> None:
        self._expect = expect
        self._recent: deque[Shards] = deque(maxlen=in_flight)
        self._told: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def reads(self, present: Shards, following: Shards) -> None:
        """A batch that reads `present` is asked for; `following` come after it."""
        if not present.size:  # the table knows of no shards
            return
        self._recent.append(present)
        distinct = {id(shards): shards for shards in self._recent}.values()
        held = present if len(distinct) == 1 else np.unique(np.concatenate(list(distinct)))
        news = (tuple(held.tolist()), tuple(following.tolist()))
        if news != self._told:
            self._told = news
            self._expect(held, following)
