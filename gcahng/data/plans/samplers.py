"""The samplers that come with the package; each is a plan of one epoch.

Letters: N training classes, P classes per batch, K samples per class, L batches per epoch. Nothing
carries over from one epoch to the next: where an epoch continues an earlier one, it computes how
far the earlier ones got.
"""

import numpy as np
from numpy.typing import NDArray

from gcahng.data.plans.batch_plan import BatchPlan, num_batches
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.deal import Deal
from gcahng.data.plans.draws import Purpose, choose, integers, permutation, stream
from gcahng.errors import InputError

_CACHED_CLASS = 512  # images from which a class's dealing is kept between its visits


class _Plan:
    """What the samplers share: sizes and the check of a batch number."""

    def __init__(self, table: ClassTable, seed: int, epoch: int, num_classes: int, num_samples: int) -> None:
        self.table = table
        self.seed = seed
        self.epoch = epoch
        self.num_classes = num_classes
        self.num_samples = num_samples
        self._length = num_batches(table.num_samples, num_classes, num_samples)

    def __len__(self) -> int:
        return self._length

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self._length:
            raise InputError(
                f"`index` of a batch must be from 0 to {self._length - 1}, got {index}. Go on with the next epoch."
            )


class UniformPlan(_Plan):
    """Every class, and every image of a class, comes again only after all the others.

    Classes: over an epoch the visits of any two classes differ by at most 1, so every class is
    visited when L P >= N. The L P mod N classes that are visited once more are dealt without
    replacement over the epochs. Images: each class goes through shuffles of its images, K per
    visit, over the whole run. Hence after e epochs every class had at least floor(e L P / N)
    visits, and its first ceil(n / K) visits show all its n images; `coverage_epochs` puts the two
    together. In the middle of a run the same holds within twice as many visits.

    No batch holds an image twice, unless its class has fewer than K images: of those every visit
    shows all, each floor(K / n) or ceil(K / n) times.
    """

    def __init__(self, table: ClassTable, seed: int, epoch: int, num_classes: int, num_samples: int) -> None:
        super().__init__(table, seed, epoch, num_classes, num_samples)
        self._rounds, num_extra = divmod(len(self) * num_classes, table.num_classes)
        self._extra = Deal(
            table.num_classes,
            num_extra,
            lambda draw, index: stream(seed, Purpose.EXTRA_CLASSES, draw, index),
        )
        self._classes = Deal(
            table.num_classes,
            num_classes,
            lambda draw, index: stream(seed, Purpose.CLASS_ROUNDS, epoch, draw, index),
            first=self._extra.block(epoch),
        )
        self._large_classes: dict[int, Deal] = {}

    def batch(self, index: int) -> BatchPlan:
        """Batch number `index`.

        Raises:
            InputError: There is no such batch.
        """
        self._check_index(index)
        labels = self._classes.block(index)
        earlier = self.epoch * self._rounds + self._extra.count_before(self.epoch, labels)
        visits = earlier + self._classes.count_before(index, labels)
        columns = [self._images(label, visit) for label, visit in zip(labels.tolist(), visits.tolist(), strict=True)]
        return BatchPlan(labels, np.stack(columns, axis=1))

    def _images(self, label: int, visit: int) -> NDArray[np.int64]:
        """(K,) sample rows of the class's visit number `visit` of the run."""
        rows = self.table.rows_of(label)
        if rows.size < self.num_samples:
            words = stream(self.seed, Purpose.SMALL_CLASS_IMAGES, label, visit)
            turns = -(-self.num_samples // rows.size)
            order = np.concatenate([permutation(words, rows.size) for _ in range(turns)])
            return rows[order[: self.num_samples]]
        return rows[self._image_deal(label, rows.size).block(visit)]

    def _image_deal(self, label: int, size: int) -> Deal:
        deal = self._large_classes.get(label)
        if deal is None:
            deal = Deal(
                size,
                self.num_samples,
                lambda draw, index: stream(self.seed, Purpose.CLASS_IMAGES, label, draw, index),
            )
            if size >= _CACHED_CLASS:
                self._large_classes[label] = deal
        return deal


class ReleasedPlan(_Plan):
    """The law of the released code.

    Every batch draws its P classes anew, without replacement inside the batch alone, so that
    within an epoch some classes come often and some never. Each class has a cursor that goes
    through a shuffle of its images, K per visit; when fewer than K are left, they are passed over
    and the class is shuffled again. A class with fewer than K images has K independent draws.

    Differs from the released code: its cursors run on from epoch to epoch; here every epoch begins
    with fresh shuffles, so that the plan depends on the epoch's number alone. A class is visited
    a few times per epoch, and its next images are a random draw either way.
    """

    def __init__(self, table: ClassTable, seed: int, epoch: int, num_classes: int, num_samples: int) -> None:
        super().__init__(table, seed, epoch, num_classes, num_samples)
        # Visits depend on all batches before, so they are counted once, in order, and kept.
        self._labels = np.empty((len(self), num_classes), np.int32)
        self._visits = np.empty((len(self), num_classes), np.int32)
        self._visited = np.zeros(table.num_classes, np.int32)
        self._counted = 0
        self._shuffles: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def batch(self, index: int) -> BatchPlan:
        """Batch number `index`.

        Raises:
            InputError: There is no such batch.
        """
        self._check_index(index)
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

    def _shuffled(self, label: int, shuffle: int, size: int) -> NDArray[np.int64]:
        kept = self._shuffles.get(label)
        if kept is not None and kept[0] == shuffle:
            return kept[1]
        words = stream(self.seed, Purpose.RELEASED_IMAGES, self.epoch, label, shuffle)
        order = permutation(words, size)
        if size >= _CACHED_CLASS:
            self._shuffles[label] = (shuffle, order)
        return order
