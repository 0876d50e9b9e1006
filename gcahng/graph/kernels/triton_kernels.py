"""The edge stage's inner loops with Triton kernels for the four places where fusion pays; else those of the base class.

triton is imported when a `TritonKernels` is made: this module loads without it.
"""

import contextlib
import importlib.util
import shutil
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.graph.kernels.eager import EagerKernels, HiddenWeights, NormWeights

# Below: no bfloat16 products, too little shared memory for the tiles.
LEAST_CAPABILITY = (8, 0)
LEAST_TRITON = (3, 6)
LARGEST_DIM = 8192


def triton_problem(device: torch.device | str) -> str | None:
    """Why the Triton kernels cannot run on `device`, in words, or None if they can.

    Args:
        device: Where the tensors are. The CPU will do if Triton interprets its kernels (a setting of Triton's own,
            for tests).
    """
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it comes with torch's CUDA wheels)"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < LEAST_TRITON:
        return f"triton 3.6 or newer is needed: found {triton.__version__}"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the Triton kernels need an NVIDIA GPU: the device is {device.type}"
    if not torch.cuda.is_available():
        return "the Triton kernels need an NVIDIA GPU: torch finds none"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the Triton kernels need compute capability 8.0: the GPU has {capability[0]}.{capability[1]}"
    return launcher_problem()


def launcher_problem() -> str | None:
    """Why Triton, which must be installed, cannot start kernels, whoever wrote them; None if it can."""
    import triton

    compilers = triton.knobs.build.impl or triton.knobs.build.cc or shutil.which("gcc") or shutil.which("clang")
    return None if compilers else "triton needs a C compiler, gcc or clang, to start its kernels: none is found"


class TritonKernels(EagerKernels):
    """Fused kernels for mixing, first-layer messages and the hidden layer.

    float64 tensors, empty chunks and sizes outside a kernel's range take the base class's way; so do matrix products
    of float32 operands, which the tensor cores do not speed up without rounding: there the vendor's library is ahead.
    """

    name = "triton"
    keeps_mix_state = False

    def __init__(self, *, float32_products: bool = False) -> None:
        """
        Args:
            float32_products: Run matrix products of float32 operands in Triton as well.
        Raises:
            InputError: Triton cannot be used in this process.
        """
        problem = triton_problem("cuda")
        if problem is not None:
            raise InputError(f"The graph's Triton kernels cannot be used: {problem}. Take the backend eager instead.")
        self.float32_products = float32_products

    def mix(
        self, edges: Tensor, values: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], norm: NormWeights
    ) -> Tensor:
        if not _mixes(values[0], norm.weight):
            return super().mix(edges, values, weights, norm)
        from gcahng.graph.kernels.triton_mix import mix

        with _on_device_of(edges):
            return mix(edges, None, values, weights, norm)

    def product_mix(
        self,
        factors: tuple[Tensor, Tensor],
        values: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        norm: NormWeights,
    ) -> Tensor:
        if not _mixes(values[0], norm.weight):
            return super().product_mix(factors, values, weights, norm)
        from gcahng.graph.kernels.triton_mix import mix

        with _on_device_of(values[0]):
            return mix(None, factors, values, weights, norm)

    def product_messages(
        self,
        factors: tuple[Tensor, Tensor],
        weight: Tensor,
        bias: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
        low: torch.dtype | None,
        *,
        mirrored: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        from gcahng.graph.kernels.triton_messages import LARGEST_BLOCK, product_messages

        if factors[0].shape[1] > LARGEST_BLOCK or not self._multiplies(factors[0], low):
            return super().product_messages(factors, weight, bias, masks, low, mirrored=mirrored)
        with _on_device_of(weight):
            return None, *product_messages(factors, weight, bias, masks, low, mirrored=mirrored)

    def hidden(
        self, x: Tensor, weights: HiddenWeights, low: torch.dtype | None, *, keep: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        if not self._multiplies(x, low):
            return super().hidden(x, weights, low, keep=keep)
        from gcahng.graph.kernels.triton_hidden import hidden

        with _on_device_of(x):
            return None, *hidden(x, weights, low)

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
        # What was kept need not be computed again.
        if inner is not None or not self._multiplies(x, low):
            return super().hidden_backward(x, inner, grad, row, mean, weights, low)
        from gcahng.graph.kernels.triton_hidden_backward import hidden_backward

        with _on_device_of(x):
            return hidden_backward(x, grad, row, mean, weights, low)

    def _multiplies(self, x: Tensor, low: torch.dtype | None) -> bool:
        """Whether products of x belong to Triton."""
        return x.numel() > 0 and x.dtype == torch.float32 and (low is not None or self.float32_products)


def _mixes(x: Tensor, weight: Tensor) -> bool:
    """Whether the mixing kernel has room for x (n, b, D)."""
    return x.numel() > 0 and x.dtype == weight.dtype == torch.float32 and x.shape[-1] <= LARGEST_DIM


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current GPU, whichever the tensors are on."""
    return torch.cuda.device_of(x)
