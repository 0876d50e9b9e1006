"""Fully connected layers as functions of single rows: their BatchNorms have the statistics of one real batch.

A BatchNorm that takes statistics of whatever rows it is given makes each row depend on all the others. Here it is told
which batch they are of, so that a row's output is its own: rows can be computed in any number at a time, on any rank,
and what is synthetic is normalised exactly as the real samples beside it. Nothing keeps running statistics.

Letters: R rows, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

RowFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Affine:
    """x Wᵀ + bias.

    Attributes:
        weight: (C_out, C_in).
        bias: (C_out,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Normalise:
    """A BatchNorm with given statistics: (x - mean) / sqrt(variance + eps) * weight + bias.

    Attributes:
        mean, variance: (C,); the variance is that of the values (not the unbiased one), as BatchNorm takes it.
        weight, bias: (C,).
        eps: Added to the variance.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of_batch(cls, batch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> "Normalise":
        """With the statistics of `batch`, (R, C), and gradient to it."""
        variance, mean = torch.var_mean(batch, 0, correction=0)
        return cls(mean, variance, weight, bias, eps)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) * (self.weight * torch.rsqrt(self.variance + self.eps)) + self.bias


@dataclass(frozen=True)
class RowMap:
    """One row function after the other; the widest rows in between have `width` channels."""

    steps: Sequence[RowFunction]
    width: int

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x

    def then(self, following: "RowMap") -> "RowMap":
        """This, and `following` behind it."""
        return RowMap((*self.steps, *following.steps), max(self.width, following.width))
