"""Sums of first-layer edge messages, GELU(W (x_i * x_j) + b), over the nodes at the other end.

The edges are made while the product W e is computed, and the messages are summed before they are written: nothing
edge-sized is in memory. One program computes some columns of the messages between some first and all second nodes of
its block pairs. Sums at first nodes are then complete; those at second nodes are partial, one part per set of first
nodes, and added up by torch: no atomics, so every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.graph.kernels.triton_common import INTERPRETED, Tiles, gelu, load_tile, operand, power_of_two, product

# Rows of a tile are edges.
TILES = Tiles(rows=128, columns=128, inner=64, warps=8, stages=3)
WIDE_TILES = Tiles(rows=128, columns=32, inner=32, warps=8, stages=2)
# A tile holds all second nodes of a block.
LARGEST_BLOCK = TILES.rows


@triton.jit
def block_nodes(  # type: ignore[no-untyped-def]
    first_pair, first_node, num_pairs, SIZE: tl.constexpr, PAIRS: tl.constexpr, NODES: tl.constexpr
):
    """Whether there is a node at each of PAIRS times NODES places, and its number among the chunk's n b; else 0."""
    place = tl.arange(0, PAIRS * NODES)
    pair = first_pair + place // NODES
    node = first_node + place % NODES
    real = (pair < num_pairs) & (node < SIZE)
    return real, tl.where(real, pair * SIZE + node, 0).to(tl.int64)


@triton.jit
def edge_factors(mask_ptr, row, is_edge, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """What each edge counts in a sum; nothing where there is no edge."""
    return tl.load(mask_ptr + row, mask=is_edge, other=0.0).to(tl.float32) if MASKED else is_edge.to(tl.float32)


@triton.jit
def product_messages_kernel(  # type: ignore[no-untyped-def]
    first_ptr,  # (n b, D) x of first nodes
    second_ptr,  # (n b, D) x of second nodes
    weight_ptr,  # (C, D)
    bias_ptr,  # (C,)
    first_mask_ptr,  # (n b b,), if FIRST_MASK
    second_mask_ptr,  # (n b b,), if SECOND_MASK
    first_sum_ptr,  # (n b, C)
    second_sum_ptr,  # (parts, n b, C), if MIRRORED
    num_pairs,  # n
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    OUT: tl.constexpr,
    PAIRS: tl.constexpr,
    FIRSTS: tl.constexpr,
    SECONDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    MIRRORED: tl.constexpr,
    FIRST_MASK: tl.constexpr,
    SECOND_MASK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """COLUMNS channels of the messages of PAIRS block pairs, FIRSTS by SECONDS nodes of each."""
    column_tiles: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    parts: tl.constexpr = (SIZE + FIRSTS - 1) // FIRSTS
    edges: tl.constexpr = PAIRS * FIRSTS * SECONDS
    tile = tl.program_id(0) // column_tiles
    part = tile % parts
    pair = tile // parts * PAIRS
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    in_column = column < OUT
    is_first, first_node = block_nodes(pair, part * FIRSTS, num_pairs, SIZE, PAIRS, FIRSTS)
    is_second, second_node = block_nodes(pair, 0, num_pairs, SIZE, PAIRS, SECONDS)

    whole: tl.constexpr = DIM % INNER == 0 and OUT % COLUMNS == 0
    inner = tl.zeros((edges, COLUMNS), tl.float32)
    for start in range(0, DIM, INNER):
        # A node's vector is read once and spread over its edges: reads edge by edge would cost more than the product.
        channel = start + tl.arange(0, INNER)
        known = channel < DIM
        first = load_tile(first_ptr, first_node, channel, known[None, :], DIM, 1, whole)
        second = load_tile(second_ptr, second_node, channel, known[None, :], DIM, 1, whole)
        weight = load_tile(weight_ptr, channel, column, known[:, None] & in_column[None, :], 1, DIM, whole)
        edge = tl.reshape(first, (PAIRS, FIRSTS, 1, INNER)) * tl.reshape(second, (PAIRS, 1, SECONDS, INNER))
        inner = product(tl.reshape(edge.to(weight.dtype), (edges, INNER)), weight, inner, INTERPRETED)
    message = gelu(inner + tl.load(bias_ptr + column, mask=in_column, other=0.0).to(tl.float32)[None, :])

    is_edge = tl.reshape(is_first, (PAIRS, FIRSTS, 1)) & tl.reshape(is_second, (PAIRS, 1, SECONDS))
    row = tl.reshape(first_node * SIZE, (PAIRS, FIRSTS, 1)) + tl.reshape(second_node % SIZE, (PAIRS, 1, SECONDS))
    is_edge, row = tl.reshape(is_edge, (edges,)), tl.reshape(row, (edges,))
    factor = edge_factors(first_mask_ptr, row, is_edge, FIRST_MASK)
    total = tl.sum(tl.reshape(message * factor[:, None], (PAIRS * FIRSTS, SECONDS, COLUMNS)), 1)
    place = first_sum_ptr + first_node[:, None] * OUT + column[None, :]
    tl.store(place, total, mask=is_first[:, None] & in_column[None, :])
    if MIRRORED:
        factor = edge_factors(second_mask_ptr, row, is_edge, SECOND_MASK)
        total = tl.sum(tl.reshape(message * factor[:, None], (PAIRS, FIRSTS, SECONDS, COLUMNS)), 1)
        place = second_sum_ptr + (part.to(tl.int64) * num_pairs * SIZE + second_node)[:, None] * OUT + column[None, :]
        tl.store(place, tl.reshape(total, (PAIRS * SECONDS, COLUMNS)), mask=is_second[:, None] & in_column[None, :])


def message_constants(
    size: int, dim: int, out: int, dtype: torch.dtype, *, mirrored: bool, masks: tuple[bool, bool]
) -> dict[str, int | bool]:
    """Compile-time arguments of `product_messages_kernel`.

    Args:
        size: Nodes per block.
        dim, out: Channels of the edges and of the messages.
        dtype: Of the weight.
        mirrored: Whether second nodes get sums.
        masks: Which masks there are.
    """
    tiles = WIDE_TILES if dtype.itemsize > 2 else TILES
    seconds = power_of_two(size)
    firsts = min(seconds, tiles.rows // seconds)
    return {
        "SIZE": size,
        "DIM": dim,
        "OUT": out,
        "PAIRS": tiles.rows // (firsts * seconds),
        "FIRSTS": firsts,
        "SECONDS": seconds,
        "COLUMNS": tiles.columns,
        # Without blocks every edge has its own two vectors to read.
        "INNER": tiles.inner if size > 1 else tiles.inner // 2,
        "MIRRORED": mirrored,
        "FIRST_MASK": masks[0],
        "SECOND_MASK": masks[1] and mirrored,
        "INTERPRETED": INTERPRETED,
        **tiles.options,
    }


def product_messages(
    factors: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    low: torch.dtype | None,
    *,
    mirrored: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums at the first and second nodes, as `EagerKernels.product_messages` has them; at most 128 nodes per block."""
    first, second = factors[0].contiguous(), factors[1].contiguous()
    n, size, dim = first.shape
    weight = operand(weight, low)
    out = weight.shape[0]
    to_first, to_second = (None if mask is None else mask.contiguous() for mask in masks)
    constants = message_constants(
        size, dim, out, weight.dtype, mirrored=mirrored, masks=(to_first is not None, to_second is not None)
    )
    parts = triton.cdiv(size, constants["FIRSTS"])
    first_sum = torch.empty((n, size, out), dtype=first.dtype, device=first.device)
    # Pointers that the kernel does not follow still need a tensor.
    second_sum = first_sum.new_empty((parts, n, size, out)) if mirrored else first_sum
    grid = triton.cdiv(n, constants["PAIRS"]) * parts * triton.cdiv(out, constants["COLUMNS"])
    product_messages_kernel[(grid,)](
        first,
        second,
        weight,
        bias,
        bias if to_first is None else to_first,
        bias if to_second is None else to_second,
        first_sum,
        second_sum,
        n,
        **constants,
    )
    if not mirrored:
        return first_sum, None
    return first_sum, second_sum[0] if parts == 1 else second_sum.sum(0)
