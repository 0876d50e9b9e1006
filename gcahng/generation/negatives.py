"""Synthetic negatives for a whole batch, from a full table of pull coefficients.

Letters: B = P * K samples, P classes, K samples per class, D channels.
"""

import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.generation.fusion import fusion_shares
from gcahng.generation.interpolation import (
    FIRST_EPOCH_MEAN_LOSS,
    Interpolation,
    distance,
    positive_distances,
    way_shares,
)
from gcahng.layout import BatchLayout, check_embeddings, check_labels, group_major


def generate_negatives(
    z: Tensor,
    labels: Tensor,
    pull_coefficients: Tensor | None,
    *,
    alpha: float,
    mean_metric_loss: float = FIRST_EPOCH_MEAN_LOSS,
    weights: Tensor | None = None,
    normalised_distance: bool = False,
) -> Tensor:
    """One synthetic negative per anchor and class: interpolated channel by channel, fused over the class's samples.

    GCA-HNG (IJCV 2024), section 3.3, with the released code's reading: distances between embeddings that are not
    normalised, one mixing weight per (anchor group, negative group).

    Args:
        z: (B, D) embeddings; every class the same number K >= 2 of times, in any order.
        labels: (B,) int64.
        pull_coefficients: (B, B, D) in [0, 1], entry [i, j] for anchor i and negative j; None: one coefficient 1
            for every channel ("single").
        alpha: Hardness pace.
        mean_metric_loss: Mean metric loss of the previous epoch.
        weights: (K, K-1) mixing weights, or the same flat in the order anchor group, negative group (see
            `gcahng.random.mixing_weights`); by default drawn from torch's global generator.
        normalised_distance: The paper's reading of d+ and d-.
    Returns:
        (B, P, D): row i belongs to sample i of the batch, column p to the p-th class in the order of first
        appearance. The own-class column exists; it is not a negative. Gradient flows to z and to the coefficients.
    Raises:
        InputError: Shapes, dtypes or class counts do not fit.
    """
    layout = _checked_layout(z, labels, pull_coefficients)
    num_classes, num_samples = layout.num_classes, layout.num_samples
    rule = Interpolation(alpha, mean_metric_loss, normalised_distance)
    if weights is None:
        weights = torch.rand(num_samples, num_samples - 1, dtype=z.dtype, device=z.device)
    if weights.shape == (num_samples * (num_samples - 1),):
        weights = weights.view(num_samples, num_samples - 1)
    if weights.shape != (num_samples, num_samples - 1):
        raise InputError(
            f"`weights` must have shape (K, K-1) = {(num_samples, num_samples - 1)}: got {tuple(weights.shape)}."
        )
    order = layout.order
    ordered = z[order]
    points = rule.distance_space(ordered)
    negative_distance = distance(points[:, None] - points[None, :])
    positive_distance = positive_distances(points, num_samples)[:, None]
    pull = z.new_full((1, 1, 1), rule.factor)
    if pull_coefficients is not None:
        pull = pull_coefficients[order][:, order] * rule.factor
    share = way_shares(positive_distance, negative_distance, pull)
    pulled = ordered[:, None] + share * (ordered[None, :] - ordered[:, None])
    by_group = pulled.view(num_samples, num_classes, num_samples, num_classes, z.shape[1])
    fused = torch.einsum("ag,apgqd->apqd", fusion_shares(weights.to(z)), by_group)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return fused.reshape(z.shape[0], num_classes, z.shape[1])[place]


def _checked_layout(z: Tensor, labels: Tensor, pull_coefficients: Tensor | None) -> BatchLayout:
    check_embeddings(z, "z")
    check_labels(labels, z.shape[0])
    layout = group_major(labels)
    if layout.num_samples < 2:
        raise InputError("`labels` must hold every class at least twice: an anchor needs a positive, got K = 1.")
    if pull_coefficients is not None and pull_coefficients.shape != (*z.shape[:1], *z.shape):
        raise InputError(
            f"`pull_coefficients` must have shape (B, B, D) = {(z.shape[0], *z.shape)}: "
            f"got {tuple(pull_coefficients.shape)}."
        )
    return layout
