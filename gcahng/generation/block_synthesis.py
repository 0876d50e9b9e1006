"""Synthetic negatives block by block: the (B, P, D) table is never stored.

Shapes: n ordered block pairs, b = m * K samples per block (m whole classes), D channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.generation.fusion import fusion_shares
from gcahng.generation.interpolation import Interpolation, distance, positive_distances, way_shares
from gcahng.graph import Coefficients, PairPlan, TableCoefficients
from gcahng.graph.pairs import class_major_plan


def single_coefficients(plan: PairPlan, like: Tensor) -> TableCoefficients:
    """Coefficient 1 for every pair and channel: interpolation without a graph."""
    return TableCoefficients(plan, like.new_ones(1, 1, 1))


@dataclass(frozen=True)
class SyntheticBlock:
    """Synthetic negatives of n blocks of anchors with n blocks of classes.

    Attributes:
        anchors: (n,) block numbers of the anchors.
        classes: (n,) block numbers of the classes.
        values: (n, b, m, D).
    """

    anchors: Tensor
    classes: Tensor
    values: Tensor


@dataclass(frozen=True)
class BatchSynthesis:
    """What synthesis needs of a group-major batch, by block position.

    Attributes:
        plan: Block pairs; blocks of whole classes, class-major.
        num_classes, num_samples: P and K.
        rule: The interpolation.
        z: (num_blocks, b, D) embeddings.
        points: (num_blocks, b, D) vectors between which distances are measured.
        positive_distance: (num_blocks, b).
        shares: (b, b) fusion share by the groups of anchor and negative.
    """

    plan: PairPlan
    num_classes: int
    num_samples: int
    rule: Interpolation
    z: Tensor
    points: Tensor
    positive_distance: Tensor
    shares: Tensor

    @classmethod
    def of(cls, z: Tensor, plan: PairPlan, num_samples: int, rule: Interpolation, weights: Tensor) -> "BatchSynthesis":
        """Prepare a batch.

        Args:
            z: (B, D), group-major.
            plan: From `class_major_plan`.
            num_samples: K.
            rule: The interpolation.
            weights: (K, K-1) mixing weights.
        """
        points = rule.distance_space(z)
        group = torch.arange(plan.block_size, device=z.device) % num_samples
        shares = fusion_shares(weights.to(z))[group][:, group]
        positive_distance = plan.blocks(positive_distances(points, num_samples))
        return cls(
            plan,
            z.shape[0] // num_samples,
            num_samples,
            rule,
            plan.blocks(z),
            plan.blocks(points),
            positive_distance,
            shares,
        )

    def blocks(self, coefficients: Coefficients) -> Iterator[SyntheticBlock]:
        """Every ordered block pair of this process."""
        for block in coefficients.ordered():
            anchors, negatives = block.anchors, block.negatives
            difference = self.z[anchors][:, :, None] - self.z[negatives][:, None, :]
            gap = difference
            if self.rule.normalised_distance:
                gap = self.points[anchors][:, :, None] - self.points[negatives][:, None, :]
            pull = block.values * self.rule.factor
            share = way_shares(self.positive_distance[anchors][:, :, None], distance(gap), pull)
            step = share * difference * self.shares[..., None]
            moved = step.unflatten(2, (-1, self.num_samples)).sum(3)
            yield SyntheticBlock(anchors, negatives, self.z[anchors][:, :, None] - moved)
