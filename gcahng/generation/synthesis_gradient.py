"""The written-out gradient of synthetic negatives by the embeddings; the coefficients are constants.

Shapes as in `pair_synthesis`.
"""

import torch
from torch import Tensor

from gcahng.generation.interpolation import DISTANCE_EPSILON
from gcahng.generation.pair_synthesis import ChunkSynthesis, Way, both
from gcahng.generation.synthesis import PlacedBatch
from gcahng.graph.pairs import add_ends


class BatchGradient:
    """Gradients of a `PlacedBatch`, collected chunk by chunk."""

    def __init__(self, batch: PlacedBatch) -> None:
        self.z = torch.zeros_like(batch.z)
        self.points = None if batch.points is None else torch.zeros_like(batch.points)
        self.positive_distance = torch.zeros_like(batch.positive_distance)

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of `PlacedBatch.tensors`."""
        return self.z, self.points, self.positive_distance

    def add(self, work: ChunkSynthesis, grads: list[Tensor]) -> None:
        """Take in a chunk.

        Args:
            work: The chunk.
            grads: Of the synthetic negatives of each direction, (n, b, m, D) and (n, m, b, D).
        """
        add_ends(self.z, work.chunk, *both([g.sum(w.axis) for w, g in zip(work.ways, grads, strict=True)]))
        by_difference = _through_steps(work, grads)
        by_gap, tilt = self._through_distances(work, grads)
        # The same 1e-6 is added to every channel of the gap.
        tilt = tilt[..., None] * DISTANCE_EPSILON
        if self.points is None:
            by_difference.addcmul_(work.gap, by_gap[..., None])
            _add_differences(self.z, work, by_difference, tilt)
        else:
            _add_differences(self.z, work, by_difference, None)
            _add_differences(self.points, work, work.gap * by_gap[..., None], tilt)

    def _through_distances(self, work: ChunkSynthesis, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """d+ and d-, which n = d+ / d- depends on.

        Returns:
            (n, b, b) factors of the gap and of 1e-6 in the gradient of the gap.
        """
        factors: list[Tensor] = []
        positive: list[Tensor] = []
        moved: Tensor | None = None
        for number, (way, grad) in enumerate(zip(work.ways, grads, strict=True)):
            if number == 0 or way.coefficients is not work.ways[0].coefficients:
                moved = _unpulled(work, way)
            assert moved is not None
            # dS / dn = w (1 - f lambda)
            by_ratio = (way.by_class(moved) * way.at_edges(grad)).sum(-1).flatten(way.axis, way.axis + 1)
            by_ratio = torch.where(way.farther, by_ratio * way.shares * way.sign, 0.0) / way.distance
            positive.append(by_ratio.sum(way.axis))
            factors.append(-by_ratio * way.ratio / way.distance)
        add_ends(self.positive_distance, work.chunk, *both(positive))
        if len(factors) == 1:
            return factors[0], factors[0]
        return factors[0] + factors[1], factors[0] - factors[1]


def _unpulled(work: ChunkSynthesis, way: Way) -> Tensor:
    """(1 - f lambda) * D, (n, b, b, D)."""
    factor = work.batch.factor
    if way.coefficients is None:
        return work.difference * (1 - factor)
    return torch.addcmul(work.difference, way.coefficients, work.difference, value=-factor)


def _through_steps(work: ChunkSynthesis, grads: list[Tensor]) -> Tensor:
    """Gradient of the difference that the steps are multiplied with, (n, b, b, D)."""
    found: Tensor | None = None
    for way, grad in zip(work.ways, grads, strict=True):
        steps = way.by_class(way.steps)
        if found is None:
            found = (steps * way.at_edges(way.sign * grad)).flatten(way.axis, way.axis + 1)
        else:
            way.by_class(found).addcmul_(steps, way.at_edges(grad), value=way.sign)
    assert found is not None
    return found


def _add_differences(into: Tensor, work: ChunkSynthesis, grad: Tensor, tilt: Tensor | None) -> None:
    """Gradient of first minus second nodes (n, b, b, D), and of all channels alike (n, b, b, 1), to the nodes."""
    at_first, at_second = grad.sum(2), grad.sum(1)
    if tilt is not None:
        at_first, at_second = at_first + tilt.sum(2), at_second + tilt.sum(1)
    add_ends(into, work.chunk, at_first, -at_second)
