"""Backward through the wide hidden layer: two products over the same tile, then everything element-wise at once.

Linear(x) is computed again beside the gradient of h, so that neither is ever written: what comes out is the gradient
of Linear(x), h itself for the weight gradient of the next matrix, and the column sums that are the bias gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.graph.kernels.eager import HiddenWeights
from gcahng.graph.kernels.triton_common import INTERPRETED, Tiles, gelu_and_slope, load_tile, operand, product

# Two sums per element: half as many rows as the forward pass. Two programs share a multiprocessor (128 registers per
# thread, 96 KB each), so that one's products run beside the other's epilogue.
TILES = Tiles(rows=64, columns=128, inner=64, warps=8, stages=2, registers=128)
WIDE_TILES = Tiles(rows=64, columns=32, inner=16, warps=8, stages=2)


@triton.jit
def hidden_backward_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (R, D)
    grad_ptr,  # (R, D)
    weight_in_ptr,  # (F, D)
    weight_out_ptr,  # (D, F)
    bias_ptr,  # (F,)
    factor_ptr,  # (R,)
    mean_ptr,  # (R,)
    grad_inner_ptr,  # (R, F)
    h_ptr,  # (R, F)
    column_sum_ptr,  # (row tiles, F)
    num_rows,  # R
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """ROWS by COLUMNS of h and of the gradient before it."""
    column_tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row_tile = tl.program_id(0) // column_tiles
    start_row = row_tile * ROWS
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    in_row = start_row + row < num_rows
    in_column = column < WIDTH
    # Rows past the end repeat the tile's first: nothing of them is stored, and loads need no mask.
    source = tl.where(in_row, row, 0)
    x_ptr += start_row.to(tl.int64) * DIM
    grad_ptr += start_row.to(tl.int64) * DIM
    h_ptr += start_row.to(tl.int64) * WIDTH
    grad_inner_ptr += start_row.to(tl.int64) * WIDTH

    whole: tl.constexpr = DIM % INNER == 0 and WIDTH % COLUMNS == 0
    inner = tl.zeros((ROWS, COLUMNS), tl.float32)
    grad_h = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, DIM, INNER):
        channel = start + tl.arange(0, INNER)
        known = channel < DIM
        both = known[:, None] & in_column[None, :]
        x = load_tile(x_ptr, source, channel, known[None, :], DIM, 1, whole)
        inner = product(x, load_tile(weight_in_ptr, channel, column, both, 1, DIM, whole), inner, INTERPRETED)
        grad = load_tile(grad_ptr, source, channel, known[None, :], DIM, 1, whole)
        grad_h = product(grad, load_tile(weight_out_ptr, channel, column, both, WIDTH, 1, whole), grad_h, INTERPRETED)
    inner += tl.load(bias_ptr + column, mask=in_column, other=0.0).to(tl.float32)[None, :]

    factor = tl.load(factor_ptr + start_row + source).to(tl.float32)
    mean = tl.load(mean_ptr + start_row + source).to(tl.float32)
    h, slope = gelu_and_slope(inner)
    h = h.to(h_ptr.dtype.element_ty)
    grad_h -= factor[:, None] * (h.to(tl.float32) - mean[:, None])
    grad_inner = (grad_h * slope).to(grad_inner_ptr.dtype.element_ty)

    place = source[:, None] * WIDTH + column[None, :]
    known = in_row[:, None] & in_column[None, :]
    tl.store(h_ptr + place, h, mask=known)
    tl.store(grad_inner_ptr + place, grad_inner, mask=known)
    total = tl.sum(tl.where(in_row[:, None], grad_inner.to(tl.float32), 0.0), 0)
    tl.store(column_sum_ptr + row_tile * WIDTH + column, total, mask=in_column)


def hidden_backward_constants(dim: int, width: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Compile-time arguments of `hidden_backward_kernel` for D = dim, F = width, operands in `dtype`."""
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


def hidden_backward(
    x: Tensor, grad: Tensor, row: Tensor, mean: Tensor, weights: HiddenWeights, low: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of Linear(x), h, gradient of the bias, as `EagerKernels.hidden_backward` has them without `inner`."""
    weight_in, weight_out = operand(weights.weight_in, low), operand(weights.weight_out, low)
    num_rows, dim = x.shape
    width = weight_in.shape[0]
    constants = hidden_backward_constants(dim, width, weight_in.dtype)
    row_tiles = triton.cdiv(num_rows, constants["ROWS"])
    grad_inner, h = torch.empty((2, num_rows, width), dtype=weight_in.dtype, device=x.device)
    sums = torch.empty((row_tiles, width), dtype=x.dtype, device=x.device)
    hidden_backward_kernel[(row_tiles * triton.cdiv(width, constants["COLUMNS"]),)](
        operand(x, low),
        operand(grad, low),
        weight_in,
        weight_out,
        weights.bias_in,
        row.contiguous(),
        mean.contiguous(),
        grad_inner,
        h,
        sums,
        num_rows,
        **constants,
    )
    return grad_inner, h, sums.sum(0)
