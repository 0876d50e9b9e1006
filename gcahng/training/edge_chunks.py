"""The edges of a batch chunk by chunk: which are between classes, and their pull coefficients.

Shapes: chunks of n block pairs of b x b nodes, as in `gcahng.generation.pair_synthesis`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gcahng.generation.pair_synthesis import CoefficientRows, Pulls
from gcahng.graph import Coefficients, PairPlan, UnitCoefficients
from gcahng.graph.coefficients import TableCoefficients
from gcahng.graph.edge_layout import ChunkRows, edge_layout
from gcahng.graph.pairs import PairChunk, ends


def other_class(plan: PairPlan, chunk: PairChunk, num_samples: int) -> Tensor:
    """(n, b, b) bool: the chunk's edges between real samples of different classes."""
    size = chunk.first.shape[0], plan.block_size, plan.block_size
    if chunk.mirrored:  # whole classes, so none is in both blocks
        other = chunk.first.new_ones(1, 1, 1, dtype=torch.bool)
    else:
        own = torch.arange(plan.block_size, device=chunk.first.device) // num_samples
        other = (own[:, None] != own)[None]
    valid = plan.valid_ends(chunk, torch.float32)
    if valid is not None:
        other = other & (valid[0][:, :, None] * valid[1][:, None, :]).bool()
    return other.expand(size)


def pulls_by_chunk(coefficients: Coefficients) -> Iterator[tuple[ChunkRows, Pulls]]:
    """The chunks of this rank with their coefficients."""
    if isinstance(coefficients, UnitCoefficients):
        for part in coefficients.layout.parts:
            yield part, (None, None)
        return
    if isinstance(coefficients, TableCoefficients):
        # A table has the edges of all ranks.
        for part in edge_layout(coefficients.plan, None, 0).parts:
            yield part, _of_table(coefficients, part.chunk)
        return
    rows = CoefficientRows.of(coefficients)
    for part in coefficients.layout.parts:
        yield part, rows.chunk(part)


def _of_table(coefficients: TableCoefficients, chunk: PairChunk) -> Pulls:
    first, second = ends(coefficients.plan.order, chunk)
    values = coefficients.values.detach()
    forward = values[first[:, :, None], second[:, None, :]]
    return forward, values[second[:, None, :], first[:, :, None]] if chunk.mirrored else None
