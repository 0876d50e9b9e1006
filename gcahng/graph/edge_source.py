"""Where a layer's input edges come from: products of node vectors in the first layer, the edge buffer later.

A source gives the edges of one chunk at a time and takes their gradients one chunk at a time, so no layer ever holds
more edges than one chunk beside the stored buffer.

Shapes: n block pairs of b x b edges, D channels, rows of the edge buffer.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from gcahng.graph.kernels import EagerKernels, NormWeights
from gcahng.graph.pairs import PairChunk, add_ends, ends


class EdgeSource(Protocol):
    """Edges by chunk."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the edges are a function of, for autograd."""

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> "EdgeSource":
        """The same source on other tensors."""

    def values(self, chunk: PairChunk) -> Tensor:
        """The chunk's edges, (n, b, b, D)."""

    def gradient(self, needed: bool) -> "SourceGradient":
        """An accumulator of the gradient of `tensors`."""


class SourceGradient(Protocol):
    """Takes gradients of edges, gives gradients of a source's tensors."""

    needed: bool

    def add(self, chunk: PairChunk, grad: Tensor) -> None:
        """Take the gradient (n, b, b, D) of a chunk's edges; each chunk once."""

    def results(self) -> tuple[Tensor | None, ...]:
        """One per tensor of the source; None if none was needed."""


def bare(source: EdgeSource) -> EdgeSource:
    """The same source on empty tensors: what an operation may hold beside its saved tensors."""
    empty = source.with_tensors(tuple(t.new_empty(0) for t in source.tensors))
    return replace(empty, finished=None) if isinstance(empty, StoredEdges) else empty


@dataclass(frozen=True)
class ProductEdges:
    """First-layer edges x_i * x_j, channel by channel.

    Attributes:
        x: (num_positions, D) unit-length centred embeddings by block position.
    """

    x: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x,)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> "ProductEdges":
        return ProductEdges(*tensors)

    def factors(self, chunk: PairChunk) -> tuple[Tensor, Tensor]:
        """(n, b, D) vectors of the chunk's first and second nodes."""
        return ends(self.x, chunk)

    def values(self, chunk: PairChunk) -> Tensor:
        first, second = self.factors(chunk)
        return first[:, :, None] * second[:, None, :]

    def gradient(self, needed: bool) -> "_ProductGradient":
        return _ProductGradient(self, needed)


class _ProductGradient:
    def __init__(self, source: ProductEdges, needed: bool) -> None:
        self.needed = needed
        self._source = source
        self._sum = torch.zeros_like(source.x) if needed else None

    def add(self, chunk: PairChunk, grad: Tensor) -> None:
        if self._sum is None:
            return
        first, second = self._source.factors(chunk)
        by_first = (grad * second[:, None, :]).sum(2)
        by_second = (grad * first[:, :, None]).sum(1)
        add_ends(self._sum, chunk, by_first, by_second)

    def results(self) -> tuple[Tensor | None, ...]:
        return (self._sum,)


@dataclass(frozen=True)
class StoredEdges:
    """Edges of a later layer: norm(raw), the edge buffer holding raw = FFN(x) + x of the layer before.

    Attributes:
        raw: (rows, D), maybe in a lower dtype than the nodes.
        weight, bias: (D,) of the norm.
        gelu: Whether GELU comes before the LayerNorm.
        eps: Of the LayerNorm.
        kernels: Inner loops.
        finished: (rows, D) norm(raw) if the layer before had room for it; else it is computed again.
    """

    raw: Tensor
    weight: Tensor
    bias: Tensor
    gelu: bool
    eps: float
    kernels: EagerKernels
    finished: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.raw, self.weight, self.bias)

    @property
    def norm(self) -> NormWeights:
        return NormWeights(self.weight, self.bias, self.gelu, self.eps)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> "StoredEdges":
        raw, weight, bias = tensors
        return replace(self, raw=raw, weight=weight, bias=bias)

    def raw_values(self, chunk: PairChunk) -> Tensor:
        """(n, b, b, D) of the buffer in the nodes' dtype."""
        return chunk.of(self.raw).to(self.weight.dtype)

    def values(self, chunk: PairChunk) -> Tensor:
        if self.finished is not None:
            return chunk.of(self.finished).to(self.weight.dtype)
        return self.kernels.normalise(self.raw_values(chunk), self.norm)

    def gradient(self, needed: bool) -> "StoredGradient":
        return StoredGradient(self, needed)


class StoredGradient:
    """Gradients of `StoredEdges`; `into` lets them be written over another buffer."""

    def __init__(self, source: StoredEdges, needed: bool, into: Tensor | None = None) -> None:
        self.needed = needed
        self._source = source
        self._raw = self._weight = self._bias = None
        if needed:
            self._raw = torch.empty_like(source.raw) if into is None else into
            self._weight, self._bias = torch.zeros_like(source.weight), torch.zeros_like(source.bias)

    def add(self, chunk: PairChunk, grad: Tensor) -> None:
        if self._raw is None or self._weight is None or self._bias is None:
            return
        source = self._source
        raw, weight, bias = source.kernels.normalise_backward(source.raw_values(chunk), grad, source.norm)
        chunk.of(self._raw).copy_(raw)
        self._weight += weight
        self._bias += bias

    def results(self) -> tuple[Tensor | None, ...]:
        return (self._raw, self._weight, self._bias)
