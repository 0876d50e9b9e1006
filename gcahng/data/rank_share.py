"""A rank's share of rows, known to all ranks without a word between them."""

import numpy as np
from numpy.typing import NDArray

from gcahng.errors import InputError


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a rank that cannot be.

    Raises:
        InputError: `rank` is not in 0..world_size - 1.
    """
    if not 0 <= rank < world_size:
        raise InputError(
            f"`rank` must be from 0 to `world_size` - 1: got rank {rank} of {world_size}. Pass those of this process."
        )


def rank_rows(rows: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """One contiguous slice of the rows; sizes differ by at most one, and the ranks' slices follow each other.

    Args:
        rows: (n,) rows, the same on all ranks.
        rank: Of this process.
        world_size: Number of ranks.
    Raises:
        InputError: `rank` is not in 0..world_size - 1.
    """
    check_rank(rank, world_size)
    return rows[rank * rows.size // world_size : (rank + 1) * rows.size // world_size]
