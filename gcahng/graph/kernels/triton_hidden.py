"""The wide half of the edge feed-forward part: h = GELU(x W1ᵀ + b1) and the statistics of its rows, in one product.

The product's epilogue applies GELU and leaves two sums per row and column tile; a second small kernel turns them into
mean and 1 / standard deviation. Linear(x) itself is never written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.graph.kernels.eager import HiddenWeights
from gcahng.graph.kernels.triton_common import FUSED_ARITHMETIC, INTERPRETED, Tiles, gelu, load_tile, operand, product

TILES = Tiles(rows=128, columns=128, inner=64, warps=8, stages=3)
WIDE_TILES = Tiles(rows=64, columns=32, inner=32, warps=8, stages=2)
ROWS_PER_PROGRAM = 256


@triton.jit
def hidden_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (R, D)
    weight_ptr,  # (F, D)
    bias_ptr,  # (F,)
    h_ptr,  # (R, F)
    partial_ptr,  # (2, column tiles, R): sums of h, then of its squares
    num_rows,  # R
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """ROWS by COLUMNS of h."""
    column_tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    column_tile = tl.program_id(0) % column_tiles
    start_row = tl.program_id(0) // column_tiles * ROWS
    row = tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    in_row = start_row + row < num_rows
    in_column = column < WIDTH
    # Rows past the end repeat the tile's first: nothing of them is stored, and loads need no mask.
    source = tl.where(in_row, row, 0)
    x_ptr += start_row.to(tl.int64) * DIM
    h_ptr += start_row.to(tl.int64) * WIDTH

    whole: tl.constexpr = DIM % INNER == 0 and WIDTH % COLUMNS == 0
    inner = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, DIM, INNER):
        channel = start + tl.arange(0, INNER)
        known = channel < DIM
        x = load_tile(x_ptr, source, channel, known[None, :], DIM, 1, whole)
        weight = load_tile(weight_ptr, channel, column, known[:, None] & in_column[None, :], 1, DIM, whole)
        inner = product(x, weight, inner, INTERPRETED)
    inner += tl.load(bias_ptr + column, mask=in_column, other=0.0).to(tl.float32)[None, :]

    # Statistics of the values as they are stored.
    h = gelu(inner).to(h_ptr.dtype.element_ty)
    known = in_row[:, None] & in_column[None, :]
    tl.store(h_ptr + source[:, None] * WIDTH + column[None, :], h, mask=known)
    # Columns past the end are GELU(0) = 0.
    h = h.to(tl.float32)
    place = partial_ptr + column_tile * num_rows + start_row + row
    tl.store(place, tl.sum(h, 1), mask=in_row)
    tl.store(place + column_tiles * num_rows, tl.sum(h * h, 1), mask=in_row)


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,  # (2, PARTS, R)
    mean_ptr,  # (R,)
    rstd_ptr,  # (R,)
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mean and 1 / standard deviation of ROWS rows from PARTS partial sums each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_row = row < num_rows
    total = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for part in range(PARTS):
        total += tl.load(partial_ptr + part * num_rows + row, mask=in_row, other=0.0)
        squares += tl.load(partial_ptr + (PARTS + part) * num_rows + row, mask=in_row, other=0.0)
    mean = total / WIDTH
    variance = tl.maximum(squares / WIDTH - mean * mean, 0.0)
    tl.store(mean_ptr + row, mean, mask=in_row)
    tl.store(rstd_ptr + row, tl.rsqrt(variance + eps), mask=in_row)


def hidden_constants(dim: int, width: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Compile-time arguments of `hidden_kernel` for D = dim, F = width, operands in `dtype`."""
    tiles = WIDE_TILES if dtype.itemsize > 2 else TILES
    return {
        "DIM": dim,
        "WIDTH": width,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "INNER": tiles.inner,
        "INTERPRETED": INTERPRETED,
        **tiles.options,
    }


def statistics_constants(width: int, parts: int) -> dict[str, int]:
    """Compile-time arguments of `statistics_kernel` for F = width in so many column tiles."""
    return {"WIDTH": width, "PARTS": parts, "ROWS": ROWS_PER_PROGRAM, "num_warps": 4, **FUSED_ARITHMETIC}


def hidden(x: Tensor, weights: HiddenWeights, low: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """h (R, F), mean (R, 1) and rstd (R, 1), as `EagerKernels.hidden` has them."""
    matrix, lowered = operand(weights.weight_in, low), operand(x, low)
    num_rows, dim = x.shape
    width = matrix.shape[0]
    constants = hidden_constants(dim, width, matrix.dtype)
    row_tiles = triton.cdiv(num_rows, constants["ROWS"])
    parts = triton.cdiv(width, constants["COLUMNS"])
    h = torch.empty((num_rows, width), dtype=matrix.dtype, device=x.device)
    partial = torch.empty((2, parts, num_rows), dtype=torch.float32, device=x.device)
    hidden_kernel[(row_tiles * parts,)](lowered, matrix, weights.bias_in, h, partial, num_rows, **constants)
    mean, rstd = torch.empty((2, num_rows, 1), dtype=x.dtype, device=x.device)
    statistics_kernel[(triton.cdiv(num_rows, ROWS_PER_PROGRAM),)](
        partial, mean, rstd, num_rows, weights.eps, **statistics_constants(width, parts)
    )
    return h, mean, rstd
