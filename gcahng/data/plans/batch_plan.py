"""What a plan of an epoch is: which samples make up each of its batches.

P classes per batch, K samples per class; a batch is group-major: K groups of P samples, classes in
the same order in every group.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The samples of one global batch.

    Attributes:
        labels: (P,) int64, distinct training labels.
        rows: (K, P) int64 sample rows; `rows[g, p]` is sample g of class `labels[p]`.
    """

    labels: NDArray[np.int64]
    rows: NDArray[np.int64]


class EpochPlan(Protocol):
    """The batches of one epoch: a pure function of (table, seed, epoch, P, K)."""

    def __len__(self) -> int:
        """Number of batches."""

    def batch(self, index: int) -> BatchPlan:
        """Batch number `index`, in any order of calls."""


def num_batches(num_images: int, num_classes: int, num_samples: int) -> int:
    """Batches per epoch as in the released code: max(1, ceil(images / (P K)) - 1).

    Args:
        num_images: Training images.
        num_classes: P.
        num_samples: K.
    """
    return max(1, -(-num_images // (num_classes * num_samples)) - 1)
