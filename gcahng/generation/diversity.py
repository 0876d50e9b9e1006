"""J_div, chunk by chunk: how little an anchor's pull coefficients differ over its negatives.

The coefficients are shifted by those of a logit of 0, so that sums over many edges keep their digits in float32.

Letters: B samples, D channels; n block pairs of b x b edges.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.generation.pair_synthesis import CoefficientRows, Pulls
from gcahng.graph.coefficients import ConstantCoefficients, PairCoefficients
from gcahng.graph.pairs import PairChunk, PairPlan, add_ends, ends


@dataclass(frozen=True)
class Spread:
    """How the coefficients of a batch spread.

    Attributes:
        plan: The block pairs.
        row_means: (num_positions, D) mean coefficient of each anchor.
        total: Sum over all edges and channels of (lambda - its anchor's mean)², all processes together.
    """

    plan: PairPlan
    row_means: Tensor
    total: Tensor

    @classmethod
    def of(
        cls,
        coefficients: PairCoefficients | ConstantCoefficients,
        rows: CoefficientRows,
        reduce: Callable[[Tensor], Tensor],
    ) -> "Spread":
        """Measure it in two sweeps.

        Args:
            coefficients: Of the batch.
            rows: Where they are read from.
            reduce: Sum over processes.
        """
        plan = coefficients.plan
        shift = torch.sigmoid(coefficients.bias)
        sums = shift.new_zeros(plan.order.numel(), shift.shape[0])
        for part in rows.layout.parts:
            pulls, real = rows.chunk(part), rows.layout.masks(part, shift.dtype)[0]
            first, second = ((x if x is None else _masked(x - shift, real)) for x in pulls)
            add_ends(
                sums, part.chunk, None if first is None else first.sum(2), None if second is None else second.sum(1)
            )
        degree = plan.batch_size if plan.degree is None else plan.degree.to(shift)[:, None]
        row_means = plan.positions(reduce(plan.samples(sums)) / degree) + shift
        total = shift.new_zeros(())
        for part in rows.layout.parts:
            pulls, real = rows.chunk(part), rows.layout.masks(part, shift.dtype)[0]
            for means, pull in zip(_row_means(row_means, part.chunk), pulls, strict=True):
                if pull is not None:
                    square = torch.linalg.vector_norm(pull - means, dim=-1).square_()
                    total += square.sum() if real is None else (square * real).sum()
        return cls(plan, row_means, reduce(total))

    def loss(self) -> Tensor:
        """J_div = 1 - sqrt(total / edges)."""
        return 1 - (self.total / self.plan.edge_count).sqrt()

    def add_gradient(self, chunk: PairChunk, pulls: Pulls, grads: Pulls, factor: float) -> None:
        """Add the gradient of factor * J_div to that of a chunk's coefficients, in place.

        Where all coefficients are alike the gradient is 0. Padding gets values, too: of no meaning.

        Args:
            chunk: The block pairs.
            pulls: Its coefficients.
            grads: Their gradients, (n, b, b, D) each; without a second one, the first is that of both directions.
            factor: Of the loss.
        """
        root = (self.total * self.plan.edge_count).sqrt()
        slope = torch.where(root > 0, -factor / root, 0.0)
        for means, pull, grad in zip(_row_means(self.row_means, chunk), pulls, grads, strict=True):
            into = grads[0] if grad is None else grad
            if pull is not None and into is not None:
                into.addcmul_(pull, slope).sub_(means * slope)


def _masked(values: Tensor, real: Tensor | None) -> Tensor:
    return values if real is None else values * real[..., None]


def _row_means(row_means: Tensor, chunk: PairChunk) -> tuple[Tensor, Tensor]:
    """Mean of each edge's anchor, for anchors first and anchors second, as broadcasts."""
    first, second = ends(row_means, chunk)
    return first[:, :, None], second[:, None, :]
