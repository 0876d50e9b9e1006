"""Pull coefficients of a batch, block by block, whichever backend made them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from gcahng.graph.edge_stage import dense
from gcahng.graph.pairs import PairPlan


@dataclass(frozen=True)
class OrderedBlocks:
    """Coefficients of n blocks of anchors with n blocks of negatives.

    Attributes:
        anchors, negatives: (n,) int64 block numbers of the plan.
        values: (n, b, b, D); entry [k, i, j] belongs to anchor i of block anchors[k], negative j of negatives[k].
    """

    anchors: Tensor
    negatives: Tensor
    values: Tensor


@dataclass(frozen=True)
class PairCoefficients:
    """Symmetric coefficients, stored once per unordered block pair.

    Attributes:
        plan: The block pairs of this process.
        chunks: One (n, b, b, D) tensor per chunk of the plan.
    """

    plan: PairPlan
    chunks: list[Tensor]

    def ordered(self) -> Iterator[OrderedBlocks]:
        """Every ordered block pair of this process, each once."""
        for number, swapped in self.plan.ordered():
            chunk, values = self.plan.chunks[number], self.chunks[number]
            if swapped:
                yield OrderedBlocks(chunk.second, chunk.first, values.transpose(1, 2))
            else:
                yield OrderedBlocks(chunk.first, chunk.second, values)

    def detach(self) -> "PairCoefficients":
        return PairCoefficients(self.plan, [c.detach() for c in self.chunks])

    def table(self) -> Tensor:
        """(B, B, D) in the order of the samples; the plan must list every pair."""
        return dense(self.chunks, self.plan)


@dataclass(frozen=True)
class TableCoefficients:
    """Coefficients given for every ordered pair, as the edge-list reference computes them.

    Attributes:
        plan: The block pairs of this process.
        values: (B, B, D), entry [i, j] for anchor i and negative j; (1, 1, 1) ones for "no graph".
    """

    plan: PairPlan
    values: Tensor

    def ordered(self) -> Iterator[OrderedBlocks]:
        """Every ordered block pair of this process, each once."""
        samples = self.plan.order.view(self.plan.num_blocks, self.plan.block_size)
        for number, swapped in self.plan.ordered():
            chunk = self.plan.chunks[number]
            anchors, negatives = (chunk.second, chunk.first) if swapped else (chunk.first, chunk.second)
            if self.values.shape[0] == 1:
                yield OrderedBlocks(anchors, negatives, self.values[None])
                continue
            rows, columns = samples[anchors][:, :, None], samples[negatives][:, None, :]
            yield OrderedBlocks(anchors, negatives, self.values[rows, columns])

    def detach(self) -> "TableCoefficients":
        return TableCoefficients(self.plan, self.values.detach())

    def table(self) -> Tensor:
        """(B, B, D) in the order of the samples."""
        return self.values


Coefficients = PairCoefficients | TableCoefficients
