"""The one place where the graph's backend is chosen: who computes the edges, given device and sizes.

`triton`, `compiled` and `eager` run the same chunked edge stage and differ in their inner loops (`kernels/`);
`scatter` is the plain edge list of `reference.py`. To add kernels: a subclass of `EagerKernels`, a word in `BACKENDS`,
a branch in `backend_problem` and in `make_kernels`.
"""

import logging
from dataclasses import dataclass
from functools import cache

import torch

from gcahng.errors import InputError
from gcahng.graph.kernels import EagerKernels
from gcahng.graph.kernels.compiled import CompiledKernels, compiler_problem
from gcahng.graph.kernels.cpu import CpuKernels
from gcahng.graph.kernels.triton_kernels import LARGEST_DIM, TritonKernels, triton_problem

log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "compiled", "eager", "scatter")
# Words of earlier versions, and what to write instead.
RENAMED = {"pairs": "eager"}


@dataclass(frozen=True)
class Choice:
    """Who computes the edges.

    Attributes:
        name: One of `BACKENDS`, but not "auto".
        reason: Why this one; empty if the caller asked for it.
    """

    name: str
    reason: str = ""


class FusedKernels(TritonKernels, CompiledKernels):
    """Triton kernels where there are some, compiled functions for the rest."""

    def __init__(self, compiler: str = "inductor") -> None:
        """
        Args:
            compiler: A backend of torch.compile.
        Raises:
            InputError: Triton cannot be used in this process.
        """
        TritonKernels.__init__(self)
        CompiledKernels.__init__(self, compiler)


def check_backend_name(backend: str) -> None:
    """Raise an InputError if there is no such backend."""
    if backend in RENAMED:
        raise InputError(
            f"`backend` {backend!r} is now called {RENAMED[backend]!r}: expected one of {', '.join(BACKENDS)}. "
            f"Write {RENAMED[backend]!r}, or 'auto' for the fastest that fits."
        )
    if backend not in BACKENDS:
        raise InputError(f"`backend` must be one of {', '.join(BACKENDS)}: got {backend!r}.")


def backend_problem(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, in words, or None if it can."""
    if backend == "triton":
        return triton_problem(device)
    if backend == "compiled":
        return compiler_problem(device)
    return None


def require_backend(backend: str, device: torch.device) -> None:
    """Raise an InputError if a backend that was asked for by name cannot run on the device.

    Args:
        backend: One of `BACKENDS`.
        device: Where the batches will be.
    """
    problem = backend_problem(backend, device)
    if problem is not None:
        raise InputError(
            f"The graph's backend {backend!r} cannot run on {device.type}: {problem}. "
            "Use backend 'auto', which takes the fastest that can."
        )


def choose_backend(backend: str, device: torch.device, embedding_dim: int, block_size: int) -> Choice:
    """Who computes the edges of a batch.

    "auto" on CUDA takes Triton's kernels, else compiled functions, whatever the batch size: a small batch is bound by
    the number of launches and a large one by memory traffic, and fusing lowers both. On the CPU it takes plain torch:
    the matrix products fill the time there, and compiling takes longer than many steps.

    Args:
        backend: One of `BACKENDS`.
        device: Where the batch is.
        embedding_dim: D.
        block_size: b of the batch's plan.
    Raises:
        InputError: A backend asked for by name cannot run on the device.
    """
    if backend != "auto":
        require_backend(backend, device)
        return Choice(backend)
    choice = _automatic(device, embedding_dim, block_size)
    _announce(choice, device.type)
    return choice


@cache
def _automatic(device: torch.device, embedding_dim: int, block_size: int) -> Choice:
    if device.type != "cuda":
        return Choice("eager", "matrix products fill the time there and compiling takes longer than many steps")
    no_triton = triton_problem(device) or _triton_misfit(embedding_dim, block_size)
    if no_triton is None:
        return Choice("triton", f"fused kernels fit D = {embedding_dim} and blocks of {block_size}")
    no_compiler = compiler_problem(device)
    if no_compiler is None:
        return Choice("compiled", f"not triton: {no_triton}")
    return Choice("eager", f"not triton: {no_triton}; not compiled: {no_compiler}")


def _triton_misfit(embedding_dim: int, block_size: int) -> str | None:
    """Why sizes are outside the range of Triton's kernels."""
    from gcahng.graph.kernels.triton_messages import LARGEST_BLOCK

    if embedding_dim > LARGEST_DIM:
        return f"embeddings may have {LARGEST_DIM} channels there: got {embedding_dim}"
    if block_size > LARGEST_BLOCK:
        return f"blocks may have {LARGEST_BLOCK} nodes there: got {block_size}"
    return None


@cache
def _announce(choice: Choice, device_type: str) -> None:
    log.info("Graph backend on %s: %s (%s).", device_type, choice.name, choice.reason)


def make_kernels(name: str, device: torch.device) -> EagerKernels:
    """The inner loops of a backend.

    Args:
        name: "triton", "compiled" or "eager".
        device: Where they will run.
    """
    if name == "compiled":
        return CompiledKernels()
    if name == "triton":
        # On the CPU the kernels are interpreted: what is left stays plain.
        return FusedKernels() if device.type == "cuda" else TritonKernels()
    return CpuKernels() if device.type == "cpu" else EagerKernels()
