"""Synthetic negatives of one chunk of block pairs, in both directions.

With D_ij = z_i - z_j, n = d+ / d-, f = exp(-alpha / mean metric loss) and the fusion share w of negative j, the fused
synthetic negative of anchor i is

    z_i - sum over the class's j of S_ij * D_ij,    S_ij = near + pull * lambda_ij,  near = w n,  pull = w (1 - n) f

where d- > d+; elsewhere near = w and pull = 0. Only lambda and D differ between channels.

Shapes: n block pairs of b first and b second nodes, m = b / K classes per block, D channels. Values of edges are
(n, b, b, ...) as [pair, first node, second node] in both directions. An *entry* is one anchor with one class: (n, b, m)
where the first nodes are the anchors, (n, m, b) where the second ones are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.generation.interpolation import DISTANCE_EPSILON
from gcahng.generation.synthesis import PlacedBatch
from gcahng.graph.coefficients import ConstantCoefficients, PairCoefficients, UnitCoefficients
from gcahng.graph.edge_layout import ChunkRows, EdgeLayout
from gcahng.graph.pairs import PairChunk, ends

# d- and d+ of the same two images are rounded differently. They count as equal within this many units in the last
# place: no such pair is interpolated.
EQUAL_DISTANCE_ULPS = 64

ChunkedCoefficients = PairCoefficients | ConstantCoefficients | UnitCoefficients
# lambda of a chunk's edges with anchors first and with anchors second, (n, b, b, D) each: the same tensor where each
# row stands for both directions; None where there is no such direction, or where all coefficients are 1.
Pulls = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class CoefficientRows:
    """What the coefficients of a batch are read from, chunk by chunk.

    Attributes:
        layout: Rows of the buffer.
        buffer: (rows, D) logits without bias, or lambda itself.
        bias: (D,) that belongs to the logits; None where the buffer holds lambda.
    """

    layout: EdgeLayout
    buffer: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, coefficients: PairCoefficients | ConstantCoefficients) -> "CoefficientRows":
        """From the logits of a batch, which stay as they are."""
        return cls(coefficients.layout, coefficients.logits(), coefficients.bias)

    @classmethod
    def written_over(cls, coefficients: PairCoefficients, logits: Tensor) -> "CoefficientRows":
        """lambda over its own logits: who goes over the chunks several times computes it once.

        Logits in a lower precision than the bias stay: lambda near 1 has no digits there.
        """
        bias = coefficients.bias
        if logits.dtype != bias.dtype:
            return cls(coefficients.layout, logits, bias)
        return cls(coefficients.layout, logits.add_(bias).sigmoid_(), None)

    def chunk(self, part: ChunkRows) -> Pulls:
        """The coefficients of one chunk; maybe views of the buffer."""
        forward, backward = self.layout.directions(part, self.buffer)
        if self.bias is None:
            return forward, backward
        first = torch.add(forward, self.bias).sigmoid_()
        if backward is None:
            return first, None
        return first, first if backward is forward else torch.add(backward, self.bias).sigmoid_()


@dataclass(frozen=True)
class Way:
    """The edges of a chunk from the side of their anchors.

    Attributes:
        axis: 2 where the first nodes are the anchors and the second ones the negatives, else 1.
        num_samples: K.
        anchors: (n, b, D) embeddings of the anchors.
        shares: (b, b) fusion shares w.
        distance: (n, b, b) d-; 1 where it does not exceed d+.
        farther: (n, b, b) bool, d- > d+.
        ratio: (n, b, b) n; 1 where d- does not exceed d+.
        pull: (n, b, b).
        coefficients: (n, b, b, D) lambda, None for 1.
        steps: (n, b, b, D) S, or (n, b, b, 1) without coefficients.
    """

    axis: int
    num_samples: int
    anchors: Tensor
    shares: Tensor
    distance: Tensor
    farther: Tensor
    ratio: Tensor
    pull: Tensor
    coefficients: Tensor | None
    steps: Tensor

    @property
    def sign(self) -> float:
        """D = sign * (negative - anchor): D points from the second node to the first."""
        return -1.0 if self.axis == 2 else 1.0

    def by_class(self, edges: Tensor) -> Tensor:
        """Values of edges with the negatives' axis as (m, K), a view."""
        return edges.unflatten(self.axis, (-1, self.num_samples))

    def at_edges(self, entries: Tensor) -> Tensor:
        """Values of entries so that they broadcast to `by_class`."""
        return entries.unsqueeze(self.axis + 1)

    def at_entries(self, anchors: Tensor) -> Tensor:
        """Values of anchors (n, b, ...) so that they broadcast to entries."""
        return anchors.unsqueeze(self.axis)


class ChunkSynthesis:
    """Synthetic negatives of one chunk."""

    def __init__(self, batch: PlacedBatch, chunk: PairChunk, pulls: Pulls) -> None:
        """
        Args:
            batch: The batch by block position.
            chunk: The block pairs.
            pulls: From `CoefficientRows`; Nones where all coefficients are 1.
        """
        self.batch, self.chunk = batch, chunk
        first, second = ends(batch.z, chunk)
        self.difference = first[:, :, None] - second[:, None, :]
        self.gap = self.difference
        points = (first, second)
        if batch.points is not None:
            points = ends(batch.points, chunk)
            self.gap = points[0][:, :, None] - points[1][:, None, :]
        # ‖gap + eps‖² and ‖-gap + eps‖² from one sum over the channels.
        square = torch.linalg.vector_norm(self.gap, dim=-1).square_()
        square += batch.z.shape[1] * DISTANCE_EPSILON**2
        tilt = 2 * DISTANCE_EPSILON * (points[0].sum(-1)[:, :, None] - points[1].sum(-1)[:, None, :])
        near = ends(batch.positive_distance, chunk)
        self.ways = [self._way(2, square + tilt, first, near[0], pulls[0])]
        if chunk.mirrored:
            self.ways.append(self._way(1, square - tilt, second, near[1], pulls[1]))

    def _way(self, axis: int, square: Tensor, anchors: Tensor, near: Tensor, coefficients: Tensor | None) -> Way:
        shares = self.batch.shares if axis == 2 else self.batch.shares.t()
        positive = near.unsqueeze(axis)
        distance = square.clamp_min_(0).sqrt_()
        farther = distance > positive * (1 + EQUAL_DISTANCE_ULPS * torch.finfo(square.dtype).eps)
        distance = torch.where(farther, distance, 1.0)
        ratio = torch.where(farther, positive / distance, 1.0)
        at_least = ratio * shares
        pull = (shares - at_least) * self.batch.factor
        if coefficients is None:
            steps = (at_least + pull)[..., None]
        else:
            # addcmul takes three times as long on CPU with two numbers per edge.
            steps = (coefficients * pull[..., None]).add_(at_least[..., None])
        num_samples = self.batch.num_samples
        return Way(axis, num_samples, anchors, shares, distance, farther, ratio, pull, coefficients, steps)

    def negatives(self, way: Way) -> Tensor:
        """Synthetic negatives of one direction: (n, b, m, D) or (n, m, b, D)."""
        steps = way.by_class(way.steps).unbind(way.axis + 1)
        differences = way.by_class(self.difference).unbind(way.axis + 1)
        found = torch.addcmul(way.at_entries(way.anchors), steps[0], differences[0], value=way.sign)
        for step, difference in zip(steps[1:], differences[1:], strict=True):
            found.addcmul_(step, difference, value=way.sign)
        return found

    def counted(self, way: Way) -> tuple[Tensor | None, Tensor | None]:
        """Which entries are no padding, and which of these are of another class than the anchor's.

        Ones and zeros that broadcast to (n, b, m) or (n, m, b); None for ones throughout.
        """
        plan, num_samples, dtype = self.batch.plan, self.batch.num_samples, self.batch.z.dtype
        real: Tensor | None = None
        valid = plan.valid_ends(self.chunk, dtype)
        if valid is not None:
            anchors, negatives = valid if way.axis == 2 else valid[::-1]
            real = anchors.unsqueeze(way.axis) * negatives[:, ::num_samples].unsqueeze(3 - way.axis)
        if self.chunk.mirrored:
            return real, real
        # The own classes lie in the diagonal blocks, whose anchors stand first.
        own = torch.arange(plan.block_size, device=self.chunk.first.device) // num_samples
        other = (own[:, None] != own[::num_samples]).to(dtype)
        return real, other if real is None else real * other

    def entry_labels(self, way: Way, class_labels: Tensor) -> Tensor:
        """Labels of the entries' classes, (n, 1, m) or (n, m, 1), from those of all classes, (P,)."""
        batch, chunk = self.batch, self.chunk
        inside = torch.arange(batch.block_classes, device=chunk.first.device)
        blocks = chunk.second if way.axis == 2 else chunk.first
        classes = blocks[:, None] * batch.block_classes + inside
        # Padding takes any label.
        return class_labels[classes.clamp_max(batch.num_classes - 1)].unsqueeze(3 - way.axis)

    def coefficient_gradients(self, grads: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Gradients of lambda from those of the synthetic negatives of each direction.

        Returns:
            (n, b, b, D) with anchors first and with anchors second; the first alone holds all of it where both
            directions share their coefficients.
        """
        found: list[Tensor] = []
        shared = len(self.ways) == 2 and self.ways[0].coefficients is self.ways[1].coefficients
        for way, grad in zip(self.ways, grads, strict=True):
            pull = way.by_class(way.sign * way.pull)[..., None]
            if found and shared:
                way.by_class(found[0]).addcmul_(pull, way.at_edges(grad))
            else:
                found.append((pull * way.at_edges(grad)).flatten(way.axis, way.axis + 1))
        for grad in found:
            grad.mul_(self.difference)
        return both(found)


def both(values: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """One or two values, with anchors first and with anchors second, as two."""
    return values[0], values[1] if len(values) == 2 else None
