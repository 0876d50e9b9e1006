"""The sampler "released": the law of the released code."""

import numpy as np
from numpy.typing import NDArray

from gcahng.data.draws import Purpose, choose, integers, permutation, stream
from gcahng.data.plans.batch_plan import BatchPlan, PlanRequest, SizedPlan, num_batches
from gcahng.data.plans.bounded_cache import BoundedCache

_CACHED_CLASS = 512  # images from which a class's shuffle is kept between its visits
_KEPT_NUMBERS = 2_000_000  # bound on the shuffles that are kept, 4 bytes each


class ReleasedPlan(SizedPlan):
    """The law of the released code.

    Every batch draws its P classes anew, without replacement inside the batch alone, so that
    within an epoch some classes come often and some never. Each class has a cursor that goes
    through a shuffle of its images, K per visit; when fewer than K are left, they are passed over
    and the class is shuffled again. A class with fewer than K images has K independent draws.

    Differs from the released code: its cursors run on from epoch to epoch; here every epoch begins
    with fresh shuffles, so that the plan depends on the epoch's number alone. A class is visited
    a few times per epoch, and its next images are a random draw either way.
    """

    def __init__(self, request: PlanRequest) -> None:
        table, num_classes = request.table, request.num_classes
        super().__init__(request, num_batches(table.num_samples, num_classes, request.num_samples))
        # Visits depend on all batches before, so they are counted once, in order, and kept.
        self._labels = np.empty((len(self), num_classes), np.int32)
        self._visits = np.empty((len(self), num_classes), np.int32)
        self._visited = np.zeros(table.num_classes, np.int32)
        self._counted = 0
        self._shuffles: BoundedCache[NDArray[np.int32]] = BoundedCache(_KEPT_NUMBERS)

    def batch(self, index: int) -> BatchPlan:
        """Batch number `index`.

        Raises:
            InputError: There is no such batch.
        """
        self.check_index(index)
        while self._counted <= index:
            self._count_next()
        labels = self._labels[index].astype(np.int64)
        columns = [
            self._images(label, visit)
            for label, visit in zip(labels.tolist(), self._visits[index].tolist(), strict=True)
        ]
        return BatchPlan(labels, np.stack(columns, axis=1))

    def _count_next(self) -> None:
        words = stream(self.seed, Purpose.RELEASED_CLASSES, self.epoch, self._counted)
        labels = choose(words, self.table.num_classes, self.num_classes)
        self._labels[self._counted] = labels
        self._visits[self._counted] = self._visited[labels]
        self._visited[labels] += 1
        self._counted += 1

    def _images(self, label: int, visit: int) -> NDArray[np.int64]:
        """(K,) sample rows of the class's visit number `visit` of the epoch."""
        rows = self.table.rows_of(label)
        visits_per_shuffle = rows.size // self.num_samples
        if visits_per_shuffle == 0:
            words = stream(self.seed, Purpose.RELEASED_SMALL_CLASS, self.epoch, label, visit)
            return rows[integers(words, rows.size, self.num_samples)]
        shuffle, place = divmod(visit, visits_per_shuffle)
        start = place * self.num_samples
        return rows[self._shuffled(label, shuffle, rows.size)[start : start + self.num_samples]]

    def _shuffled(self, label: int, shuffle: int, size: int) -> NDArray[np.int32]:
        def make() -> NDArray[np.int32]:
            words = stream(self.seed, Purpose.RELEASED_IMAGES, self.epoch, label, shuffle)
            return permutation(words, size).astype(np.int32)

        return make() if size < _CACHED_CLASS else self._shuffles.get((label, shuffle), make, size)
