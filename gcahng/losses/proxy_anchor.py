"""Proxy-Anchor loss (Kim et al., CVPR 2020).

Letters: B samples, D channels, N training classes with a proxy each.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gcahng.errors import InputError
from gcahng.layout import BatchLayout, check_embeddings, check_labels, check_same_width

# Similarities of one slice of proxies; about six times as much is there at once. Where there are several slices, the
# backward pass computes each again.
SIMILARITY_BYTES = 64 << 20


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
        if candidates is not None or candidate_labels is not None:
            raise InputError("`candidates` must be None: ProxyAnchorLoss compares embeddings with its proxies.")
        return proxy_anchor_loss(
            self.proxies, embeddings, labels, scale=self.scale, margin=self.margin, check_values=layout is None
        )


def proxy_anchor_loss(
    proxies: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    scale: float,
    margin: float,
    num_classes: int | None = None,
    first_class: int = 0,
    reduce: Callable[[Tensor], Tensor] | None = None,
    check_values: bool = True,
) -> Tensor:
    """The loss from some of the proxies or all: it consists of sums over proxies.

    Args:
        proxies: (n, D) of the classes from `first_class` on.
        embeddings: (B, D); any number of samples per class.
        labels: (B,) int64 in [0, N).
        scale, margin: As in `ProxyAnchorLoss`.
        num_classes: N; n where the proxies are all there are.
        first_class: Class of the first proxy here.
        reduce: Differentiable sum over those who have the other proxies; None: nobody has.
        check_values: False leaves it to the caller that embeddings and labels are good: a look waits for the device.
    Returns:
        Scalar loss.
    Raises:
        InputError: Shapes, dtypes or labels do not fit.
    """
    total = proxies.shape[0] if num_classes is None else num_classes
    check_embeddings(embeddings, values=check_values)
    check_labels(labels, embeddings.shape[0])
    check_same_width(proxies, embeddings, "proxies", "embeddings")
    if not embeddings.shape[0]:
        raise InputError("`embeddings` is empty: expected at least one sample.")
    if check_values and not 0 <= int(labels.min()) <= int(labels.max()) < total:
        raise InputError(
            f"`labels` must lie in [0, {total}), one proxy each: got {int(labels.min())} to {int(labels.max())}. "
            "Number the training classes from 0."
        )
    unit = F.normalize(embeddings, dim=1, eps=1e-12)
    size = max(1, SIMILARITY_BYTES // (unit.shape[0] * unit.element_size()))
    parts, first = [], first_class
    # `split`: its backward pass joins the slices' gradients instead of adding up as many zero-filled ones.
    for some in proxies.split(size):
        given = (unit, labels.long() - first, some, scale, margin)
        again = some.shape[0] < proxies.shape[0]
        parts.append(
            checkpoint(_sums, *given, use_reentrant=False, preserve_rng_state=False) if again else _sums(*given)
        )
        first += some.shape[0]
    sums = torch.stack(parts).sum(0)
    positive, negative, present = (sums if reduce is None else reduce(sums)).unbind()
    return positive / present + negative / total


def _sums(unit: Tensor, labels: Tensor, proxies: Tensor, scale: float, margin: float) -> Tensor:
    """(3,): positive terms, negative terms, proxies present; labels counted from the first proxy, any others are none.

    The positive term of a proxy that no embedding belongs to is log 1 = 0.
    """
    similarity = unit @ F.normalize(proxies, dim=1, eps=1e-12).T
    own = labels[:, None] == torch.arange(proxies.shape[0], device=labels.device)
    positive = _log_one_plus_sum(-scale * (similarity - margin), own)
    negative = _log_one_plus_sum(scale * (similarity + margin), ~own)
    return torch.stack([positive.sum(), negative.sum(), own.any(0).sum().to(unit.dtype)])


def _log_one_plus_sum(exponents: Tensor, mask: Tensor) -> Tensor:
    """log(1 + sum over the masked rows of exp): (N,) from (B, N), stable at any scale."""
    counted = exponents.masked_fill(~mask, float("-inf"))
    return torch.logsumexp(F.pad(counted, (0, 0, 0, 1)), 0)
