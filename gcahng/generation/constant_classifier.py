"""Cross-entropy of a linear classifier whose weights are constants, in slices of rows.

Two matrix products of rows x N x D, where a classifier that learns takes three; logits of all rows are never there.

Letters: R rows, D channels, N classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.graph.precision import product

# Logits of one slice. CPU: they stay in cache between the products.
LOGIT_BYTES = {"cpu": 16 << 20}
LOGIT_BYTES_ELSEWHERE = 128 << 20


@dataclass(frozen=True)
class ConstantClassifier:
    """A linear classifier that is not trained here.

    Attributes:
        weight: (N, D).
        bias: (N,), or None.
        low: Dtype of the operands of matrix products; None for the tensors' own.
    """

    weight: Tensor
    bias: Tensor | None
    low: torch.dtype | None = None

    def lowered(self) -> "ConstantClassifier":
        """The same without gradient, its weight in `low`: converted once instead of for every slice."""
        bias = None if self.bias is None else self.bias.detach()
        weight = self.weight.detach()
        return ConstantClassifier(weight if self.low is None else weight.to(self.low), bias, self.low)

    def logits(self, x: Tensor) -> Tensor:
        """(..., N) of (..., D) by autograd's own operations, with gradient to x alone."""
        return product(x, self.weight.detach(), None if self.bias is None else self.bias.detach(), self.low)

    def predictions(self, x: Tensor) -> Tensor:
        """(R,) int64 the class of each row's largest logit, of (R, D)."""
        found = [product(x[rows], self.weight, self.bias, self.low).argmax(1) for rows in self._slices(x)]
        return torch.cat(found) if found else x.new_empty(0, dtype=torch.int64)

    def cross_entropy(
        self, x: Tensor, labels: Tensor, counted: Tensor | None, *, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of rows, and its gradient.

        Args:
            x: (R, D).
            labels: (R,) int64.
            counted: (R,) factors of the rows; None for ones.
            gradient: False: spare the gradient.
        Returns:
            A scalar, and (R, D), (0, D) without gradient.
        """
        total = x.new_zeros(())
        grad = torch.empty_like(x) if gradient else x.new_empty(0, x.shape[1])
        for rows in self._slices(x):
            some, some_labels = x[rows], labels[rows]
            logits = product(some, self.weight, self.bias, self.low)
            best = logits.amax(1, keepdim=True)
            own = logits.gather(1, some_labels[:, None]) - best
            odds = logits.sub_(best).exp_()
            whole = odds.sum(1, keepdim=True)
            loss = whole.log() - own
            if counted is not None:
                loss = loss * counted[rows, None]
            total += loss.sum()
            if gradient:
                grad[rows] = self._gradient(odds, whole, some_labels)
        if gradient and counted is not None:
            grad *= counted[:, None]
        return total, grad

    def _gradient(self, odds: Tensor, whole: Tensor, labels: Tensor) -> Tensor:
        """(softmax - one-hot) weight, the softmax being odds / whole."""
        weight = self.weight
        mean = (odds.to(weight.dtype) @ weight).to(odds.dtype)
        return mean.div_(whole).sub_(weight.index_select(0, labels))

    def _slices(self, x: Tensor) -> Iterator[slice]:
        room = LOGIT_BYTES.get(x.device.type, LOGIT_BYTES_ELSEWHERE)
        size = max(1, room // (self.weight.shape[0] * x.element_size()))
        for start in range(0, x.shape[0], size):
            yield slice(start, start + size)
