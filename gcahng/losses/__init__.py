"""Metric losses and the losses on synthetic negatives."""

from gcahng.losses.hard_triplets import (
    HardNegativeLoss,
    SelectivelyContrastiveLoss,
    SemiHardNegativeLoss,
    Triplets,
    select_triplets,
)
from gcahng.losses.n_pair import NPairLoss, NPairPlusLoss
from gcahng.losses.proxy_anchor import ProxyAnchorLoss
from gcahng.losses.synthetic import (
    classification_loss,
    diversity_loss,
    similarity_loss,
    synthetic_n_pair_loss,
)

__all__ = [
    "HardNegativeLoss",
    "NPairLoss",
    "NPairPlusLoss",
    "ProxyAnchorLoss",
    "SelectivelyContrastiveLoss",
    "SemiHardNegativeLoss",
    "Triplets",
    "classification_loss",
    "diversity_loss",
    "select_triplets",
    "similarity_loss",
    "synthetic_n_pair_loss",
]
