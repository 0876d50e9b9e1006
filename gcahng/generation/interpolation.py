"""Channel-adaptive interpolation between an anchor and a negative (GCA-HNG, IJCV 2024, section 3.3).

r = (d+ + (d- - d+) * lambda * exp(-alpha / mean metric loss)) / d-, channel by channel, and
synthetic = anchor + r * (negative - anchor) where d- > d+, else the negative itself. The synthetic negative never
comes nearer to the anchor than a share d+ / d- of the way in any channel.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.errors import InputError

# Added to every coordinate difference before the norm, as PyTorch's pairwise_distance does.
DISTANCE_EPSILON = 1e-6
SMALLEST_MEAN_LOSS = 1e-6
FIRST_EPOCH_MEAN_LOSS = 1e6


@dataclass(frozen=True)
class Interpolation:
    """How far negatives are pulled towards their anchors.

    Attributes:
        alpha: Hardness pace; belongs to the scale of the metric loss.
        mean_metric_loss: Mean metric loss of the previous epoch; 1e6 in the first.
        normalised_distance: Measure d+ and d- between L2-normalised embeddings (the paper's reading) instead of
            the embeddings as they are (the released code's).
    """

    alpha: float
    mean_metric_loss: float = FIRST_EPOCH_MEAN_LOSS
    normalised_distance: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise InputError(f"`alpha` must be a finite number >= 0: got {self.alpha}.")
        if math.isnan(self.mean_metric_loss):
            raise InputError("`mean_metric_loss` is not a number: the previous epoch's metric loss diverged.")

    @property
    def factor(self) -> float:
        """exp(-alpha / mean metric loss): near 1 while the loss is high, falling as the model learns."""
        return math.exp(-self.alpha / max(self.mean_metric_loss, SMALLEST_MEAN_LOSS))

    def distance_space(self, z: Tensor) -> Tensor:
        """The vectors between which distances are measured."""
        return torch.nn.functional.normalize(z, dim=-1, eps=1e-12) if self.normalised_distance else z


def distance(difference: Tensor) -> Tensor:
    """‖difference + 1e-6‖ over the last axis; its gradient is 0 where it is 0."""
    return torch.linalg.vector_norm(difference + DISTANCE_EPSILON, dim=-1)


def positive_distances(points: Tensor, num_samples: int) -> Tensor:
    """Distance of every sample to its positive, the same class's sample of the next group: (B,).

    Args:
        points: (B, D), group-major.
        num_samples: K.
    """
    return distance(points - positives(points, num_samples))


def positives(z: Tensor, num_samples: int) -> Tensor:
    """Each sample's positive: group g takes group (g + 1) mod K. (B, D) group-major in and out."""
    return z.roll(-(z.shape[0] // num_samples), 0)


def way_shares(positive_distance: Tensor, negative_distance: Tensor, pull: Tensor) -> Tensor:
    """The share r of the way from anchor to negative, channel by channel.

    Args:
        positive_distance, negative_distance: d+ and d-, broadcastable to the pairs (...).
        pull: lambda * exp(-alpha / mean metric loss), (..., D) or broadcastable.
    Returns:
        (..., D); 1 where d- <= d+.
    """
    farther = negative_distance > positive_distance
    # d- may be 0 where it does not count; keep its gradient finite there.
    safe = torch.where(farther, negative_distance, torch.ones_like(negative_distance))
    nearest = (positive_distance / safe)[..., None]
    return torch.where(farther[..., None], nearest + (1 - nearest) * pull, torch.ones_like(nearest))
