"""The training classes of a run and the sample rows of each.

Shards are class-major, so a class is a first row and a number of rows. Only classes whose rows do
not follow one another have them listed. A million classes take about 10 MB, however many images.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gcahng.data.plans.freed_memory import give_back_freed_memory
from gcahng.data.plans.shard_layout import ShardLayout
from gcahng.errors import InputError

if TYPE_CHECKING:
    from gcahng.data.shards.reader import ShardSet

SmallClasses = Literal["repeat", "drop"]
Integers = NDArray[np.integer[Any]]


def _nothing() -> Integers:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Training classes, numbered 0..N-1 by ascending class id, and their sample rows.

    Make one with `ClassTable.from_shards` or `ClassTable.build`. Arrays have the smallest integer
    type that holds their values (32 bits at least, but for `lengths`).

    Attributes:
        class_ids: (N,) ascending; class id of each label.
        firsts: (N,) first row of each label; a value f < 0 stands for rows that are listed in
            `scattered` from place -1 - f on.
        lengths: (N,) number of rows of each label; `counts` has them as int64.
        scattered: Rows of the labels whose rows do not follow one another.
        repeated: Class ids with fewer images than a batch takes; their images are repeated.
        dropped: Class ids that were left out for the same reason.
        layout: The shards that the rows lie in, if they lie in shards.
    """

    class_ids: Integers
    firsts: Integers
    lengths: Integers
    scattered: Integers = field(default_factory=_nothing)
    repeated: Integers = field(default_factory=_nothing)
    dropped: Integers = field(default_factory=_nothing)
    layout: ShardLayout | None = None

    @classmethod
    def build(
        cls,
        class_id: NDArray[Any],
        rows: NDArray[Any] | None = None,
        *,
        samples_per_class: int = 1,
        small_classes: SmallClasses = "repeat",
        layout: ShardLayout | None = None,
    ) -> "ClassTable":
        """Sort `rows` by class.

        Args:
            class_id: Class id of every sample of the data set, also of those not trained on.
            rows: Samples to train on, positions in `class_id`; all if None.
            samples_per_class: K, images of a class in one batch.
            small_classes: What happens to a class with fewer than K images: "repeat" its images
                within a batch, or "drop" the class. `repeated` and `dropped` list them.
            layout: The shards that the rows lie in, if they do.
        Raises:
            InputError: A label is no integer, a row is out of range or occurs twice, no class is
                left, or an option has another value.
        """
        _check_options(samples_per_class, small_classes)
        labels = _integers("class_id", class_id)
        chosen = np.arange(labels.size) if rows is None else _integers("rows", rows)
        chosen = _ascending_rows(chosen, labels.size)
        of_class = labels[chosen]
        # A run: rows that follow one another, of one class.
        begins = np.ones(chosen.size, bool)
        begins[1:] = (np.diff(chosen) != 1) | (np.diff(of_class) != 0)
        places = np.flatnonzero(begins)
        counts = np.diff(places, append=chosen.size)
        table = _from_runs(of_class[places], chosen[places], counts, layout)
        return _without_small(table, samples_per_class, small_classes)

    @classmethod
    def from_shards(
        cls, shards: "ShardSet", split: str, *, samples_per_class: int = 1, small_classes: SmallClasses = "repeat"
    ) -> "ClassTable":
        """The classes of one split of a shard folder.

        Args:
            shards: The converted data set.
            split: Its split to train on.
            samples_per_class: See `build`.
            small_classes: See `build`.
        Raises:
            InputError: The split is empty, no class is left, or an option has another value.
            DataError: There is no such split.
        """
        _check_options(samples_per_class, small_classes)
        class_id, first_row, count = shards.class_runs(split)
        if class_id.size == 0:
            raise InputError(f"Split {split!r} is empty: expected at least one training image. Check the split.")
        infos = shards.manifest.shards
        layout = ShardLayout.build(
            [info.num_samples for info in infos], [info.bytes for info in infos], shards.manifest.window_bytes
        )
        table = _without_small(_from_runs(class_id, first_row, count, layout), samples_per_class, small_classes)
        del class_id, first_row, count
        give_back_freed_memory(table.num_classes)
        return table

    @property
    def num_classes(self) -> int:
        """N."""
        return self.class_ids.size

    @property
    def num_samples(self) -> int:
        """S, images of all classes together."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def counts(self) -> NDArray[np.int64]:
        """(N,) images per label, a new array."""
        return self.lengths.astype(np.int64)

    @property
    def rows(self) -> NDArray[np.int64]:
        """(S,) sample rows, class after class by label, ascending inside a class; a new array."""
        labels = np.repeat(np.arange(self.num_classes), self.lengths)
        ends = np.cumsum(self.lengths, dtype=np.int64)
        return self.take(labels, np.arange(labels.size) - np.repeat(ends - self.lengths, self.lengths))

    def rows_of(self, label: int) -> NDArray[np.int64]:
        """Sample rows of a label, ascending.

        Raises:
            InputError: There is no such label.
        """
        if not 0 <= label < self.num_classes:
            raise InputError(
                f"`label` must be from 0 to {self.num_classes - 1}, got {label}. Labels count "
                "training classes; look a class id up in `class_ids`."
            )
        first, count = int(self.firsts[label]), int(self.lengths[label])
        if first >= 0:
            return np.arange(first, first + count)
        return self.scattered[-1 - first : -1 - first + count].astype(np.int64)

    def take(self, labels: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of labels at places: `rows_of(labels[...])[places[...]]` for arrays that broadcast."""
        firsts = self.firsts[labels].astype(np.int64)
        rows = firsts + places
        listed = firsts < 0
        if listed.any():
            listed = np.broadcast_to(listed, rows.shape)
            at = (-1 - firsts) + places
            rows[listed] = self.scattered[at[listed]]
        return rows

    def select(self, labels: NDArray[np.int64]) -> "ClassTable":
        """The table of some classes alone, numbered anew.

        Args:
            labels: Distinct labels of this table.
        """
        keep = np.zeros(self.num_classes, bool)
        keep[labels] = True
        class_ids, firsts, lengths = self.class_ids[keep], self.firsts[keep], self.lengths[keep]
        scattered, listed = self.scattered, np.flatnonzero(firsts < 0)
        if listed.size:
            parts = [scattered[-1 - f : -1 - f + n] for f, n in zip(firsts[listed], lengths[listed], strict=True)]
            scattered = np.concatenate(parts)
            firsts[listed] = -1 - _starts(lengths[listed])
        return replace(
            self,
            class_ids=class_ids,
            firsts=firsts,
            lengths=lengths,
            scattered=scattered if listed.size else _nothing(),
            repeated=self.repeated[np.isin(self.repeated, class_ids)],
        )

    def rows_of_classes(self, class_ids: Integers) -> NDArray[np.int64]:
        """Sample rows of some class ids, ascending; ids that the table lacks have none."""
        return np.sort(self.select(np.flatnonzero(np.isin(self.class_ids, class_ids))).rows)


def _from_runs(
    class_id: NDArray[np.int64], first_row: NDArray[np.int64], count: NDArray[np.int64], layout: ShardLayout | None
) -> ClassTable:
    """The table of runs of rows: as long as rows follow one another, by ascending first row."""
    if not bool((class_id[1:] > class_id[:-1]).all()):
        order = np.argsort(class_id, kind="stable")
        class_id, first_row, count = class_id[order], first_row[order], count[order]
    new_class = np.ones(class_id.size, bool)
    new_class[1:] = class_id[1:] != class_id[:-1]
    begins = np.flatnonzero(new_class)
    lengths = np.add.reduceat(count, begins)
    firsts = first_row[begins]
    scattered = _nothing()
    listed = np.flatnonzero(np.diff(begins, append=class_id.size) > 1)
    if listed.size:
        of_listed = np.isin(np.cumsum(new_class) - 1, listed)
        pairs = zip(first_row[of_listed].tolist(), count[of_listed].tolist(), strict=True)
        scattered = np.concatenate([np.arange(first, first + number) for first, number in pairs])
        firsts[listed] = -1 - _starts(lengths[listed])
    return ClassTable(
        _compact(class_id[begins]),
        _compact(firsts),
        _compact(lengths, np.int16),
        _compact(scattered),
        layout=layout,
    )


def _without_small(table: ClassTable, samples_per_class: int, small_classes: SmallClasses) -> ClassTable:
    small = table.lengths < samples_per_class
    if not small.any():
        return table
    if small_classes == "repeat":
        return replace(table, repeated=table.class_ids[small])
    if small.all():
        raise InputError(
            f"`small_classes` is 'drop' and every class is small: expected a class with at "
            f"least {samples_per_class} images, got at most {table.lengths.max()}. Lower the number "
            "of samples per class or set `small_classes` to 'repeat'."
        )
    return replace(table.select(np.flatnonzero(~small)), dropped=table.class_ids[small])


def _check_options(samples_per_class: int, small_classes: SmallClasses) -> None:
    if small_classes not in ("repeat", "drop"):
        raise InputError(f"`small_classes` must be 'repeat' or 'drop', got {small_classes!r}. Choose one.")
    if samples_per_class < 1:
        raise InputError(f"`samples_per_class` must be at least 1, got {samples_per_class}. Raise it.")


def _integers(name: str, values: NDArray[Any]) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InputError(
            f"`{name}` must be a one-dimensional array of integers, got {array.dtype} of shape "
            f"{array.shape}. Number the classes and samples."
        )
    return array.astype(np.int64)


def _compact(values: Integers, smallest: type[np.signedinteger[Any]] = np.int32) -> Integers:
    for kind in (smallest, np.int32):
        limits = np.iinfo(kind)
        if values.size and limits.min <= values.min() and values.max() <= limits.max:
            return values.astype(kind)
    return values


def _ascending_rows(rows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    if rows.size == 0:
        raise InputError("`rows` is empty: expected at least one training image. Check the split.")
    if rows.min() < 0 or rows.max() >= size:
        bad = rows[(rows < 0) | (rows >= size)][0]
        raise InputError(
            f"`rows` must be positions in `class_id`: expected 0 to {size - 1}, got {bad}. Take "
            "rows and class ids from the same data set."
        )
    if not bool((rows[1:] >= rows[:-1]).all()):
        rows = np.sort(rows)
    repeats = rows[1:][rows[1:] == rows[:-1]]
    if repeats.size:
        raise InputError(
            f"`rows` must not repeat a sample: row {repeats[0]} occurs more than once. Pass each row once."
        )
    return rows


def _starts(counts: Integers) -> NDArray[np.int64]:
    """Place of the first row of each of several lists, one after the other."""
    return np.cumsum(counts, dtype=np.int64) - counts
