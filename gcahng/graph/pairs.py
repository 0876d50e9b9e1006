"""Unordered pairs of node blocks: the shape in which the edge stage does its work.

Without dropout that tells the directions apart, e_ij = e_ji at every layer, so half of the B² edges suffice. The B
nodes are cut into blocks of b; a *block pair* (I <= J) is the b x b edges between two blocks. Gathers then become
broadcasts and node sums plain sums. Diagonal pairs (I = J) hold all b² ordered edges of the block.

A plan lists the block pairs of one process. Sums over all edges are partial sums over the listed pairs that the
caller adds up over the processes (the `reduce` argument of the graph network).

Shapes: n block pairs, b nodes per block, D channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Edges per chunk: the 4D-wide hidden layer of 1024 edges at D = 512 is 8 MB in float32, which stays in cache.
EDGES_PER_CHUNK = 1024


@dataclass(frozen=True)
class PairChunk:
    """Some block pairs that are computed together, all diagonal or none.

    Attributes:
        first, second: (n,) int64 block numbers, first <= second.
        diagonal: True if first == second throughout.
    """

    first: Tensor
    second: Tensor
    diagonal: bool


@dataclass(frozen=True)
class PairPlan:
    """Node blocks and the block pairs of one process.

    Attributes:
        batch_size: B.
        block_size: b.
        order: (num_blocks * b,) int64 sample number at each block position; padding repeats sample 0.
        valid: (num_blocks * b,) bool, False at padding; None if there is no padding.
        chunks: The block pairs.
    """

    batch_size: int
    block_size: int
    order: Tensor
    valid: Tensor | None
    chunks: tuple[PairChunk, ...]

    @property
    def num_blocks(self) -> int:
        return self.order.numel() // self.block_size

    def blocks(self, x: Tensor) -> Tensor:
        """(B, ...) per-sample values as (num_blocks, b, ...)."""
        return x[self.order].view(self.num_blocks, self.block_size, *x.shape[1:])

    def valid_blocks(self, dtype: torch.dtype) -> Tensor | None:
        """(num_blocks, b) ones, zero at padding; None if there is no padding."""
        return None if self.valid is None else self.valid.to(dtype).view(self.num_blocks, self.block_size)

    def samples(self, positions: Tensor) -> Tensor:
        """(num_blocks, b, ...) sums per block position as (B, ...) sums per sample; padding is left out."""
        flat = positions.reshape(self.order.numel(), *positions.shape[2:])
        order = self.order
        if self.valid is not None:
            flat, order = flat[self.valid], order[self.valid]
        return flat.new_zeros(self.batch_size, *flat.shape[1:]).index_copy(0, order, flat)

    def edge_total(self, chunk: PairChunk, edges: Tensor) -> Tensor:
        """Sum over the ordered edges that a chunk's (n, b, b, D) symmetric values stand for: (D,)."""
        count = 1.0 if chunk.diagonal else 2.0
        valid = self.valid_blocks(edges.dtype)
        if valid is not None:
            edges = edges * (valid[chunk.first][:, :, None] * valid[chunk.second][:, None, :])[..., None]
        return count * edges.sum((0, 1, 2))

    def sum_to_nodes(self, chunk: PairChunk, edges: Tensor, into: Tensor) -> Tensor:
        """Add every ordered edge (i, j) of the chunk to node i.

        Args:
            edges: (n, b, b, ...) symmetric edge values.
            into: (num_blocks, b, ...) sums so far.
        """
        valid = self.valid_blocks(edges.dtype)
        extra = (1,) * (edges.dim() - 3)
        by_first, by_second = edges, edges
        if valid is not None:
            by_first = edges * valid[chunk.second].view(-1, 1, self.block_size, *extra)
            by_second = edges * valid[chunk.first].view(-1, self.block_size, 1, *extra)
        into = into.index_add(0, chunk.first, by_first.sum(2))
        return into if chunk.diagonal else into.index_add(0, chunk.second, by_second.sum(1))

    def ordered(self) -> Iterator[tuple[int, bool]]:
        """(chunk number, swapped): each chunk as anchors = first blocks, off-diagonal ones also the other way."""
        for number, chunk in enumerate(self.chunks):
            yield number, False
            if not chunk.diagonal:
                yield number, True


def block_classes(num_classes: int, num_samples: int) -> int:
    """Classes per node block: the number that makes the edge stage cheapest.

    Counts the edges computed (diagonal blocks hold each pair twice, padded classes are wasted) and charges the
    per-block gathers and sums as two more edges per block row.
    """

    def cost(classes: int) -> float:
        b = classes * num_samples
        blocks = -(-num_classes // classes)
        return blocks * (blocks + 1) / 2 * b * (b + 2)

    return min(range(1, min(num_classes, 32) + 1), key=cost)


def pair_plan(
    order: Tensor,
    block_size: int,
    *,
    share: tuple[int, int] = (0, 1),
    edges_per_chunk: int = EDGES_PER_CHUNK,
) -> PairPlan:
    """Cut the samples, taken in `order`, into blocks and list the block pairs of one process.

    Args:
        order: (B,) int64 permutation of the samples; class-major for generation, where a block must hold whole
            classes.
        block_size: b; the last block is padded.
        share: (process, number of processes): every process takes each n-th of the diagonal and of the other pairs,
            so that the numbers of pairs differ by one at most.
        edges_per_chunk: Bound on n * b * b of a chunk (at least one block pair).
    """
    batch_size = order.numel()
    num_blocks = -(-batch_size // block_size)
    padding = num_blocks * block_size - batch_size
    valid = None
    if padding:
        valid = torch.arange(num_blocks * block_size, device=order.device) < batch_size
        order = torch.cat([order, order[:1].expand(padding)])
    rank, ranks = share
    first, second = torch.triu_indices(num_blocks, num_blocks, offset=1, device=order.device)[:, rank::ranks]
    # Dealt to the processes in the opposite order, so that who has one off-diagonal pair more is not who has one
    # diagonal pair more.
    diagonal = torch.arange(num_blocks, device=order.device)[ranks - 1 - rank :: ranks]
    per_chunk = max(1, edges_per_chunk // block_size**2)
    chunks = [PairChunk(d, d, True) for d in diagonal.split(per_chunk) if d.numel()]
    pieces = zip(first.split(per_chunk), second.split(per_chunk), strict=True)
    chunks += [PairChunk(i, j, False) for i, j in pieces if i.numel()]
    if not chunks:
        # More processes than pairs: an empty chunk, whose sums are zeros of the right shape.
        chunks = [PairChunk(diagonal, diagonal, True)]
    return PairPlan(batch_size, block_size, order, valid, tuple(chunks))
