"""The sampler "uniform": classes without replacement, images without replacement.

Letters: N training classes, P classes per batch, K samples per class, L batches per epoch. Nothing
carries over from one epoch to the next: where an epoch continues an earlier one, it computes how
far the earlier ones got.
"""

import numpy as np
from numpy.typing import NDArray

from gcahng.data.draws import Purpose, stream
from gcahng.data.plans.batch_plan import BatchPlan, PlanRequest, SizedPlan, num_batches
from gcahng.data.plans.class_images import ClassImages
from gcahng.data.plans.deal import Deal
from gcahng.data.plans.freed_memory import give_back_freed_memory
from gcahng.data.plans.rounds import Numbers, Rounds
from gcahng.data.plans.windows import ShardGrouping, Shards, Window, home_shards


class UniformPlan(SizedPlan):
    """Every class, and every image of a class, comes again only after all the others.

    Classes: over an epoch the visits of any two classes differ by at most 1, so every class is
    visited when L P >= N. The L P mod N classes that are visited once more are dealt without
    replacement over the epochs. Images: each class goes through shuffles of its images, K per
    visit, over the whole run. Hence after e epochs every class had at least floor(e L P / N)
    visits, and its first ceil(n / K) visits show all its n images; `coverage_epochs` puts the two
    together. In the middle of a run the same holds within twice as many visits.

    Windows: data that exceed the shard folder's `window_bytes` are visited window by window (see
    `gcahng.data.plans.windows`), all visits of a class in the window of its home shard. That changes
    the order of an epoch's visits, not their number. A batch at a border takes classes of both
    windows.

    No batch holds an image twice, unless its class has fewer than K images: of those every visit
    shows all, each floor(K / n) or ceil(K / n) times.
    """

    def __init__(self, request: PlanRequest) -> None:
        table = request.table
        super().__init__(request, num_batches(table.num_samples, request.num_classes, request.num_samples))
        self._rounds, num_extra = divmod(len(self) * self.num_classes, table.num_classes)
        extra = Deal(
            table.num_classes,
            num_extra,
            lambda draw, index: stream(self.seed, Purpose.EXTRA_CLASSES, draw, index),
        )
        earlier = extra.count_before(self.epoch, np.arange(table.num_classes))
        self._extra_visits = int(earlier.min())
        self._one_more = earlier > self._extra_visits
        self._images = ClassImages(table, self.seed, self.num_samples)
        self._order = self._class_order(extra.block(self.epoch))
        del extra, earlier
        give_back_freed_memory(table.num_classes)

    def batch(self, index: int) -> BatchPlan:
        """Batch number `index`.

        Raises:
            InputError: There is no such batch.
        """
        self.check_index(index)
        labels, visits = self._order.block(index)
        earlier = self.epoch * self._rounds + self._extra_visits + self._one_more[labels]
        return BatchPlan(labels, self._images.rows(labels, earlier + visits))

    def shards(self, index: int) -> tuple[Shards, Shards]:
        """Shards of the windows that a batch reaches into, and of the window after them.

        After the last window comes the first one of the next epoch. Empty where the table lies in no
        shards.

        Raises:
            InputError: There is no such batch.
        """
        self.check_index(index)
        if self._grouping is None:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        first, last, following = self._order.windows(index)
        parts = [window.shards for window in self._windows[first : last + 1]]
        present = parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts))
        return present, self._windows[following].shards if following is not None else self._next_epoch()

    def _class_order(self, extra: Numbers) -> "_OneWindow | _ManyWindows":
        layout = self.table.layout
        self._grouping: ShardGrouping | None = None
        self._next_shards: Shards | None = None
        if layout is not None:
            homes = home_shards(self.table, layout)
            self._grouping = ShardGrouping(self.table, homes, layout, self.num_classes)
            self._windows = self._grouping.windows(self.seed, self.epoch)
            if len(self._windows) > 1:
                return _ManyWindows(self, self._windows, homes, self._rounds, extra)
        return _OneWindow(self, extra)

    def _next_epoch(self) -> Shards:
        if self._next_shards is None:
            assert self._grouping is not None
            self._next_shards = self._grouping.windows(self.seed, self.epoch + 1)[0].shards
        return self._next_shards


class _OneWindow:
    """The classes of an epoch, all in one window."""

    def __init__(self, plan: UniformPlan, extra: Numbers) -> None:
        seed, epoch = plan.seed, plan.epoch
        self._deal = Deal(
            plan.table.num_classes,
            plan.num_classes,
            lambda draw, index: stream(seed, Purpose.CLASS_ROUNDS, epoch, draw, index),
            first=extra,
        )

    def block(self, index: int) -> tuple[Numbers, Numbers]:
        """Labels of a batch, and how often each was visited earlier in the epoch."""
        labels = self._deal.block(index)
        return labels, self._deal.count_before(index, labels)

    def windows(self, index: int) -> tuple[int, int, int | None]:
        """First and last window of a batch, and the next one of this epoch."""
        return 0, 0, None


class _ManyWindows:
    """The classes of an epoch, window after window.

    A window is a run of places of the epoch: its share of the extra visits, then as many rounds of
    all its classes as the epoch has. Batches are cut from all places, whatever window they lie in.
    """

    def __init__(self, plan: UniformPlan, windows: list[Window], homes: Shards, rounds: int, extra: Numbers) -> None:
        self._seed, self._epoch, self._block_size = plan.seed, plan.epoch, plan.num_classes
        window_of_shard = np.zeros(int(homes.max()) + 1, np.int32)
        for number, window in enumerate(windows):
            window_of_shard[window.homes] = number
        window_of = window_of_shard[homes]
        self._members = np.argsort(window_of, kind="stable").astype(np.int32)
        self._member_ends = np.cumsum([window.num_classes for window in windows])
        of_extra = window_of[extra]
        self._extra = extra[np.argsort(of_extra, kind="stable")].astype(np.int32)
        num_extra = np.bincount(of_extra, minlength=len(windows))
        self._extra_ends = np.cumsum(num_extra)
        places = rounds * np.array([window.num_classes for window in windows]) + num_extra
        self._starts = np.concatenate([[0], np.cumsum(places)])
        self._kept: dict[int, tuple[NDArray[np.int32], Rounds]] = {}

    def block(self, index: int) -> tuple[Numbers, Numbers]:
        """Labels of a batch, and how often each was visited earlier in the epoch."""
        labels, visits = [], []
        place, stop = index * self._block_size, (index + 1) * self._block_size
        while place < stop:
            window = self._window_at(place)
            inside = place - int(self._starts[window])
            count = min(stop, int(self._starts[window + 1])) - place
            members, rounds = self._rounds_of(window)
            numbers = rounds.slots(inside, count)
            labels.append(members[numbers])
            visits.append(rounds.count_before(inside, numbers))
            place += count
        return np.concatenate(labels).astype(np.int64), np.concatenate(visits)

    def windows(self, index: int) -> tuple[int, int, int | None]:
        """First and last window of a batch, and the next one of this epoch."""
        place = index * self._block_size
        first, last = self._window_at(place), self._window_at(place + self._block_size - 1)
        end = int(self._starts[last + 1])
        return first, last, self._window_at(end) if end < self._starts[-1] else None

    def _window_at(self, place: int) -> int:
        # Windows without a visit begin where the next one does.
        return int(np.searchsorted(self._starts, place, side="right")) - 1

    def _rounds_of(self, window: int) -> tuple[NDArray[np.int32], Rounds]:
        """Labels of a window, and their order by place among these."""
        kept = self._kept.get(window)
        if kept is None:
            members = _part(self._members, self._member_ends, window)
            extra = np.searchsorted(members, _part(self._extra, self._extra_ends, window))
            rounds = Rounds(
                members.size,
                self._block_size,
                lambda turn: stream(self._seed, Purpose.WINDOW_ROUNDS, self._epoch, window, turn),
                first=extra,
                offset=int(self._starts[window]) % self._block_size,
            )
            if len(self._kept) > 1:  # a batch reaches into two
                del self._kept[min(self._kept)]
            kept = self._kept[window] = (members, rounds)
        return kept


def _part(values: NDArray[np.int32], ends: Numbers, number: int) -> NDArray[np.int32]:
    return values[int(ends[number - 1]) if number else 0 : int(ends[number])]
