"""Processes simulated as threads of one process: a reducer with gradient, and the mean of parameter gradients."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
TIMEOUT_S = 60.0


class Group:
    """Threads that meet to add tensors; each has a rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self._slots: list[Tensor] = [torch.empty(0)] * size

    def sum(self, rank: int, value: Tensor) -> Tensor:
        """The sum over all ranks, added in the order of the ranks."""
        self._slots[rank] = value.detach()
        self._barrier.wait()
        assert len({slot.shape for slot in self._slots}) == 1, "ranks reduce different quantities"
        total = torch.stack(self._slots).sum(0)
        self._barrier.wait()
        return total

    def reducer(self, rank: int) -> Callable[[Tensor], Tensor]:
        """Differentiable sum for one rank: forward adds the parts, backward adds the gradients."""
        return lambda value: _Sum.apply(value, self, rank)

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """`work(rank)` on all ranks at once; a failure of one ends all."""

        def guarded(rank: int) -> Result:
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.size)]
        failures = [f.exception() for f in futures if f.exception() is not None]
        for failure in failures:
            if not isinstance(failure, threading.BrokenBarrierError):
                raise failure
        return [future.result() for future in futures]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group, rank: int) -> Tensor:
        ctx.group, ctx.rank = group, rank
        return group.sum(rank, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.sum(ctx.rank, gradients[0]), None, None
