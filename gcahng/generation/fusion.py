"""Random weighting: one synthetic negative per class out of the interpolations with its K samples."""

import torch
from torch import Tensor

from gcahng.errors import InputError


def fusion_shares(weights: Tensor) -> Tensor:
    """The share of each negative group in the fused synthetic negative.

    The method fuses in group order: f = s_0; f = s_g + w_g (f - s_g) for g = 1..K-1. Unrolled,
    f = sum_g share_g s_g with share_g = (1 - w_g) w_{g+1} ... w_{K-1} and w_0 = 0.

    Args:
        weights: (K, K-1), weights[a, g-1] = w_g for the anchors of group a, in [0, 1].
    Returns:
        (K, K), entry [a, g]; rows sum to 1.
    Raises:
        InputError: The shape is not (K, K-1).
    """
    if weights.dim() != 2 or weights.shape[0] != weights.shape[1] + 1:
        raise InputError(f"`weights` must have shape (K, K-1): got {tuple(weights.shape)}.")
    entering = torch.cat([weights.new_zeros(weights.shape[0], 1), weights], 1)
    later = torch.cat([weights, weights.new_ones(weights.shape[0], 1)], 1)
    surviving = later.flip(1).cumprod(1).flip(1)
    return (1 - entering) * surviving
