"""What the synthetic negatives of a batch are made with, and the batch laid out for making them block by block.

Letters: B = P * K samples group-major, P classes, K samples per class, D channels; b = m * K samples per node block
(m whole classes).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.generation.fusion import fusion_shares
from gcahng.generation.interpolation import Interpolation, positive_distances
from gcahng.generation.negatives import generate_negatives
from gcahng.graph import Coefficients, PairPlan, UnitCoefficients


@dataclass(frozen=True)
class Synthesis:
    """How the synthetic negatives of one pass are made.

    Attributes:
        num_samples: K.
        rule: The interpolation.
        weights: (K, K-1) mixing weights of the fusion.

    Raises:
        InputError: K is below 2, or the weights are of another shape.
    """

    num_samples: int
    rule: Interpolation
    weights: Tensor

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise InputError(f"`num_samples` must be at least 2: an anchor needs a positive, got {self.num_samples}.")
        if self.weights.shape != (self.num_samples, self.num_samples - 1):
            raise InputError(
                f"`weights` must have shape (K, K-1) = {(self.num_samples, self.num_samples - 1)}: "
                f"got {tuple(self.weights.shape)}."
            )

    def all_at_once(self, z: Tensor, pull_coefficients: Tensor | None) -> Tensor:
        """(B, P, D) synthetic negatives of a group-major batch by the plain formulas, with autograd's own gradients.

        Args:
            z: (B, D), group-major.
            pull_coefficients: (B, B, D).
        """
        labels = torch.arange(z.shape[0] // self.num_samples, device=z.device).repeat(self.num_samples)
        return generate_negatives(
            z,
            labels,
            pull_coefficients,
            alpha=self.rule.alpha,
            mean_metric_loss=self.rule.mean_metric_loss,
            weights=self.weights,
            normalised_distance=self.rule.normalised_distance,
        )


@dataclass(frozen=True)
class PlacedBatch:
    """A batch by block position, as `pair_synthesis` takes it.

    Attributes:
        plan: Block pairs; blocks of whole classes, class-major.
        num_samples: K.
        factor: exp(-alpha / mean metric loss).
        z: (num_positions, D) embeddings.
        points: (num_positions, D) vectors between which distances are measured; None for z itself.
        positive_distance: (num_positions,) d+.
        shares: (b, b) fusion share by the places of anchor and negative in their blocks.
    """

    plan: PairPlan
    num_samples: int
    factor: float
    z: Tensor
    points: Tensor | None
    positive_distance: Tensor
    shares: Tensor

    @property
    def num_classes(self) -> int:
        """P."""
        return self.plan.batch_size // self.num_samples

    @property
    def block_classes(self) -> int:
        """m."""
        return self.plan.block_size // self.num_samples

    @property
    def entry_count(self) -> float:
        """(anchor, class) entries of all processes: B * P for a dense graph."""
        return self.plan.edge_count / self.num_samples

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """What gradient flows to: z, points, positive_distance."""
        return self.z, self.points, self.positive_distance

    def with_tensors(self, tensors: Sequence[Any]) -> "PlacedBatch":
        """The same batch on other `tensors`."""
        z, points, positive_distance = tensors
        return replace(self, z=z, points=points, positive_distance=positive_distance)

    def bare(self) -> "PlacedBatch":
        """The same batch on empty tensors: what an operation may hold beside its saved tensors."""
        empty = self.shares.new_empty(0)
        return self.with_tensors((empty, None, empty))


def check_coefficients(z: Tensor, coefficients: Coefficients) -> None:
    """Raise an InputError unless these are coefficients for embeddings of that width.

    Args:
        z: (B, D).
        coefficients: `GraphOutput.coefficients`, or what else `gcahng.graph` has for them.
    """
    if not isinstance(coefficients, Coefficients):
        raise InputError(
            f"`coefficients` must be one of {', '.join(kind.__name__ for kind in Coefficients.__args__)}: got "
            f"{type(coefficients).__name__}. Pass `coefficients` of the graph's output."
        )
    if isinstance(coefficients, UnitCoefficients):
        return
    channels = coefficients.num_channels
    if z.dim() != 2 or z.shape[1] != channels:
        raise InputError(f"`z` must have shape (B, D) with D = {channels} as its coefficients: got {tuple(z.shape)}.")


def place(z: Tensor, plan: PairPlan, synthesis: Synthesis) -> PlacedBatch:
    """Lay out a batch, with gradient to z.

    Args:
        z: (B, D), group-major.
        plan: Its blocks hold whole classes, class-major (`gcahng.graph.class_major_plan`).
        synthesis: The pass.
    Raises:
        InputError: The plan is not for this batch, or cuts classes apart.
    """
    num_samples = synthesis.num_samples
    if not _holds_whole_classes(plan, z, num_samples):
        raise InputError(
            f"`plan` must hold whole classes of K = {num_samples} of the {z.shape[0]} samples in each block, class "
            f"after class: got blocks of {plan.block_size} for {plan.batch_size} samples. Call the graph with a plan "
            "from `gcahng.graph.class_major_plan`."
        )
    group = torch.arange(plan.block_size, device=z.device) % num_samples
    shares = fusion_shares(synthesis.weights.to(z))[group][:, group]
    points = synthesis.rule.distance_space(z)
    near = plan.positions(positive_distances(points, num_samples))
    moved = plan.positions(points) if synthesis.rule.normalised_distance else None
    return PlacedBatch(plan, num_samples, synthesis.rule.factor, plan.positions(z), moved, near, shares)


def _holds_whole_classes(plan: PairPlan, z: Tensor, num_samples: int) -> bool:
    if plan.batch_size != z.shape[0] or plan.block_size % num_samples or plan.batch_size % num_samples:
        return False
    if plan.order.device.type != "cpu":
        # Looking would wait for the device.
        return True
    samples = plan.order[: plan.batch_size].view(-1, num_samples)
    groups = torch.arange(num_samples) * (plan.batch_size // num_samples)
    return torch.equal(samples, samples[:, :1] + groups)
