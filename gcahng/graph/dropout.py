"""Dropout masks of the edge attention, as a function of the pair instead of a generator's state."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.random import philox, to_uniform


@dataclass(frozen=True)
class EdgeDropout:
    """Which attention weights survive.

    Attributes:
        probability: Chance of dropping one of the two weights of an edge.
        key: Philox key of this pass: a function of (seed, step, pass).
        tied: One mask per unordered pair: the weight that node i gets in edge (i, j) shares its fate with the one
            it gets in edge (j, i). Otherwise each direction draws its own, the released code's law.
    """

    probability: float
    key: int
    tied: bool = True

    def scales(self, i: Tensor, j: Tensor, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factors (0 or 1/(1-p)) for the weights of node i and of node j in the edges (i, j).

        Args:
            i, j: Broadcastable int64 sample positions in the global batch.
            layer: Message-propagation layer.
            dtype: Of the result.
        Returns:
            Two tensors of the broadcast shape.
        """
        low, high = torch.minimum(i, j), torch.maximum(i, j)
        swapped = i > j
        direction = torch.zeros_like(low) if self.tied else swapped.long()
        layer_word = torch.full_like(low, layer)
        words = philox(self.key, (low, high, layer_word, direction))
        keep_low, keep_high = (to_uniform(w) >= self.probability for w in words[:2])
        scale = 1.0 / (1.0 - self.probability)
        # A self edge has one node in both places; its two weights still draw separately.
        keep_i = torch.where(swapped, keep_high, keep_low)
        keep_j = torch.where(swapped, keep_low, keep_high)
        return keep_i.to(dtype) * scale, keep_j.to(dtype) * scale
