"""Which shard a sample row lies in, and how large shards are: all that a plan needs to know of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """The shards of a data set, in the order of its rows.

    Attributes:
        starts: (T + 1,) int64, first row of each of T shards, then the number of rows.
        sizes: (T,) int64, bytes of each shard.
        window_bytes: Shards of at least so many bytes are streamed together, see
            `gcahng.data.plans.windows`.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    window_bytes: int

    @classmethod
    def build(cls, num_samples: list[int], sizes: list[int], window_bytes: int) -> "ShardLayout":
        """From samples and bytes of every shard."""
        starts = np.concatenate([[0], np.cumsum(num_samples)]).astype(np.int64)
        return cls(starts, np.asarray(sizes, np.int64), window_bytes)

    def shard_of(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The shard of each row."""
        return (np.searchsorted(self.starts, rows, side="right") - 1).astype(np.int32)
