"""Plans of an epoch by the sampler's name."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcahng.components import is_component_path, load_component
from gcahng.data.draws import check_seed
from gcahng.data.plans.batch_plan import BatchPlan, EpochPlan, PlanRequest, ShardedPlan, num_batches
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.passes import FilledPlan, SamplePlan
from gcahng.data.plans.released import ReleasedPlan
from gcahng.data.plans.uniform import UniformPlan
from gcahng.errors import ConfigError, InputError

__all__ = ["BatchPlan", "EpochPlan", "PlanRequest", "coverage_epochs", "make_plan", "num_batches"]

Sampler = Callable[[PlanRequest], EpochPlan]

SAMPLERS: dict[str, Sampler] = {
    "uniform": UniformPlan,
    "released": ReleasedPlan,
    "filled": FilledPlan,
    "sample": SamplePlan,
}
WITHOUT_PASSES = ("uniform", "released")
"""Samplers whose epochs have a length of their own."""


def make_plan(
    table: ClassTable,
    *,
    seed: int,
    epoch: int,
    num_classes: int,
    num_samples: int,
    sampler: str = "uniform",
    passes: int | None = None,
    class_centres: NDArray[np.floating[Any]] | None = None,
) -> EpochPlan:
    """The plan of one epoch; the same arguments give the same plan in every process.

    Args:
        table: Training classes.
        seed: Seed of the run.
        epoch: Counted from 0.
        num_classes: P, classes per batch.
        num_samples: K, samples per class.
        sampler: "uniform", "released", "filled", "sample", or the dotted path
            `package.module:callable` of a callable `(request: PlanRequest) -> EpochPlan`.
        passes: Passes over the classes per epoch, for "filled", "sample" and own samplers; None
            leaves it to the sampler, which is 1 for the first two.
        class_centres: (N, D) mean embeddings, for own samplers that use them.
    Raises:
        InputError: P, K, the seed, the epoch, the passes or the centres do not fit. A plan of an own
            sampler also raises it for a batch that is not P distinct classes x K of their samples.
        ConfigError: There is no such sampler, or it has no passes.
    """
    _check_sizes(table, epoch, num_classes, num_samples)
    _check_options(table, sampler, passes, class_centres)
    request = PlanRequest(
        table=table,
        seed=check_seed(seed),
        epoch=epoch,
        num_classes=num_classes,
        num_samples=num_samples,
        passes=passes,
        class_centres=class_centres,
    )
    known = SAMPLERS.get(sampler)
    if known is not None:
        return known(request)
    if not is_component_path(sampler):
        raise ConfigError(
            f"`sampler` must be one of {', '.join(SAMPLERS)} or a dotted path, got {sampler!r}. "
            "An own sampler is named `package.module:callable`."
        )
    make = load_component(sampler)
    if not callable(make):
        raise ConfigError(
            f"`sampler` {sampler} must name a callable, got {type(make).__name__}. It is called "
            "with a gcahng.data.plans.batch_plan.PlanRequest and returns the epoch's plan."
        )
    return _checked(make(request), request, sampler)


def coverage_epochs(table: ClassTable, num_classes: int, num_samples: int) -> int:
    """Epochs after which the sampler "uniform" has shown every image at least once.

    With L batches per epoch and n images in the largest class: ceil(ceil(n / K) N / (L P)).

    Args:
        table: Training classes.
        num_classes: P.
        num_samples: K.
    Raises:
        InputError: P or K does not fit the table.
    """
    _check_sizes(table, 0, num_classes, num_samples)
    slots = num_batches(table.num_samples, num_classes, num_samples) * num_classes
    visits = -(-int(table.counts.max()) // num_samples)
    return -(-visits * table.num_classes // slots)


def _check_options(
    table: ClassTable, sampler: str, passes: int | None, class_centres: NDArray[np.floating[Any]] | None
) -> None:
    if passes is not None and sampler in WITHOUT_PASSES:
        raise ConfigError(
            f"`passes` is {passes}, but an epoch of the sampler {sampler!r} does not consist of passes: expected "
            "None. Leave it out or choose another sampler, such as 'sample'."
        )
    if passes is not None and passes < 1:
        raise InputError(f"`passes` (over the classes per epoch) must be at least 1, got {passes}. Raise it.")
    if class_centres is not None and (class_centres.ndim != 2 or len(class_centres) != table.num_classes):
        raise InputError(
            f"`class_centres` must have one row per training class: expected ({table.num_classes}, D), got "
            f"{class_centres.shape}. Average the embeddings by label."
        )


def _check_sizes(table: ClassTable, epoch: int, num_classes: int, num_samples: int) -> None:
    if epoch < 0:
        raise InputError(f"`epoch` must be 0 or more, got {epoch}. Count epochs from 0.")
    if num_samples < 1:
        raise InputError(
            f"`num_samples` (images per class in a batch) must be at least 1, got {num_samples}. "
            "Raise it; metric losses need 2."
        )
    if num_classes < 1:
        raise InputError(f"`num_classes` (classes per batch) must be at least 1, got {num_classes}. Raise it.")
    if num_classes > table.num_classes:
        dropped = f" ({table.dropped.size} small ones were dropped)" if table.dropped.size else ""
        raise InputError(
            f"`num_classes` (classes per batch) is {num_classes}, but there are only "
            f"{table.num_classes} training classes{dropped}: expected at most as many. Lower it "
            "or train on more classes."
        )


def _checked(plan: EpochPlan, request: PlanRequest, name: str) -> EpochPlan:
    """The plan of an own sampler, checked at every batch.

    Raises:
        ConfigError: It is no plan.
    """
    if not callable(getattr(plan, "batch", None)) or not hasattr(plan, "__len__"):
        raise ConfigError(
            f"`sampler` {name} must return a plan with `len(plan)` and `plan.batch(index)`, "
            f"got {type(plan).__name__}. See gcahng.data.plans.batch_plan.EpochPlan."
        )
    if len(plan) < 1:
        raise ConfigError(
            f"`sampler` {name} must return a plan of at least 1 batch, got {len(plan)}. Repeat "
            "classes where there are too few images."
        )
    if isinstance(plan, ShardedPlan):
        return _CheckedShardedPlan(plan, request, name)
    return _CheckedPlan(plan, request, name)


class _CheckedPlan:
    """The plan of an own sampler, each batch checked before it is used."""

    def __init__(self, plan: EpochPlan, request: PlanRequest, name: str) -> None:
        self._plan = plan
        self._table = request.table
        self._shape = (request.num_samples, request.num_classes)
        self._name = name

    def __len__(self) -> int:
        return len(self._plan)

    def batch(self, index: int) -> BatchPlan:
        batch = self._plan.batch(index)
        labels, rows = np.asarray(batch.labels), np.asarray(batch.rows)
        where = f"`sampler` {self._name}, batch {index}: "
        for name, array, shape in (
            ("labels", labels, self._shape[1:]),
            ("rows", rows, self._shape),
        ):
            if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
                raise InputError(
                    f"{where}`{name}` must be integers of shape {shape}, got {array.dtype} of "
                    f"shape {array.shape}. A batch is P classes x K samples, group-major."
                )
        if np.unique(labels).size != labels.size:
            raise InputError(
                f"{where}`labels` must be {labels.size} distinct classes, got "
                f"{np.unique(labels).size}. Draw classes without replacement within a batch."
            )
        for place, label in enumerate(labels.tolist()):
            if not np.isin(rows[:, place], self._table.rows_of(label)).all():
                raise InputError(
                    f"{where}rows {rows[:, place].tolist()} are not all samples of label {label}. "
                    "Take them from `table.rows_of(label)`."
                )
        return BatchPlan(labels.astype(np.int64), rows.astype(np.int64), int(getattr(batch, "repaired", 0)))


class _CheckedShardedPlan(_CheckedPlan):
    """The same for a plan that knows its shards."""

    _plan: ShardedPlan

    def shards(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return self._plan.shards(index)
