"""The edge read-out: pull coefficients sigmoid(Linear(BatchNorm(norm(raw)))) from the edge buffer, chunk by chunk.

Batch statistics run over all ordered edges, wherever they are computed. A *logit* here is the read-out without the
Linear's bias: it keeps its digits when it is stored in a lower precision.

Shapes: rows of the edge buffer, n block pairs of b x b edges, R rows of one chunk, D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gcahng.graph.edge_layout import ChunkRows, EdgeLayout
from gcahng.graph.edge_messages import accumulate_product
from gcahng.graph.edge_source import StoredEdges, StoredGradient
from gcahng.graph.kernels.eager import column_sums, lowered
from gcahng.graph.precision import product


def update_running(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move the running statistics as BatchNorm1d does: momentum, unbiased variance (count / (count - 1))."""
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    momentum = 0.1 if norm.momentum is None else norm.momentum
    with torch.no_grad():
        unbiased = variance.detach() * (count / max(count - 1, 1))
        norm.running_mean.lerp_(mean.detach().to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
        norm.num_batches_tracked.add_(1)


def running_statistics(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Mean and variance to use in evaluation."""
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


@dataclass(frozen=True)
class ReadOut:
    """The read-out of one pass.

    Attributes:
        layout: Rows of the edge buffer.
        edges: The buffer and the last edge block's norm.
        mean, variance: (D,) statistics of norm(raw), without gradient.
        batch_statistics: Whether they are this batch's, so that gradient flows through them.
        scale: (D,) weight of the BatchNorm.
        eps: Of the BatchNorm.
        weight, bias: (D, D), (D,) of the Linear, the latter with what the BatchNorm's bias adds.
        low: Dtype of the operands of matrix products; None for the tensors' own.
    """

    layout: EdgeLayout
    edges: StoredEdges
    mean: Tensor
    variance: Tensor
    batch_statistics: bool
    scale: Tensor
    eps: float
    weight: Tensor
    bias: Tensor
    low: torch.dtype | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What logits are a function of: raw edges, norm weight and bias, BatchNorm weight, Linear weight and bias."""
        return (*self.edges.tensors, self.scale, self.weight, self.bias)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> "ReadOut":
        """The same read-out on other tensors."""
        scale, weight, bias = tensors[3:]
        return replace(self, edges=self.edges.with_tensors(tensors[:3]), scale=scale, weight=weight, bias=bias)

    def rstd(self) -> Tensor:
        """(D,) 1 / standard deviation."""
        return torch.rsqrt(self.variance + self.eps)

    def normalised(self, part: ChunkRows) -> Tensor:
        """The chunk's edges after the BatchNorm without its weight: (R, D)."""
        return self._scaled(part, self.rstd())

    def _scaled(self, part: ChunkRows, factor: Tensor) -> Tensor:
        """(edge - mean) * factor in one sweep, as BatchNorm itself computes it: (R, D)."""
        return torch.addcmul(-self.mean * factor, self.edges.values(part.chunk).flatten(0, 2), factor)

    def fill(self, buffer: Tensor) -> Tensor:
        """Write all logits into `buffer` (rows, D), which may be the raw edges themselves; returns it."""
        with torch.no_grad():
            matrix, factor = lowered(self.weight, self.low).t(), self.rstd() * self.scale
            for part in self.layout.all_rows():
                buffer[part.chunk.rows] = lowered(self._scaled(part, factor), self.low) @ matrix
        return buffer

    def rows(self) -> Tensor:
        """All pull coefficients (rows, D) by autograd's own operations, for small batches on one process."""
        values = self.edges.kernels.normalise(self.edges.raw.to(self.scale.dtype), self.edges.norm)
        mean, variance = self.mean, self.variance
        if self.batch_statistics:
            weights = [self.layout.weights(part, values.dtype) for part in self.layout.all_rows()]
            spread = [
                torch.as_tensor(w, dtype=values.dtype, device=values.device).expand(part.chunk.of(values).shape[:3])
                for w, part in zip(weights, self.layout.all_rows(), strict=True)
            ]
            column = torch.cat([w.reshape(-1, 1) for w in spread])
            mean = (values * column).sum(0) / self.layout.plan.edge_count
            variance = ((values - mean).square() * column).sum(0) / self.layout.plan.edge_count
        scaled = (values - mean) * (self.scale * torch.rsqrt(variance + self.eps))
        return torch.sigmoid(product(scaled, self.weight, self.bias, self.low))


class ReadOutGradient:
    """The gradient of a read-out, from that of its logits, in two sweeps over the chunks with a barrier between.

    The logits' gradients lie in `buffer` (rows, D); the second sweep writes the raw edges' gradients over them.
    """

    def __init__(self, read_out: ReadOut, buffer: Tensor) -> None:
        self.read_out = read_out
        self.buffer = buffer
        self._weight = torch.zeros_like(read_out.weight)
        self._bias = torch.zeros_like(read_out.bias)

    def add_weights(self, part: ChunkRows) -> None:
        """First sweep: take the chunk's rows of the buffer into the gradients of the Linear."""
        grad = self.buffer[part.chunk.rows]
        normalised = self.read_out.normalised(part)
        accumulate_product(self._weight, lowered(grad, self.read_out.low), lowered(normalised, self.read_out.low))
        self._bias += column_sums(grad, self._bias.dtype)

    def finish(self, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Second sweep: gradients of `ReadOut.tensors`, the first of them the buffer itself.

        Args:
            reduce: Sum over processes (the statistics are those of all edges).
        """
        read_out = self.read_out
        plan = read_out.layout.plan
        # With g the gradient behind the BatchNorm's weight: g = grad W, so its sums over the edges, plain and times
        # the normalised edge, follow from the gradients of the Linear alone.
        # W as the product below rounds it: else what the means should cancel would be left in every edge.
        matrix = lowered(read_out.weight, read_out.low)
        rounded = matrix.to(self._weight.dtype)
        by_channel = (rounded * self._weight).sum(0)
        sums = torch.stack([self._bias @ rounded, by_channel])
        sums = reduce(sums) / plan.edge_count if read_out.batch_statistics else torch.zeros_like(sums)
        collected = StoredGradient(read_out.edges, True, into=self.buffer)
        factor = read_out.scale * read_out.rstd()
        # What mean and variance pass back to an edge: -factor (sums[0] + sums[1] * normalised edge).
        slope = -factor * sums[1] * read_out.rstd()
        level = -factor * sums[0] - slope * read_out.mean
        for part in read_out.layout.all_rows():
            chunk = part.chunk
            grad = (lowered(self.buffer[chunk.rows], read_out.low) @ matrix).to(factor.dtype).mul_(factor)
            if read_out.batch_statistics:
                weights = read_out.layout.weights(part, grad.dtype)
                values = read_out.edges.values(chunk).flatten(0, 2)
                through_statistics = torch.addcmul(level, values, slope)
                if isinstance(weights, Tensor):
                    grad.addcmul_(through_statistics, weights.reshape(-1, 1))
                else:
                    grad.add_(through_statistics, alpha=weights)
            collected.add(chunk, chunk.of_rows(grad))
        raw, norm_weight, norm_bias = collected.results()
        assert raw is not None and norm_weight is not None and norm_bias is not None
        return raw, norm_weight, norm_bias, by_channel, self._weight * read_out.scale, self._bias
