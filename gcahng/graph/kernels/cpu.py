"""The eager kernels for the CPU: the wide hidden layer lives in two buffers that every chunk of a pass writes anew.

A fresh 8 MB tensor per chunk costs the page faults of 8 MB per chunk, a tenth of the edge stage's time; the CPU has no
caching allocator. For smaller tensors `keep_freed_memory` asks the C library to be one.
"""

import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gcahng.graph.kernels.eager import (
    EagerKernels,
    HiddenWeights,
    NormWeights,
    aten,
    column_sums,
    lowered,
    row_statistics,
)

# glibc's largest threshold for blocks with a mapping of their own is 32 MiB on 64 bits.
LARGEST_MAPPED_BYTES = 31 << 20


@cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MiB of freed memory for the next tensors; once per process.

    glibc gives freed memory back to the system beyond twice the largest block (up to 32 MiB) that ever was freed after
    it had a mapping of its own, and every chunk then pays the page faults again. Freeing one such block, which nobody
    wrote to and so took no memory, raises the bound. Other libraries do not mind.
    """
    torch.empty(LARGEST_MAPPED_BYTES, dtype=torch.uint8, device="cpu")


class CpuKernels(EagerKernels):
    """`EagerKernels` with buffers: what `hidden` and `hidden_backward` return holds until the next call of either.

    Each thread has buffers of its own, so that several may use one network.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()
        keep_freed_memory()

    @property
    def _buffers(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._of_thread.__dict__
        return found

    def release(self) -> None:
        """Give the buffers back; the end of a pass."""
        self._buffers.clear()

    def normalise_into(self, x: Tensor, norm: NormWeights, into: Tensor) -> Tensor:
        if into.dtype != x.dtype:
            return super().normalise_into(x, norm, into)
        inner = aten.gelu(x) if norm.gelu else x
        statistics = x.new_empty(x.shape[0], 1), x.new_empty(x.shape[0], 1)
        aten.native_layer_norm.out(
            inner, [x.shape[-1]], norm.weight, norm.bias, norm.eps, out0=into, out1=statistics[0], out2=statistics[1]
        )
        return into

    def hidden(
        self, x: Tensor, weights: HiddenWeights, low: torch.dtype | None, *, keep: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        if keep:
            inner = self.linear(x, weights.weight_in, weights.bias_in, low)
            h = aten.gelu.out(inner, out=self._buffer("h", inner))
            return inner, h, *row_statistics(h, x.dtype, weights.eps)
        h = aten.gelu_(self._linear("h", x, weights, low))
        return None, h, *row_statistics(h, x.dtype, weights.eps)

    def hidden_backward(
        self,
        x: Tensor,
        inner: Tensor | None,
        grad: Tensor,
        row: Tensor,
        mean: Tensor,
        weights: HiddenWeights,
        low: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if inner is None:
            inner = self._linear("inner", x, weights, low)
        h = aten.gelu.out(inner, out=self._buffer("h", inner))
        grad_h = torch.mm(grad, weights.weight_out, out=self._buffer("grad", inner))
        grad_h.addcmul_(h, lowered(-row, low)).add_(lowered(row * mean, low))
        # Element by element, so it may write over its input.
        grad_inner = aten.gelu_backward.grad_input(grad_h, inner, grad_input=grad_h)
        return grad_inner, h, column_sums(grad_inner, x.dtype)

    def _linear(self, name: str, x: Tensor, weights: HiddenWeights, low: torch.dtype | None) -> Tensor:
        like = x.new_empty((0, weights.weight_in.shape[0]), dtype=weights.weight_in.dtype)
        out = self._buffer(name, like, rows=x.shape[0])
        return torch.addmm(lowered(weights.bias_in, low), lowered(x, low), weights.weight_in.t(), out=out)

    def _buffer(self, name: str, like: Tensor, rows: int | None = None) -> Tensor:
        """Space of the given shape and dtype, the same for every call with this name."""
        shape = (like.shape[0] if rows is None else rows, like.shape[1])
        found = self._buffers.get(name)
        if found is not None and found.is_inference() and not torch.is_inference_mode_enabled():
            # Left behind by a pass that did not end: torch refuses to write into it here.
            found = None
        if found is None or found.numel() < shape[0] * shape[1] or found.dtype != like.dtype:
            found = self._buffers[name] = like.new_empty(shape[0] * shape[1])
        return found[: shape[0] * shape[1]].view(shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CpuKernels":
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
