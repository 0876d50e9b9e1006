"""What the passes of one training iteration share: the embedded batch, and how it is looked at.

Letters: B = P * K samples of the global batch group-major, P classes, K samples per class, D channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.generation.interpolation import Interpolation
from gcahng.graph import PairPlan, UnitCoefficients
from gcahng.graph.edge_layout import edge_layout
from gcahng.training.finite_checks import finite_rows
from gcahng.training.generator_passes import GeneratorBatch
from gcahng.training.hardness import HardnessRecord


@dataclass(frozen=True)
class StepBatch:
    """The embedded global batch of an iteration.

    Attributes:
        z: (B, D) embeddings, with gradient in the metric pass alone.
        generated: Of a run with a generator.
        labels: (B,) int64 training labels, on the device of z.
        plan: The edges, the same in both passes, even though the graph network moves between them.
        rule: The interpolation of the epoch.
        step: Global step.
        mixing: Given mixing weights by pass.
        record: Takes the hardness of the batch.
    """

    z: Tensor
    generated: GeneratorBatch | None
    labels: Tensor
    plan: PairPlan
    rule: Interpolation
    step: int
    mixing: Mapping[str, Tensor] | None = None
    record: HardnessRecord | None = None


def whole_rows(images: Tensor, z: Tensor) -> Tensor:
    """(rows,) float32: 1 where an image is finite; all, where images are not one to an embedding."""
    return finite_rows(images).float() if images.shape[0] == z.shape[0] else torch.ones_like(z[:, 0]).float()


def loss_dtype(images: Tensor) -> torch.dtype:
    """Losses are computed in float32, in float64 for float64 input."""
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def unit_coefficients(plan: PairPlan) -> UnitCoefficients:
    """All coefficients 1."""
    return UnitCoefficients(edge_layout(plan, None, 0))
