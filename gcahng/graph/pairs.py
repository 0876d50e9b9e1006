"""Unordered pairs of node blocks: the shape in which the edge stage does its work.

Where nothing tells the directions apart, e_ij = e_ji at every layer, so half of the B² edges suffice. The B nodes are
cut into blocks of b; a *block pair* (I <= J) is the b x b edges between two blocks. Gathers then become broadcasts and
node sums plain sums. Diagonal pairs (I = J) hold all b² ordered edges of the block.

A plan lists the block pairs of one process, in chunks that are computed together. Edge values of all chunks lie in one
*edge buffer*, (rows, D), chunk after chunk. Sums over all edges are partial sums over the listed pairs that the caller
adds up over the processes (the `reduce` argument of the graph network). A plan need not list every pair: then the
graph is sparse, and every sum and mean is over the edges listed by all processes together.

Shapes: n block pairs, b nodes per block, D channels.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gcahng.graph.block_sums import add_blocks

# Edges per chunk. CPU: the 4D-wide hidden layer of 1536 edges at D = 512 is 12 MB in float32, which stays in cache.
EDGES_PER_CHUNK = {"cpu": 1536}
EDGES_PER_CHUNK_ELSEWHERE = 8192
# CUDA: nodes per block, so that gathers and node sums are small beside the edges.
BLOCK_ELSEWHERE = 16
# What gathers and sums cost per block row, in edges. CPU: measured; elsewhere assumed, and used for several processes.
NODE_COST = 0.25
NODE_COST_ELSEWHERE = 1.0
# CUDA: what a product on tiles of a power of two of nodes costs, in edges: 2 of the 41 products of a step (L = 1).
TILE_COST = 0.05


@dataclass(frozen=True)
class PairChunk:
    """Some block pairs that are computed together.

    Attributes:
        first, second: (n,) int64 block numbers.
        block_size: b.
        start: Row of the edge buffer where the chunk begins; row start + (k b + i) b + j holds the edge of anchor i of
            block first[k] and node j of block second[k].
        mirrored: Each row stands for the reverse edge as well. Diagonal chunks are not mirrored.
    """

    first: Tensor
    second: Tensor
    block_size: int
    start: int
    mirrored: bool

    @property
    def num_rows(self) -> int:
        return self.first.numel() * self.block_size**2

    @property
    def rows(self) -> slice:
        """Its rows of the edge buffer."""
        return slice(self.start, self.start + self.num_rows)

    def of(self, buffer: Tensor) -> Tensor:
        """Its rows as (n, b, b, ...), a view."""
        return self.of_rows(buffer[self.rows])

    def of_rows(self, values: Tensor) -> Tensor:
        """(R, ...) values of its rows as (n, b, b, ...), a view."""
        return values.view(-1, self.block_size, self.block_size, *values.shape[1:])


@dataclass(frozen=True)
class PairPlan:
    """Node blocks and the block pairs of one process.

    Attributes:
        batch_size: B.
        block_size: b.
        order: (num_blocks * b,) int64 sample number at each block position; padding repeats sample 0.
        valid: (num_blocks * b,) bool, False at padding; None if there is no padding.
        chunks: The block pairs.
        share: (process, number of processes).
        edge_count: Ordered edges of all processes together; B² for a dense graph.
        degree: (B,) edges of each node as an anchor, its own included; None for B of each.
    """

    batch_size: int
    block_size: int
    order: Tensor
    valid: Tensor | None
    chunks: tuple[PairChunk, ...]
    share: tuple[int, int]
    edge_count: int
    degree: Tensor | None = None

    @property
    def num_blocks(self) -> int:
        return self.order.numel() // self.block_size

    @property
    def num_rows(self) -> int:
        """Rows of the edge buffer."""
        return sum(chunk.num_rows for chunk in self.chunks)

    @property
    def dense(self) -> bool:
        """Whether all processes together list every pair."""
        return self.degree is None

    def positions(self, x: Tensor) -> Tensor:
        """(B, ...) per-sample values by block position: (num_blocks * b, ...)."""
        return x[self.order]

    def samples(self, positions: Tensor) -> Tensor:
        """(num_blocks * b, ...) sums per block position as (B, ...) sums per sample; padding is left out."""
        flat, order = positions, self.order
        if self.valid is not None:
            # Padding stands at the end.
            flat, order = flat[: self.batch_size], order[: self.batch_size]
        return flat.new_zeros(self.batch_size, *flat.shape[1:]).index_copy(0, order, flat)

    def valid_ends(self, chunk: PairChunk, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(n, b) ones for the chunk's first and second nodes, zero at padding; None if there is no padding."""
        if self.valid is None:
            return None
        return ends(self.valid.to(dtype), chunk)


def ends(positions: Tensor, chunk: PairChunk) -> tuple[Tensor, Tensor]:
    """Per-position values (num_positions, ...) of the chunk's first and second nodes: two (n, b, ...)."""
    blocks = positions.view(-1, chunk.block_size, *positions.shape[1:])
    # Indexing with the numbers takes four times as long on CPU.
    return blocks.index_select(0, chunk.first), blocks.index_select(0, chunk.second)


def add_ends(into: Tensor, chunk: PairChunk, first: Tensor | None, second: Tensor | None) -> None:
    """Add (n, b, ...) values of first and second nodes to per-position sums (num_positions, ...), in place."""
    blocks = into.view(-1, chunk.block_size, *into.shape[1:])
    if first is not None:
        add_blocks(blocks, chunk.first, first)
    if second is not None:
        add_blocks(blocks, chunk.second, second)


def block_classes(num_classes: int, num_samples: int, device_type: str = "cpu", ranks: int = 1) -> int:
    """Classes per node block: the number that makes the edge stage of the fullest process cheapest.

    Counts the edges computed (diagonal blocks hold each pair twice, padded classes are wasted, block pairs are dealt
    out whole) and charges the per-block gathers and sums as a share of an edge per block row. Smaller blocks can be
    dealt out more evenly.

    Args:
        num_classes, num_samples: P and K.
        device_type: Where the edges are computed.
        ranks: Number of processes; all get the same answer.
    """
    on_cpu = device_type == "cpu"
    largest = max(1, min(num_classes, 32 if on_cpu else BLOCK_ELSEWHERE // num_samples))
    if ranks == 1 and not on_cpu:
        return largest

    def cost(classes: int) -> float:
        b = classes * num_samples
        blocks = -(-num_classes // classes)
        pairs = -(-(blocks * (blocks + 1) // 2) // ranks)
        if on_cpu:
            return pairs * b * (b + NODE_COST)
        tile = 1 << (b - 1).bit_length()
        return pairs * (b * (b + NODE_COST_ELSEWHERE) + TILE_COST * tile**2)

    return min(range(1, largest + 1), key=cost)


def pair_plan(
    order: Tensor,
    block_size: int,
    *,
    share: tuple[int, int] = (0, 1),
    edges_per_chunk: int | None = None,
) -> PairPlan:
    """Cut the samples, taken in `order`, into blocks and list the block pairs of one process.

    Args:
        order: (B,) int64 permutation of the samples; class-major for generation, where a block must hold whole
            classes.
        block_size: b; the last block is padded.
        share: (process, number of processes): every process takes each n-th of the diagonal and of the other pairs,
            so that the numbers of pairs differ by one at most.
        edges_per_chunk: Bound on n * b * b of a chunk (at least one block pair); by default what suits the device.
    """
    batch_size = order.numel()
    num_blocks = -(-batch_size // block_size)
    rank, ranks = share
    first, second = torch.triu_indices(num_blocks, num_blocks, offset=1, device=order.device)[:, rank::ranks]
    # Dealt to the processes in the opposite order, so that who has one off-diagonal pair more is not who has one
    # diagonal pair more.
    diagonal = torch.arange(num_blocks, device=order.device)[ranks - 1 - rank :: ranks]
    chunks = chunked(diagonal, first, second, block_size, edges_per_chunk)
    order, valid = padded(order, block_size)
    return PairPlan(batch_size, block_size, order, valid, chunks, share, batch_size**2)


def padded(order: Tensor, block_size: int) -> tuple[Tensor, Tensor | None]:
    """`order` filled up to whole blocks with its first sample, and which positions are no padding."""
    size = order.numel()
    padding = -size % block_size
    if not padding:
        return order, None
    valid = torch.arange(size + padding, device=order.device) < size
    return torch.cat([order, order[:1].expand(padding)]), valid


def chunked(
    diagonal: Tensor, first: Tensor, second: Tensor, block_size: int, edges_per_chunk: int | None = None
) -> tuple[PairChunk, ...]:
    """Diagonal blocks and pairs of different blocks as chunks.

    Args:
        diagonal: (d,) int64 block numbers.
        first, second: (n,) int64 block numbers of each other pair.
        block_size: b.
        edges_per_chunk: As in `pair_plan`.
    """
    if edges_per_chunk is None:
        edges_per_chunk = EDGES_PER_CHUNK.get(diagonal.device.type, EDGES_PER_CHUNK_ELSEWHERE)
    per_chunk = max(1, edges_per_chunk // block_size**2)
    pieces = [(d, d, False) for d in diagonal.split(per_chunk) if d.numel()]
    pairs = zip(first.split(per_chunk), second.split(per_chunk), strict=True)
    pieces += [(i, j, True) for i, j in pairs if i.numel()]
    if not pieces:
        # More processes than pairs: an empty chunk, whose sums are zeros of the right shape.
        pieces = [(diagonal, diagonal, False)]
    chunks, start = [], 0
    for i, j, mirrored in pieces:
        chunks.append(PairChunk(i, j, block_size, start, mirrored))
        start += chunks[-1].num_rows
    return tuple(chunks)


@lru_cache(maxsize=16)
def class_major_plan(
    num_classes: int, num_samples: int, device: torch.device | str = "cpu", share: tuple[int, int] = (0, 1)
) -> PairPlan:
    """A plan for a group-major batch whose blocks hold whole classes, so that fusion stays inside a block.

    Plans are kept: the next step of the same shape takes the same one.
    """
    device = torch.device(device)
    # A plan first made in inference mode must serve training later.
    with torch.inference_mode(False):
        order = torch.arange(num_classes * num_samples, device=device).view(num_samples, num_classes).T.reshape(-1)
        classes = block_classes(num_classes, num_samples, device.type, share[1])
        return pair_plan(order, classes * num_samples, share=share)
