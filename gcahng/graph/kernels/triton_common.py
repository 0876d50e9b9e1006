"""What the Triton kernels share: GELU, tile sizes, the interpreter's needs. Imports triton.

Kernels are launched without a custom operator around them: torch.compile sees such launches as they are, and each
operator call would add some ten microseconds of dispatch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton decides at the decorator whether a kernel is interpreted on the CPU (its TRITON_INTERPRET setting).
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Multiply-adds in one instruction, whatever the default of the Triton version is.
FUSED_ARITHMETIC = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tiles:
    """How a matrix product is cut up.

    Attributes:
        rows, columns: Of the result, per program.
        inner: Of the summed dimension, per step.
        warps, stages: Of a program.
        registers: Bound per thread; None leaves it to the compiler.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Of the compiler."""
        options = {"num_warps": self.warps, "num_stages": self.stages, **FUSED_ARITHMETIC}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def operand(x: Tensor, low: torch.dtype | None) -> Tensor:
    """x as a kernel takes it: contiguous, in `low` where that is set."""
    return (x if low is None else x.to(low)).contiguous()


@triton.jit
def normal_cdf(x):  # type: ignore[no-untyped-def]
    """Share of the standard normal distribution below x (float32)."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def gelu(x):  # type: ignore[no-untyped-def]
    """GELU with erf, as torch has it by default (float32)."""
    return x * normal_cdf(x)


@triton.jit
def gelu_and_slope(x):  # type: ignore[no-untyped-def]
    """GELU and its derivative (float32)."""
    below = normal_cdf(x)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return x * below, below + x * density


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    pointer,
    row,
    column,
    known,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The values of some rows and columns of a matrix; zero where not `known`, which WHOLE says to be everywhere."""
    place = pointer + row[:, None] * ROW_STEP + column[None, :] * COLUMN_STEP
    return tl.load(place) if WHOLE else tl.load(place, mask=known, other=0.0)


@triton.jit
def product(left, right, total, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + left right, summed in float32. float32 factors are not rounded to TF32."""
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bfloat16.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")
