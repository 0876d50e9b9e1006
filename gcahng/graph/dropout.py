"""Dropout masks of the edge attention, as a function of the pair instead of a generator's state."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.graph.kernels import EagerKernels
from gcahng.random import key_words, philox, to_uniform


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

    def scales(
        self, i: Tensor, j: Tensor, layer: int, dtype: torch.dtype, kernels: EagerKernels | None = None
    ) -> tuple[Tensor, Tensor]:
        """Factors (0 or 1/(1-p)) for the weights of node i and of node j in the edges (i, j).

        Args:
            i, j: Broadcastable int64 sample positions in the global batch.
            layer: Message-propagation layer.
            dtype: Of the result.
            kernels: May compile the draw, some hundred small operations; None for plain torch.
        Returns:
            Two tensors of the broadcast shape.
        """
        key = key_words(self.key, i.device)
        layer_word = torch.full((), layer, dtype=torch.int64, device=i.device)
        draw = kept if kernels is None else kernels.compile(kept)
        keep_i, keep_j = draw(i, j, *key, layer_word, self.probability, self.tied)
        scale = 1.0 / (1.0 - self.probability)
        return keep_i.to(dtype) * scale, keep_j.to(dtype) * scale


def kept(
    i: Tensor, j: Tensor, key_low: Tensor, key_high: Tensor, layer: Tensor, probability: float, tied: bool
) -> tuple[Tensor, Tensor]:
    """Whether the weights of node i and of node j in the edges (i, j) survive: two bool tensors, see `EdgeDropout`."""
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    swapped = i > j
    direction = torch.zeros_like(low) if tied else swapped.long()
    words = philox((key_low, key_high), (low, high, layer.expand_as(low), direction))
    keep_low, keep_high = (to_uniform(w) >= probability for w in words[:2])
    # A self edge has one node in both places; its two weights still draw separately.
    return torch.where(swapped, keep_high, keep_low), torch.where(swapped, keep_low, keep_high)
