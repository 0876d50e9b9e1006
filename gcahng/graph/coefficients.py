"""Pull coefficients of a batch, block by block, whichever backend made them.

Letters: B samples, D channels; n block pairs of b x b edges.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.graph.edge_layout import EdgeLayout
from gcahng.graph.pairs import PairPlan
from gcahng.graph.read_out import ReadOut


@dataclass(frozen=True)
class PairCoefficients:
    """Coefficients with gradient (the generation pass): still inside the edge buffer, read out chunk by chunk.

    Attributes:
        read_out: How to get them.
    """

    read_out: ReadOut

    @property
    def layout(self) -> EdgeLayout:
        return self.read_out.layout

    @property
    def plan(self) -> PairPlan:
        return self.layout.plan

    def logits(self) -> Tensor:
        """(rows, D) logits without bias, without gradient, in a new buffer."""
        return self.read_out.fill(torch.empty_like(self.read_out.edges.raw))

    @property
    def bias(self) -> Tensor:
        """(D,) that is added to every logit."""
        return self.read_out.bias.detach()

    @property
    def num_channels(self) -> int:
        """D."""
        return self.read_out.bias.shape[0]

    def table(self) -> Tensor:
        """(B, B, D) in the order of the samples, with gradient; 0 for pairs that the plan does not list."""
        return dense(self.layout, self.read_out.rows())


@dataclass(frozen=True)
class ConstantCoefficients:
    """Coefficients without gradient (the metric pass).

    Attributes:
        layout: Rows of the buffer.
        buffer: (rows, D) logits without bias.
        bias: (D,).
    """

    layout: EdgeLayout
    buffer: Tensor
    bias: Tensor

    @property
    def plan(self) -> PairPlan:
        return self.layout.plan

    def logits(self) -> Tensor:
        """(rows, D) logits without bias; the buffer itself."""
        return self.buffer

    @property
    def num_channels(self) -> int:
        """D."""
        return self.bias.shape[0]

    def table(self) -> Tensor:
        """(B, B, D) in the order of the samples; 0 for pairs that the plan does not list."""
        return dense(self.layout, torch.sigmoid(self.buffer.to(self.bias.dtype) + self.bias))


@dataclass(frozen=True)
class TableCoefficients:
    """Coefficients given for every ordered pair, as the edge-list reference computes them.

    Attributes:
        plan: The block pairs of this process.
        values: (B, B, D), entry [i, j] for anchor i and negative j.
    """

    plan: PairPlan
    values: Tensor

    @property
    def num_channels(self) -> int:
        """D."""
        return self.values.shape[-1]

    def table(self) -> Tensor:
        """(B, B, D) in the order of the samples."""
        return self.values


@dataclass(frozen=True)
class UnitCoefficients:
    """Coefficient 1 for every pair and channel: interpolation without a graph.

    Attributes:
        layout: The block pairs.
    """

    layout: EdgeLayout

    @property
    def plan(self) -> PairPlan:
        return self.layout.plan


Coefficients = PairCoefficients | ConstantCoefficients | TableCoefficients | UnitCoefficients


def full_table(coefficients: Coefficients | None) -> Tensor:
    """(B, B, D) coefficients of all pairs, in the order of the samples.

    Raises:
        InputError: There are none, or only those of some pairs.
    """
    if coefficients is None or isinstance(coefficients, UnitCoefficients):
        raise InputError("The graph has no coefficients: it was called with need_coefficients=False. Leave it out.")
    plan = coefficients.plan
    if not isinstance(coefficients, TableCoefficients) and (not plan.dense or plan.share[1] > 1):
        raise InputError(
            "A table of coefficients needs every pair of the batch: got the plan of a sparse graph, or of one process "
            "of several. Pass `coefficients` on to `gcahng.generation.synthetic_loss` or `generation_loss`."
        )
    return coefficients.table()


def dense(layout: EdgeLayout, buffer: Tensor) -> Tensor:
    """The rows of a plan as one (B, B, D) tensor in the order of the samples; 0 for pairs that it does not list."""
    plan = layout.plan
    b, blocks = plan.block_size, plan.num_blocks
    rows, columns, values = [], [], []
    for part in layout.parts:
        forward, backward = layout.directions(part, buffer)
        rows.append(part.chunk.first)
        columns.append(part.chunk.second)
        values.append(forward)
        if backward is not None:
            rows.append(part.chunk.second)
            columns.append(part.chunk.first)
            values.append(backward.transpose(1, 2))
    # One assignment: each would copy the table, in the backward pass too.
    table = buffer.new_zeros(blocks, blocks, b, b, buffer.shape[-1])
    table = table.index_put((torch.cat(rows), torch.cat(columns)), torch.cat(values))
    positions = blocks * b
    table = table.transpose(1, 2).reshape(positions, positions, -1)[: plan.batch_size, : plan.batch_size]
    place = torch.empty_like(plan.order[: plan.batch_size])
    place[plan.order[: plan.batch_size]] = torch.arange(plan.batch_size, device=place.device)
    return table[place][:, place]
