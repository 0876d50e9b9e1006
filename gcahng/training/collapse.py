"""Signals of a collapse, of one batch: how far embeddings are spread, and whether synthetic negatives still teach.

All are of the global batch, the same on any number of ranks; each rank looks at the edges of its own block pairs, and
sums are added up. Nothing here waits for the device.

Letters: B = P * K samples group-major, P classes, K samples per class, D channels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gcahng.generation import Synthesis
from gcahng.generation.interpolation import Interpolation, distance, positive_distances, positives
from gcahng.generation.pair_synthesis import ChunkSynthesis, Pulls
from gcahng.generation.synthesis import place
from gcahng.generation.synthetic_loss import NEVER, by_anchor, by_process
from gcahng.graph import Coefficients, PairPlan
from gcahng.graph.pairs import ends
from gcahng.metrics.spread import relative_std
from gcahng.training.edge_chunks import other_class, pulls_by_chunk

# A synthetic negative is active with at least this share of the weight that it would have if all candidates of its
# anchor weighed the same. Our choice.
ACTIVE_SHARE = 0.1

Reduce = Callable[[Tensor], Tensor]


@torch.no_grad()
def embedding_signals(
    z: Tensor, plan: PairPlan, rule: Interpolation, num_samples: int, reduce: Reduce
) -> dict[str, Tensor]:
    """Scalars by name, of the embeddings alone.

    Args:
        z: (B, D), group-major.
        plan: Block pairs of this rank, of whole classes.
        rule: Says where distances are measured.
        num_samples: K.
        reduce: Sum over ranks.
    Returns:
        "embedding_std" (see `gcahng.metrics.spread.relative_std`); "mean_positive_distance" and
        "mean_negative_distance", d+ of the anchors and d- of the edges as the interpolation has them.
    """
    points = rule.distance_space(z.detach())
    positive = positive_distances(points, num_samples).mean()
    placed = plan.positions(points)
    sums = torch.zeros(2, dtype=torch.float64, device=z.device)
    for chunk in plan.chunks:
        other = other_class(plan, chunk, num_samples)
        first, second = ends(placed, chunk)
        gap = first[:, :, None] - second[:, None, :]
        # d- of the two directions of a pair differs by rounding alone.
        times = 2 if chunk.mirrored else 1
        sums[0] += times * torch.where(other, distance(gap), 0.0).sum(dtype=torch.float64)
        sums[1] += times * other.sum()
    total, edges = reduce(sums).unbind()
    return {
        "embedding_std": relative_std(z.detach()),
        "mean_positive_distance": positive,
        "mean_negative_distance": total / edges,
    }


@torch.no_grad()
def synthetic_signals(z: Tensor, coefficients: Coefficients, synthesis: Synthesis, reduce: Reduce) -> dict[str, Tensor]:
    """Scalars by name, of the synthetic negatives that J_syn is made of.

    Args:
        z: (B, D), group-major.
        coefficients: Of the metric pass; they are left as they are.
        synthesis: The metric pass's.
        reduce: Sum over ranks.
    Returns:
        "active_synthetic_ratio": share of the (anchor, other class) entries whose synthetic negative has a probability
        of at least `ACTIVE_SHARE` / P in the softmax of its anchor's candidates. That probability, divided by B, is the
        size of J_syn's gradient by the negative's score. "coefficient_spread", where coefficients are learned: their
        standard deviation over all edges between classes and all channels.
    """
    batch = place(z.detach(), coefficients.plan, synthesis)
    found, scores = _Coefficients(z), []
    for part, pulls in pulls_by_chunk(coefficients):
        work = ChunkSynthesis(batch, part.chunk, pulls)
        for way in work.ways:
            score = (work.negatives(way) * way.at_entries(way.anchors)).sum(-1)
            counted = work.counted(way)[1]
            scores.append(score if counted is None else score.masked_fill(counted == 0, NEVER))
        found.add(pulls, other_class(batch.plan, part.chunk, batch.num_samples))
    active = _active(z.detach(), batch.plan, scores, synthesis.num_samples, reduce)
    sums = reduce(torch.cat([active, found.sums]))
    signals = {"active_synthetic_ratio": sums[0] / sums[1]}
    return signals | ({"coefficient_spread": _deviation(sums[2:])} if found.any else {})


def _active(z: Tensor, plan: PairPlan, scores: list[Tensor], num_samples: int, reduce: Reduce) -> Tensor:
    """(2,) float64: active entries and all entries of this rank.

    Args:
        scores: Of each chunk and direction, -inf where an entry does not count.
    """
    own = (z * positives(z, num_samples)).sum(1)
    of_ranks = reduce(by_process(plan.samples(by_anchor(plan, scores)), plan))
    least = torch.logsumexp(torch.cat([of_ranks, own[None]]), 0) + math.log(ACTIVE_SHARE * num_samples / z.shape[0])
    least = plan.positions(least)
    found = torch.zeros(2, dtype=torch.float64, device=z.device)
    of_chunk = iter(scores)
    for chunk in plan.chunks:
        for side, bound in enumerate(ends(least, chunk)[: 1 + chunk.mirrored]):
            score = next(of_chunk)
            real = score != NEVER
            found += torch.stack([(real & (score >= bound.unsqueeze(2 - side))).sum(), real.sum()])
    return found


class _Coefficients:
    """Number, sum and sum of squares of coefficients, in float64."""

    def __init__(self, like: Tensor) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=like.device)
        self.any = False

    def add(self, pulls: Pulls, other: Tensor) -> None:
        """Take those of a chunk: `other`, (n, b, b) bool, says which edges count."""
        forward, backward = pulls
        for values in (forward, backward):
            if values is not None:
                self.any = True
                counted = torch.where(other[..., None], values, 0.0)
                squares = counted.square().sum(dtype=torch.float64)
                self.sums += torch.stack([other.sum() * values.shape[-1], counted.sum(dtype=torch.float64), squares])


def _deviation(sums: Tensor) -> Tensor:
    number, total, squares = sums.unbind()
    mean = total / number
    return (squares / number - mean.square()).clamp_min(0).sqrt()
