"""The edge-to-node sum as one differentiable operation over chunks of pairs.

S_i = sum over j of GELU(Linear(e_ij)), over all j. Nothing edge-sized is kept but what fits into `keep_bytes`:
the rest is computed again in the backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcahng.graph.edge_layout import EdgeLayout
from gcahng.graph.edge_source import EdgeSource, ProductEdges, bare
from gcahng.graph.kernels import EagerKernels
from gcahng.graph.kernels.eager import column_sums, lowered
from gcahng.graph.pairs import add_ends, ends
from gcahng.graph.precision import without_autocast


@dataclass(frozen=True)
class EdgePass:
    """What the edge operations of one pass share.

    Attributes:
        layout: The rows of the edge buffer.
        kernels: Inner loops.
        low: Dtype of the operands of matrix products; None for the tensors' own.
        storage: Dtype of the edge buffer.
        keep_bytes: Per operation, how much it may keep for its backward pass beside its inputs.
    """

    layout: EdgeLayout
    kernels: EagerKernels
    low: torch.dtype | None
    storage: torch.dtype
    keep_bytes: int

    def keeps(self, width: int, like: Tensor, dtype: torch.dtype | None = None) -> bool:
        """Whether (rows, width) values fit into `keep_bytes`, of `dtype`, by default what matrix products give."""
        size = torch.empty((), dtype=dtype or self.low or like.dtype).element_size()
        return self.layout.num_rows * width * size <= self.keep_bytes


def edge_to_node_sums(source: EdgeSource, weight: Tensor, bias: Tensor, call: EdgePass) -> Tensor:
    """Partial sums over j of the messages of the ordered edges (i, j): (B, D).

    Args:
        source: Edges of the layer.
        weight, bias: (D, D) and (D,) of the Linear.
        call: The pass.
    """
    sums = _Messages.apply(call, source, torch.is_grad_enabled(), weight, bias, *source.tensors)
    return call.layout.plan.samples(sums)


class _Messages(torch.autograd.Function):
    """(num_positions, D) sums by block position."""

    @staticmethod
    def forward(
        ctx: Any, call: EdgePass, source: EdgeSource, keep: bool, weight: Tensor, bias: Tensor, *tensors: Tensor
    ) -> Tensor:
        source = source.with_tensors(tensors)
        layout = call.layout
        matrix = lowered(weight, call.low)
        sums = torch.zeros(layout.plan.order.numel(), weight.shape[0], dtype=weight.dtype, device=weight.device)
        keep = keep and call.keeps(weight.shape[0], weight)
        kept: list[Tensor | None] = []
        for part in layout.all_rows():
            chunk = part.chunk
            masks = layout.masks(part, weight.dtype)
            arguments = (matrix, bias, masks, call.low)
            if isinstance(source, ProductEdges):
                found = call.kernels.product_messages(source.factors(chunk), *arguments, mirrored=chunk.mirrored)
            else:
                found = call.kernels.messages(source.values(chunk), *arguments, mirrored=chunk.mirrored)
            inner, first, second = found
            add_ends(sums, chunk, first, second)
            kept.append(inner if keep else None)
        ctx.call, ctx.source = call, bare(source)
        # Saved as autograd saves: freed by the backward pass, kept by retain_graph.
        ctx.save_for_backward(weight, bias, *tensors, *kept)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        call: EdgePass = ctx.call
        weight, bias, *saved = ctx.saved_tensors
        width = len(ctx.source.tensors)
        source: EdgeSource = ctx.source.with_tensors(tuple(saved[:width]))
        collected = source.gradient(any(ctx.needs_input_grad[5:]))
        matrix = lowered(weight, call.low)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        grad = grad.contiguous()
        for part, inner in zip(call.layout.all_rows(), saved[width:], strict=True):
            chunk = part.chunk
            edges = source.values(chunk)
            at_first, at_second = ends(grad, chunk)
            grad_inner = call.kernels.messages_backward(
                edges,
                inner,
                matrix,
                bias,
                call.layout.masks(part, weight.dtype),
                call.low,
                (at_first, at_second if chunk.mirrored else None),
            )
            accumulate_product(grad_weight, grad_inner, lowered(edges.flatten(0, 2), call.low))
            grad_bias += column_sums(grad_inner, bias.dtype)
            if collected.needed:
                collected.add(chunk, (grad_inner @ matrix).to(edges.dtype).view(edges.shape))
        return None, None, None, grad_weight, grad_bias, *collected.results()


def accumulate_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += leftᵀ right, summed over the rows and added up in the dtype of `into`.

    Args:
        into: (P, Q).
        left, right: (R, P) and (R, Q), in one dtype.
    """
    if left.dtype == into.dtype:
        into.addmm_(left.t(), right)
    elif into.device.type == "cuda":
        # The product itself comes out in float32 there.
        into += torch.mm(left.t(), right, out_dtype=into.dtype)
    else:
        into += left.t() @ right
