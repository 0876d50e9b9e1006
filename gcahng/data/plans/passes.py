"""The samplers "filled" and "sample" of the code released with SCT (Xuan et al., ECCV 2020).

An epoch is a number of passes over the classes. Both draw anew in every epoch, as the released code
does, whose training loop builds its sampler once per epoch; but each draw here is a function of the
seed and the epoch.

Letters: C training classes, P classes per batch, K samples per class, M images per class and pass.
"""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from gcahng.data.draws import Purpose, choose, integers, permutation, stream
from gcahng.data.plans.batch_plan import BatchPlan, PlanRequest, SizedPlan
from gcahng.data.plans.bounded_cache import BoundedCache
from gcahng.data.plans.class_images import IN_ROWS, repeated_counts, repeated_places
from gcahng.data.plans.philox import row_permutations, stream_words
from gcahng.data.plans.rounds import Numbers, Rounds

_KEPT_NUMBERS = 2_000_000  # bound on the class fillings that are kept, 4 bytes each


class _PassesPlan(SizedPlan, ABC):
    """Passes over the classes, each in an order of its own, cut into batches of P classes.

    A batch that spans two passes would hold a class twice wherever both orders name it. The later
    order is then mended: it begins with those of its classes that the batch does not hold yet. Each
    class that had to make room counts as one repair. An incomplete last batch is left out, as the
    released training loop passes over it.
    """

    def __init__(self, request: PlanRequest, groups: int) -> None:
        """
        Args:
            request: What the plan is made from.
            groups: Visits of a class per pass, all classes in the same order every time.
        """
        num_classes = request.table.num_classes
        self._per_pass = num_classes * groups
        self._num_groups = groups
        passes = 1 if request.passes is None else request.passes
        super().__init__(request, max(1, passes * self._per_pass // request.num_classes))
        self._order = Rounds(
            num_classes,
            request.num_classes,
            lambda turn: stream(self.seed, Purpose.PASS_CLASSES, self.epoch, turn),
            repeats=groups,
        )

    def batch(self, index: int) -> BatchPlan:
        """Batch number `index`.

        Raises:
            InputError: There is no such batch.
        """
        self.check_index(index)
        start = index * self.num_classes
        labels = self._order.slots(start, self.num_classes)
        turn, place = np.divmod(np.arange(start, start + self.num_classes), self._per_pass)
        mended = self._order.mended(int(turn[-1])) if turn[0] != turn[-1] else 0
        places, replaced = self._places(labels, turn, place // self.table.num_classes)
        return BatchPlan(labels, self.table.take(labels, places.T), mended + replaced)

    @abstractmethod
    def _places(self, labels: Numbers, turns: Numbers, groups: Numbers) -> tuple[Numbers, int]:
        """(P, K) places in the classes for their visit number `groups` of passes `turns`, and repairs."""


class SamplePlan(_PassesPlan):
    """In every pass K random images of each class, without replacement; the classes in random order.

    A class with fewer than K images shows all of them, and then again in another order until K are
    full. Differs from the released code: there such a class takes fewer places, after which the
    batches no longer hold whole classes.
    """

    def __init__(self, request: PlanRequest) -> None:
        super().__init__(request, groups=1)

    def _places(self, labels: Numbers, turns: Numbers, groups: Numbers) -> tuple[Numbers, int]:
        count = self.num_samples
        sizes = self.table.lengths[labels].astype(np.int64)
        places = np.empty((labels.size, count), np.int64)
        small, some = sizes < count, (sizes >= count) & (sizes < IN_ROWS)
        if small.any():
            words = self._words(repeated_counts(sizes[small], count), turns[small], labels[small])
            places[small] = repeated_places(words, sizes[small], count)
        if some.any():
            places[some] = row_permutations(self._words(sizes[some], turns[some], labels[some]))[:, :count]
        for p in np.flatnonzero(~small & ~some).tolist():
            words_of_class = stream(self.seed, Purpose.PASS_IMAGES, self.epoch, int(turns[p]), int(labels[p]))
            places[p] = choose(words_of_class, int(sizes[p]), count)
        return places, 0

    def _words(self, counts: Numbers, turns: Numbers, labels: Numbers) -> NDArray[np.uint64]:
        return stream_words(self.seed, Purpose.PASS_IMAGES, counts, self.epoch, turns, labels)


class FilledPlan(_PassesPlan):
    """In every pass M images of each class, dealt in groups of K.

    M is the size of the longest class, made divisible by K: cut where less than 0.3 K images are
    over, else filled up. A shorter class has all its images and random ones of them again, a longer
    one a random choice. They are shuffled and dealt in groups of K; a pass goes through all classes
    for the first groups, then in the same order for the second ones, and so on.

    A group with an image twice, of a class that has K, is repaired: in place of the repeated one
    comes the next image of the class, by row and round its end, that the group does not hold.

    Differs from the released code: there several passes are mixed up (its list of classes is not
    emptied between them), so that a group holds images of different classes. One pass, as it is
    used, has the same law here, but for the repairs.
    """

    def __init__(self, request: PlanRequest) -> None:
        count, longest = request.num_samples, int(request.table.lengths.max())
        over = longest % count
        # int() as in the released code. Where all classes are too short, M would be 0 there; here it is K.
        filled = longest - over + (count if over >= max(1, int(0.3 * count)) else 0)
        self._filled_size = max(count, filled)
        super().__init__(request, groups=self._filled_size // count)
        self._fillings: BoundedCache[NDArray[np.int32]] = BoundedCache(_KEPT_NUMBERS)

    def _places(self, labels: Numbers, turns: Numbers, groups: Numbers) -> tuple[Numbers, int]:
        count, replaced = self.num_samples, 0
        places = np.empty((labels.size, count), np.int64)
        for p, (label, turn, group) in enumerate(zip(labels.tolist(), turns.tolist(), groups.tolist(), strict=True)):
            size = int(self.table.lengths[label])
            places[p] = self._filling(label, turn, size)[group * count : (group + 1) * count]
            if size >= count:
                replaced += _make_distinct(places[p], size)
        return places, replaced

    def _filling(self, label: int, turn: int, size: int) -> NDArray[np.int32]:
        """(M,) places in a class, in the order in which a pass shows them."""
        total = self._filled_size

        def make() -> NDArray[np.int32]:
            words = stream(self.seed, Purpose.PASS_IMAGES, self.epoch, turn, label)
            if size >= total:
                return choose(words, size, total).astype(np.int32)
            images = np.concatenate([np.arange(size), integers(words, size, total - size)])
            return images[permutation(words, total)].astype(np.int32)

        return self._fillings.get((turn, label), make, total)


def _make_distinct(places: Numbers, size: int) -> int:
    """Replace repeated places in a class of `size` images, in place; how many there were."""
    if np.unique(places).size == places.size:
        return 0
    held = set(places.tolist())
    seen: set[int] = set()
    replaced = 0
    for at, place in enumerate(places.tolist()):
        if place in seen:
            while place in held:
                place = (place + 1) % size
            held.add(place)
            places[at] = place
            replaced += 1
        seen.add(place)
    return replaced
