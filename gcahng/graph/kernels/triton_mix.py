"""The edge after its attention, LayerNorm(GELU(e_ij + w_i v_i + w_j v_j)), in one pass over the channels.

First-layer edges e_ij = x_i * x_j are made on the way and never stored. One program computes the edges from one first
node to some second nodes, so that the first node's vectors are read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.graph.kernels.eager import NormWeights
from gcahng.graph.kernels.triton_common import FUSED_ARITHMETIC, gelu, power_of_two

# Channels times second nodes of one program: what its registers hold.
VALUES_PER_PROGRAM = 8192
SECONDS_PER_PROGRAM = 16


@triton.jit
def mix_kernel(  # type: ignore[no-untyped-def]
    first_ptr,  # (n b, D) x of first nodes, if PRODUCT
    second_ptr,  # (n b, D) x of second nodes, if PRODUCT
    edges_ptr,  # (n b b, D), if not PRODUCT
    first_value_ptr,  # (n b, D)
    second_value_ptr,  # (n b, D)
    first_weight_ptr,  # (n b b,)
    second_weight_ptr,  # (n b b,)
    norm_weight_ptr,  # (D,)
    norm_bias_ptr,  # (D,)
    out_ptr,  # (n b b, D)
    eps,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    SECONDS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRODUCT: tl.constexpr,
    GELU: tl.constexpr,
):
    """Edges from one first node to SECONDS second nodes, all channels."""
    steps: tl.constexpr = (SIZE + SECONDS - 1) // SECONDS
    anchor = (tl.program_id(0) // steps).to(tl.int64)
    j = tl.program_id(0) % steps * SECONDS + tl.arange(0, SECONDS)
    channel = tl.arange(0, CHANNELS)
    in_channel = channel < DIM
    real = (j < SIZE)[:, None] & in_channel[None, :]
    inside = j[:, None] * DIM + channel[None, :]
    at_second = anchor // SIZE * SIZE * DIM + inside
    row = anchor * SIZE + j

    first_weight = tl.load(first_weight_ptr + row, mask=j < SIZE, other=0.0).to(tl.float32)
    second_weight = tl.load(second_weight_ptr + row, mask=j < SIZE, other=0.0).to(tl.float32)
    if PRODUCT:
        first = tl.load(first_ptr + anchor * DIM + channel, mask=in_channel, other=0.0).to(tl.float32)
        x = first[None, :] * tl.load(second_ptr + at_second, mask=real, other=0.0).to(tl.float32)
    else:
        x = tl.load(edges_ptr + anchor * SIZE * DIM + inside, mask=real, other=0.0).to(tl.float32)
    first_value = tl.load(first_value_ptr + anchor * DIM + channel, mask=in_channel, other=0.0).to(tl.float32)
    x += first_weight[:, None] * first_value[None, :]
    x += second_weight[:, None] * tl.load(second_value_ptr + at_second, mask=real, other=0.0).to(tl.float32)

    if GELU:
        x = gelu(x)
    mean = tl.sum(x, 1) / DIM
    centred = tl.where(in_channel[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DIM + eps)
    weight = tl.load(norm_weight_ptr + channel, mask=in_channel, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias_ptr + channel, mask=in_channel, other=0.0).to(tl.float32)
    x = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + anchor * SIZE * DIM + inside, x.to(out_ptr.dtype.element_ty), mask=real)


def mix_constants(size: int, dim: int, *, product: bool, gelu: bool) -> dict[str, int | bool]:
    """Compile-time arguments of `mix_kernel` for blocks of `size` nodes and `dim` channels."""
    channels = power_of_two(dim)
    seconds = min(power_of_two(size), SECONDS_PER_PROGRAM, max(1, VALUES_PER_PROGRAM // channels))
    return {
        "SIZE": size,
        "DIM": dim,
        "SECONDS": seconds,
        "CHANNELS": channels,
        "PRODUCT": product,
        "GELU": gelu,
        "num_warps": min(8, max(1, seconds * channels // 512)),
        **FUSED_ARITHMETIC,
    }


def mix(
    edges: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
    values: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    norm: NormWeights,
) -> Tensor:
    """`EagerKernels.mix` of `edges`, or `EagerKernels.product_mix` of `factors`; at most 8192 channels."""
    first, second = values[0].contiguous(), values[1].contiguous()
    n, size, dim = first.shape
    # Pointers that the kernel does not follow still need a tensor.
    left, right = (first, second) if factors is None else (factors[0].contiguous(), factors[1].contiguous())
    out = torch.empty((n, size, size, dim), dtype=first.dtype, device=first.device)
    constants = mix_constants(size, dim, product=edges is None, gelu=norm.gelu)
    steps = triton.cdiv(size, constants["SECONDS"])
    mix_kernel[(n * size * steps,)](
        left,
        right,
        out if edges is None else edges.contiguous(),
        first,
        second,
        weights[0].contiguous(),
        weights[1].contiguous(),
        norm.weight,
        norm.bias,
        out,
        norm.eps,
        **constants,
    )
    return out
