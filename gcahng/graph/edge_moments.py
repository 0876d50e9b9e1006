"""Mean and variance over all ordered edges, streamed chunk by chunk, then over processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class EdgeMoments:
    """Weighted moments so far (Chan, Golub and LeVeque's update: no difference of large sums).

    Attributes:
        count: () sum of the weights.
        mean: (D,).
        squares: (D,) weighted sum of squared deviations from the mean.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def zeros(cls, like: Tensor) -> "EdgeMoments":
        """No edges yet; `like` is (D,)."""
        return cls(like.new_zeros(()).detach(), torch.zeros_like(like).detach(), torch.zeros_like(like).detach())

    def add(self, edges: Tensor, weights: Tensor | float) -> None:
        """Take a chunk's edges.

        Args:
            edges: (R, D), without gradient.
            weights: How many ordered edges each row stands for, R values or one number.
        """
        if not edges.shape[0]:
            return
        if isinstance(weights, Tensor):
            column = weights.reshape(-1, 1)
            count = column.sum()
            mean = (edges * column).sum(0) / count.clamp_min(1)
            squares = ((edges - mean).square() * column).sum(0)
        else:
            count = self.count.new_full((), weights * edges.shape[0])
            mean = edges.mean(0)
            squares = weights * (edges - mean).square_().sum(0)
        total = (self.count + count).clamp_min(1)
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.count = self.count + count

    def over(self, reduce: Callable[[Tensor], Tensor], count: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (D,) over the edges of all processes.

        Args:
            reduce: Sum over processes.
            count: Ordered edges of all processes.
        """
        with torch.no_grad():
            mean = reduce(self.mean * self.count) / count
            squares = self.squares + self.count * (self.mean - mean).square()
            return mean, reduce(squares) / count
