"""Metric losses and the losses on synthetic negatives."""

from gcahng.losses.n_pair import NPairLoss, NPairPlusLoss
from gcahng.losses.proxy_anchor import ProxyAnchorLoss
from gcahng.losses.synthetic import (
    classification_loss,
    diversity_loss,
    similarity_loss,
    synthetic_n_pair_loss,
)

__all__ = [
    "NPairLoss",
    "NPairPlusLoss",
    "ProxyAnchorLoss",
    "classification_loss",
    "diversity_loss",
    "similarity_loss",
    "synthetic_n_pair_loss",
]
