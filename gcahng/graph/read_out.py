"""Batch statistics of the edge read-out: over all B² ordered edges, wherever they are computed."""

import torch
from torch import Tensor, nn


def update_running(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move the running statistics as BatchNorm1d does: momentum, unbiased variance (count / (count - 1))."""
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    momentum = 0.1 if norm.momentum is None else norm.momentum
    with torch.no_grad():
        unbiased = variance.detach() * (count / max(count - 1, 1))
        norm.running_mean.lerp_(mean.detach().to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
        norm.num_batches_tracked.add_(1)


def running_statistics(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Mean and variance to use in evaluation."""
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var
