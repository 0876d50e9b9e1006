"""Losses on synthetic negatives (GCA-HNG, IJCV 2024, section 3.4).

Letters: B = P * K samples group-major, P classes, K samples per class, D channels, N training classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.errors import InputError
from gcahng.layout import check_labels, group_major
from gcahng.losses.n_pair import LENGTH_WEIGHT


def _group_major_rows(z: Tensor, synthetic: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both with their rows group-major; columns already stand in the order of first appearance."""
    if synthetic.dim() != 3 or synthetic.shape[::2] != z.shape:
        raise InputError(
            f"`synthetic` must have shape (B, P, D) with B, D = {tuple(z.shape)}: got {tuple(synthetic.shape)}."
        )
    if labels is None:
        if z.shape[0] % synthetic.shape[1]:
            raise InputError(
                f"`synthetic` must have one column per class: {z.shape[0]} samples are no multiple of "
                f"{synthetic.shape[1]} classes."
            )
        return z, synthetic
    check_labels(labels, z.shape[0])
    layout = group_major(labels)
    if layout.num_classes != synthetic.shape[1]:
        raise InputError(
            f"`synthetic` must have one column per class of `labels`: expected {layout.num_classes}, "
            f"got {synthetic.shape[1]}."
        )
    return z[layout.order], synthetic[layout.order]


def _own_class(synthetic: Tensor) -> Tensor:
    batch, classes = synthetic.shape[:2]
    return F.one_hot(torch.arange(batch, device=synthetic.device) % classes, classes).bool()


def synthetic_n_pair_loss(z: Tensor, synthetic: Tensor, labels: Tensor | None = None) -> Tensor:
    """J_syn: every sample once an anchor, its positive against the synthetic negatives of the other classes.

    Cross-entropy over P candidates (own class: z_i · z_pos(i), others: z_i · synthetic_{i,p}), mean over all anchors,
    plus 3e-3 * 0.25 * (sum ‖z_i‖² / P + mean over the P² candidates of ‖candidate‖²) per group, mean over groups.

    Args:
        z: (B, D).
        synthetic: (B, P, D) as `gcahng.generation.generate_negatives` makes it; the own-class column does not count.
        labels: (B,) int64 for a batch in any order; without them the batch must be group-major.
    Raises:
        InputError: Shapes do not fit, or the classes have different numbers of samples.
    """
    z, synthetic = _group_major_rows(z, synthetic, labels)
    batch, classes = synthetic.shape[:2]
    is_own = _own_class(synthetic)
    positive = z.roll(-classes, 0)
    scores = torch.einsum("id,ipd->ip", z, synthetic)
    logits = torch.where(is_own, (z * positive).sum(1, keepdim=True), scores)
    entropy = F.cross_entropy(logits, torch.arange(batch, device=z.device) % classes)
    square_sum = (synthetic.square().sum(-1) * ~is_own).sum() + positive.square().sum()
    return entropy + LENGTH_WEIGHT * (z.square().sum() / batch + square_sum / (batch * classes))


def classification_loss(logits: Tensor, class_labels: Tensor) -> Tensor:
    """J_cls: mean cross-entropy of (B, P, N) logits of the synthetic negatives against the class of column p."""
    return F.cross_entropy(logits.flatten(0, 1), class_labels.expand(logits.shape[:2]).flatten())


def similarity_loss(z: Tensor, synthetic: Tensor, labels: Tensor | None = None) -> Tensor:
    """J_sim: 1 - cos(z_i, synthetic_{i,p}), own-class entries 0, mean over all B * P entries.

    Differs from the released code, which zeroes other entries by an index slip.

    Args:
        z, synthetic, labels: As in `synthetic_n_pair_loss`.
    """
    z, synthetic = _group_major_rows(z, synthetic, labels)
    away = 1 - F.cosine_similarity(z[:, None], synthetic, dim=-1)
    return (away * ~_own_class(synthetic)).mean()


def diversity_loss(pull_coefficients: Tensor) -> Tensor:
    """J_div of a full (B, B, D) table: 1 - sqrt(sum_{ij,c} (lambda - mean_j lambda)² / B²).

    The square root has no finite gradient at 0 (all coefficients alike); there the gradient is 0.
    """
    spread = (pull_coefficients - pull_coefficients.mean(1, keepdim=True)).square().sum()
    positive = spread > 0
    root = torch.where(positive, spread, torch.ones_like(spread)).sqrt() / pull_coefficients.shape[0]
    return 1 - torch.where(positive, root, torch.zeros_like(root))
