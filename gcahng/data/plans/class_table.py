"""The training classes of a run and the sample rows of each."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gcahng.data.plans.draws import Purpose, check_seed, permutation, stream
from gcahng.errors import InputError

SmallClasses = Literal["repeat", "drop"]


def _no_classes() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Training classes, numbered 0..N-1 by ascending class id, and their sample rows.

    Holds 8 bytes per sample and 24 per class. Make one with `ClassTable.build`.

    Attributes:
        class_ids: (N,) ascending; class id of each label.
        rows: (S,) sample rows, class after class by label, ascending inside a class.
        starts: (N + 1,) first position of each label in `rows`, then S.
        repeated: Class ids with fewer images than a batch takes; their images are repeated.
        dropped: Class ids that were left out for the same reason.
    """

    class_ids: NDArray[np.int64]
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    repeated: NDArray[np.int64] = field(default_factory=_no_classes)
    dropped: NDArray[np.int64] = field(default_factory=_no_classes)

    @classmethod
    def build(
        cls,
        class_id: NDArray[Any],
        rows: NDArray[Any] | None = None,
        *,
        samples_per_class: int = 1,
        small_classes: SmallClasses = "repeat",
    ) -> "ClassTable":
        """Sort `rows` by class.

        Args:
            class_id: Class id of every sample of the data set, also of those not trained on.
            rows: Samples to train on, positions in `class_id`; all if None.
            samples_per_class: K, images of a class in one batch.
            small_classes: What happens to a class with fewer than K images: "repeat" its images
                within a batch, or "drop" the class. `repeated` and `dropped` list them.
        Raises:
            InputError: A label is no integer, a row is out of range or occurs twice, no class is
                left, or an option has another value.
        """
        if small_classes not in ("repeat", "drop"):
            raise InputError(f"`small_classes` must be 'repeat' or 'drop', got {small_classes!r}. Choose one.")
        if samples_per_class < 1:
            raise InputError(f"`samples_per_class` must be at least 1, got {samples_per_class}. Raise it.")
        labels = _integers("class_id", class_id)
        chosen = np.arange(labels.size) if rows is None else _integers("rows", rows)
        chosen = _ascending_rows(chosen, labels.size)
        if not _ascends(labels[chosen]):
            chosen = chosen[np.argsort(labels[chosen], kind="stable")]
        ordered = labels[chosen]
        firsts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
        class_ids = ordered[firsts]
        counts = np.diff(firsts, append=ordered.size)
        table = cls(class_ids, chosen, _starts(counts))
        small = counts < samples_per_class
        if not small.any():
            return table
        if small_classes == "repeat":
            return cls(class_ids, chosen, table.starts, repeated=class_ids[small])
        if small.all():
            raise InputError(
                f"`small_classes` is 'drop' and every class is small: expected a class with at "
                f"least {samples_per_class} images, got at most {counts.max()}. Lower the number "
                "of samples per class or set `small_classes` to 'repeat'."
            )
        kept = table.select(np.flatnonzero(~small))
        return cls(kept.class_ids, kept.rows, kept.starts, dropped=class_ids[small])

    @property
    def num_classes(self) -> int:
        """N."""
        return self.class_ids.size

    @property
    def num_samples(self) -> int:
        """S, images of all classes together."""
        return self.rows.size

    @property
    def counts(self) -> NDArray[np.int64]:
        """(N,) images per label."""
        return np.diff(self.starts)

    def rows_of(self, label: int) -> NDArray[np.int64]:
        """Sample rows of a label, ascending (a view).

        Raises:
            InputError: There is no such label.
        """
        if not 0 <= label < self.num_classes:
            raise InputError(
                f"`label` must be from 0 to {self.num_classes - 1}, got {label}. Labels count "
                "training classes; look a class id up in `class_ids`."
            )
        return self.rows[self.starts[label] : self.starts[label + 1]]

    def select(self, labels: NDArray[np.int64]) -> "ClassTable":
        """The table of some classes alone, numbered anew.

        Args:
            labels: Distinct labels of this table.
        """
        keep = np.zeros(self.num_classes, bool)
        keep[labels] = True
        counts = self.counts
        class_ids = self.class_ids[keep]
        return ClassTable(
            class_ids,
            self.rows[np.repeat(keep, counts)],
            _starts(counts[keep]),
            repeated=self.repeated[np.isin(self.repeated, class_ids)],
            dropped=self.dropped,
        )

    def rows_of_classes(self, class_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample rows of some class ids, ascending; ids that the table lacks have none."""
        return np.sort(self.rows[np.repeat(np.isin(self.class_ids, class_ids), self.counts)])


def split_validation(table: ClassTable, share: float, seed: int) -> tuple[ClassTable, NDArray[np.int64]]:
    """Hold classes out for validation.

    Args:
        table: All training classes.
        share: Share of the classes to hold out, in [0, 1); the number is rounded.
        seed: Decides which.
    Returns:
        The table of the classes that stay, numbered anew, and the held-out class ids, ascending.
        `table.rows_of_classes(ids)` are the validation images.
    Raises:
        InputError: `share` is out of range or leaves no class to train on.
    """
    if not 0 <= share < 1:
        raise InputError(
            f"`share` of validation classes must be from 0 to below 1, got {share}. Give a share such as 0.1."
        )
    total = table.num_classes
    held_out = round(share * total)
    if held_out >= total:
        raise InputError(
            f"`share` {share} of {total} classes holds out {held_out}: expected at least one "
            "class to train on. Lower the share."
        )
    order = permutation(stream(check_seed(seed), Purpose.VALIDATION_CLASSES), total)
    validation = np.sort(order[:held_out])
    return table.select(np.sort(order[held_out:])), table.class_ids[validation]


def _integers(name: str, values: NDArray[Any]) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InputError(
            f"`{name}` must be a one-dimensional array of integers, got {array.dtype} of shape "
            f"{array.shape}. Number the classes and samples."
        )
    return array.astype(np.int64)


def _ascends(values: NDArray[np.int64]) -> bool:
    """Shards are class-major: ten million samples are checked in less time than sorted."""
    return bool((values[1:] >= values[:-1]).all())


def _ascending_rows(rows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    if rows.size == 0:
        raise InputError("`rows` is empty: expected at least one training image. Check the split.")
    if rows.min() < 0 or rows.max() >= size:
        bad = rows[(rows < 0) | (rows >= size)][0]
        raise InputError(
            f"`rows` must be positions in `class_id`: expected 0 to {size - 1}, got {bad}. Take "
            "rows and class ids from the same data set."
        )
    rows = rows if _ascends(rows) else np.sort(rows)
    repeats = rows[1:][rows[1:] == rows[:-1]]
    if repeats.size:
        raise InputError(
            f"`rows` must not repeat a sample: row {repeats[0]} occurs more than once. Pass each row once."
        )
    return rows


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
