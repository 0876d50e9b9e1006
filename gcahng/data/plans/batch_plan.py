"""What a plan of an epoch is: which samples make up each of its batches.

P classes per batch, K samples per class; a batch is group-major: K groups of P samples, classes in
the same order in every group.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gcahng.data.plans.class_table import ClassTable
from gcahng.errors import InputError


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The samples of one global batch.

    Attributes:
        labels: (P,) int64, distinct training labels.
        rows: (K, P) int64 sample rows; `rows[g, p]` is sample g of class `labels[p]`.
        repaired: How many classes and images the sampler's own draw had to give up for others,
            because the batch held them already.
    """

    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    repaired: int = 0


class EpochPlan(Protocol):
    """The batches of one epoch: a pure function of the `PlanRequest`."""

    def __len__(self) -> int:
        """Number of batches."""

    def batch(self, index: int) -> BatchPlan:
        """Batch number `index`, in any order of calls."""


@runtime_checkable
class ShardedPlan(Protocol):
    """A plan that knows which shards its batches read, so that remote ones can be fetched in time."""

    def __len__(self) -> int:
        """Number of batches."""

    def batch(self, index: int) -> BatchPlan:
        """Batch number `index`, in any order of calls."""

    def shards(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Shards that a batch and its neighbours read, and those that are read next.

        Positions in the shard folder's manifest, ascending.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanRequest:
    """What the plan of an epoch is made from; a sampler is called with one and returns an `EpochPlan`.

    Attributes:
        table: Training classes.
        seed: Seed of the run.
        epoch: Counted from 0.
        num_classes: P, classes per batch.
        num_samples: K, samples per class.
        passes: How often an epoch goes through the classes, for samplers that count in passes; None
            where the configuration leaves it to the sampler.
        class_centres: (N, D) mean embedding of each class, for samplers that put similar classes
            together; None where the run computes none.
    """

    table: ClassTable
    seed: int
    epoch: int
    num_classes: int
    num_samples: int
    passes: int | None = None
    class_centres: NDArray[np.floating[Any]] | None = None


class SizedPlan:
    """What the samplers of the package share: their request, and the check of a batch number.

    Args:
        request: What the plan is made from.
        num_batches: Batches of the epoch.
    """

    def __init__(self, request: PlanRequest, num_batches: int) -> None:
        self.table = request.table
        self.seed = request.seed
        self.epoch = request.epoch
        self.num_classes = request.num_classes
        self.num_samples = request.num_samples
        self._length = num_batches

    def __len__(self) -> int:
        return self._length

    def check_index(self, index: int) -> None:
        """Raise InputError unless the epoch has a batch of this number."""
        if not 0 <= index < self._length:
            raise InputError(
                f"`index` of a batch must be from 0 to {self._length - 1}, got {index}. Go on with the next epoch."
            )


def num_batches(num_images: int, num_classes: int, num_samples: int) -> int:
    """Batches per epoch as in the released code: max(1, ceil(images / (P K)) - 1).

    Args:
        num_images: Training images.
        num_classes: P.
        num_samples: K.
    """
    return max(1, -(-num_images // (num_classes * num_samples)) - 1)
