"""The processes of a run, and the differentiable collectives between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Message = TypeVar("Message")


@dataclass(frozen=True)
class Ranks:
    """This process among all of them. One process needs no groups and sends nothing.

    Attributes:
        rank: Number of this process, 0..W-1.
        size: W.
        group: For tensors where they are computed; None for the default group.
        host_group: For numbers and objects on the CPU, so that no device is waited for; None for the default group.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    host_group: dist.ProcessGroup | None = None

    @property
    def share(self) -> tuple[int, int]:
        """(rank, W), as `gcahng.graph.PairPlan` takes it."""
        return self.rank, self.size

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and talks to people."""
        return self.rank == 0

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' tensors of one shape, on each rank; its backward pass sums the gradients."""
        return partial if self.size == 1 else _Sum.apply(partial, self.group)

    def gather(self, local: Tensor, class_counts: Sequence[int]) -> Tensor:
        """The global batch from each rank's part; its backward pass gives a rank the sum of its rows' gradients.

        Args:
            local: (K * P_r, ...), group-major.
            class_counts: (W,) classes of each rank; the parts may differ in size.
        Returns:
            (K * P, ...), group-major, the classes of rank 0 first in every group.
        """
        if self.size == 1:
            return local
        return _Gather.apply(local, tuple(class_counts), self.rank, self.group)

    def host_max(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks' numbers, number by number."""
        return self._host_reduced(values, dist.ReduceOp.MAX)

    def host_sum(self, values: Sequence[float]) -> list[float]:
        """The sums of all ranks' numbers, number by number."""
        return self._host_reduced(values, dist.ReduceOp.SUM)

    def all_of(self, message: Message) -> list[Message]:
        """One picklable object of each rank, in the order of the ranks: for rare words, not for every step."""
        if self.size == 1:
            return [message]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, message, group=self.host_group)
        return found

    def wait(self) -> None:
        """Return when all ranks have come here."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def _host_reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, operation, group=self.host_group)
        found: list[float] = numbers.tolist()
        return found


ONE = Ranks()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _summed(partial, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local: Tensor, class_counts: tuple[int, ...], rank: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.class_counts, ctx.rank, ctx.group = class_counts, rank, group
        most, own = max(class_counts), class_counts[rank]
        rows = local.reshape(local.shape[0] // own, own, *local.shape[1:])
        padded = rows.new_zeros(rows.shape[0], most, *local.shape[1:])
        padded[:, :own] = rows
        found = padded.new_empty(len(class_counts), *padded.shape)
        dist.all_gather_into_tensor(found.flatten(0, 1), padded, group=group)
        return torch.cat([part[:, :count] for part, count in zip(found, class_counts, strict=True)], 1).flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        counts, (gradient,) = ctx.class_counts, gradients
        by_class = gradient.reshape(gradient.shape[0] // sum(counts), sum(counts), *gradient.shape[1:])
        padded = gradient.new_zeros(len(counts), by_class.shape[0], max(counts), *gradient.shape[1:])
        for part, of_rank in zip(padded, by_class.split(counts, 1), strict=True):
            part[:, : of_rank.shape[1]] = of_rank
        own = padded.new_empty(padded.shape[1:])
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=ctx.group)
        return own[:, : counts[ctx.rank]].flatten(0, 1), None, None, None


def _summed(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
