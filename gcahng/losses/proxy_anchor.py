"""Proxy-Anchor loss (Kim et al., CVPR 2020)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.errors import InputError
from gcahng.layout import BatchLayout, check_embeddings, check_labels, check_same_width


class ProxyAnchorLoss(nn.Module):
    """One learned proxy per training class; each proxy is an anchor for the whole batch.

    mean over the proxies present in the batch of log(1 + sum_positives exp(-scale (s - margin)))
    + mean over all N proxies of log(1 + sum_negatives exp(scale (s + margin))), s the cosine similarity.
    """

    def __init__(self, num_classes: int, embedding_dim: int, scale: float = 32.0, margin: float = 0.1) -> None:
        """
        Args:
            num_classes: N, proxies.
            embedding_dim: D.
            scale: Of the similarities.
            margin: Added to negative, taken from positive similarities.
        """
        super().__init__()
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")
        self.scale = scale
        self.margin = margin

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        candidates: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        *,
        layout: BatchLayout | None = None,
    ) -> Tensor:
        """
        Args:
            embeddings: (B, D); any number of samples per class.
            labels: (B,) int64 in [0, N).
            candidates, candidate_labels: Must be None: the proxies are what embeddings are compared with.
            layout: How the embeddings are grouped, from a caller who has checked them and their labels: their values
                are then not looked at, which would wait for the device.
        Returns:
            Scalar loss.
        Raises:
            InputError: Shapes, dtypes or labels do not fit, or candidates are given.
        """
        check_embeddings(embeddings, values=layout is None)
        check_labels(labels, embeddings.shape[0])
        if candidates is not None or candidate_labels is not None:
            raise InputError("`candidates` must be None: ProxyAnchorLoss compares embeddings with its proxies.")
        check_same_width(self.proxies, embeddings, "proxies", "embeddings")
        if not embeddings.shape[0]:
            raise InputError("`embeddings` is empty: expected at least one sample.")
        num_classes = self.proxies.shape[0]
        if layout is None and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise InputError(
                f"`labels` must lie in [0, {num_classes}), one proxy each: got {int(labels.min())} to "
                f"{int(labels.max())}. Number the training classes from 0."
            )
        similarity = F.normalize(embeddings, dim=1, eps=1e-12) @ F.normalize(self.proxies, dim=1, eps=1e-12).T
        own = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, labels.long()[:, None], True)
        positive = _log_one_plus_sum(-self.scale * (similarity - self.margin), own)
        negative = _log_one_plus_sum(self.scale * (similarity + self.margin), ~own)
        present = own.any(0)
        # The positive term of a proxy that no embedding belongs to is log 1 = 0.
        return positive.sum() / present.sum() + negative.sum() / num_classes


def _log_one_plus_sum(exponents: Tensor, mask: Tensor) -> Tensor:
    """log(1 + sum over the masked rows of exp): (N,) from (B, N), stable at any scale."""
    counted = exponents.masked_fill(~mask, float("-inf"))
    return torch.logsumexp(F.pad(counted, (0, 0, 0, 1)), 0)
