"""The edge stage's inner loops in plain torch: the CPU path, and the oracle of the fused kernels.

Every function takes one chunk: n block pairs of b first and b second nodes, R = n * b * b edges, D channels, hidden
width F (4 D). No function knows of autograd; forward and backward are written out, so that nothing but what is named
is kept. `low` is the dtype of the operands of matrix products, None for the tensors' own. All else is computed in the
nodes' dtype (float32, or float64 in tests); what a matrix product takes or gives may be in `low`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

aten = torch.ops.aten
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class NormWeights:
    """LayerNorm(GELU(x)), or LayerNorm(x): `gcahng.graph.blocks.Norm` as plain tensors.

    Attributes:
        weight, bias: (D,).
        gelu: Whether GELU comes first.
        eps: Of the LayerNorm.
    """

    weight: Tensor
    bias: Tensor
    gelu: bool
    eps: float


@dataclass(frozen=True)
class HiddenWeights:
    """The wide half of the edge feed-forward part.

    Attributes:
        weight_in: (F, D), in `low` where that is set.
        bias_in: (F,).
        weight_out: (D, F): Linear(4D, D) after the hidden LayerNorm's weight, its rows centred, in `low` where that is
            set. With h the hidden values, mean and rstd over F: Linear(LayerNorm(h)) = (h weight_outᵀ) rstd + shift.
        shift: (D,).
        eps: Of the hidden LayerNorm.
    """

    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    shift: Tensor
    eps: float


def lowered(x: Tensor, low: torch.dtype | None) -> Tensor:
    """x as an operand of a matrix product."""
    return x if low is None else x.to(low)


@dataclass(frozen=True)
class MixState:
    """What `mix` computes on its way, for its backward pass.

    Attributes:
        attended: (n, b, b, D) before the norm.
        inner: (n, b, b, D) what the LayerNorm took.
        mean, rstd: (n, b, b, 1) of the LayerNorm.
    """

    attended: Tensor
    inner: Tensor
    mean: Tensor
    rstd: Tensor


@dataclass(frozen=True)
class MixGradient:
    """Gradients of the arguments of `EagerKernels.mix`.

    Attributes:
        edges: (n, b, b, D).
        values: (n, b, D) of the first and of the second nodes.
        weights: (n, b, b) of the first and of the second node.
        norm_weight, norm_bias: (D,).
    """

    edges: Tensor
    values: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]
    norm_weight: Tensor
    norm_bias: Tensor


class EagerKernels:
    """One torch operation after the other."""

    name = "eager"
    # Whether a backward pass keeps a chunk's `mix_state` from its forward half; kernels that fuse it compute it again.
    keeps_mix_state = True

    def release(self) -> None:
        """Give back what was kept between chunks; the end of a pass."""

    def compile(self, function: Function) -> Function:
        """A function of one chunk's tensors as this backend runs it: here the function itself.

        Args:
            function: Without side effects; takes tensors, tuples of them, and constants. A tensor of three axes or
                more has n, the number of block pairs, in front.
        """
        return function

    def normalise(self, x: Tensor, norm: NormWeights) -> Tensor:
        """norm(x) on (..., D)."""
        inner = aten.gelu(x) if norm.gelu else x
        return aten.native_layer_norm(inner, [x.shape[-1]], norm.weight, norm.bias, norm.eps)[0]

    def normalise_into(self, x: Tensor, norm: NormWeights, into: Tensor) -> Tensor:
        """Write norm(x) on (R, D) to `into`, in its dtype; returns norm(x) in that of x."""
        done = self.normalise(x, norm)
        into.copy_(done)
        return done

    def normalise_backward(self, x: Tensor, grad: Tensor, norm: NormWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x (..., D), of the weight (D,) and of the bias (D,) from that of norm(x)."""
        inner = aten.gelu(x) if norm.gelu else x
        shape = [x.shape[-1]]
        _, mean, rstd = aten.native_layer_norm(inner, shape, norm.weight, norm.bias, norm.eps)
        grad_x, grad_weight, grad_bias = aten.native_layer_norm_backward(
            grad, inner, shape, mean, rstd, norm.weight, norm.bias, [True, True, True]
        )
        return (aten.gelu_backward(grad_x, x) if norm.gelu else grad_x), grad_weight, grad_bias

    def mix(
        self, edges: Tensor, values: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], norm: NormWeights
    ) -> Tensor:
        """norm(e_ij + w_i v_i + w_j v_j), the edge after its attention.

        Args:
            edges: (n, b, b, D).
            values: (n, b, D) values of the first and of the second nodes.
            weights: (n, b, b) attention weights of the first and of the second node.
            norm: The edge block's norm.
        Returns:
            (n, b, b, D).
        """
        return self.normalise(self.attended(edges, values, weights), norm)

    def product_mix(
        self,
        factors: tuple[Tensor, Tensor],
        values: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        norm: NormWeights,
    ) -> Tensor:
        """`mix` for first-layer edges e_ij = x_i * x_j, `factors` being (n, b, D) x of first and second nodes."""
        return self.mix(factors[0][:, :, None] * factors[1][:, None, :], values, weights, norm)

    def attended(self, edges: Tensor, values: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> Tensor:
        """e_ij + w_i v_i + w_j v_j, (n, b, b, D)."""
        x = torch.addcmul(edges, weights[0][..., None], values[0][:, :, None])
        return x.addcmul_(weights[1][..., None], values[1][:, None, :])

    def mix_backward(
        self,
        edges: Tensor,
        values: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        norm: NormWeights,
        grad: Tensor,
    ) -> "MixGradient":
        """Gradients of everything `mix` takes, from that of its result (n, b, b, D)."""
        return self.mix_gradient(self.mix_state(edges, values, weights, norm)[1], values, weights, norm, grad)

    def mix_state(
        self, edges: Tensor, values: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], norm: NormWeights
    ) -> tuple[Tensor, MixState]:
        """`mix`, and what its backward pass can use."""
        attended = self.attended(edges, values, weights)
        inner = aten.gelu(attended) if norm.gelu else attended
        x, mean, rstd = aten.native_layer_norm(inner, [edges.shape[-1]], norm.weight, norm.bias, norm.eps)
        return x, MixState(attended, inner, mean, rstd)

    def mix_gradient(
        self,
        state: MixState,
        values: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        norm: NormWeights,
        grad: Tensor,
    ) -> "MixGradient":
        """`mix_backward` from what the forward pass had."""
        grad_edges, grad_weight, grad_bias = aten.native_layer_norm_backward(
            grad, state.inner, [grad.shape[-1]], state.mean, state.rstd, norm.weight, norm.bias, [True, True, True]
        )
        if norm.gelu:
            grad_edges = aten.gelu_backward(grad_edges, state.attended)
        first, second = values
        n, b, _, dim = grad_edges.shape
        return MixGradient(
            grad_edges,
            (
                torch.bmm(weights[0].reshape(n * b, 1, b), grad_edges.view(n * b, b, dim)).view(n, b, dim),
                (grad_edges * weights[1][..., None]).sum(1),
            ),
            (
                torch.bmm(grad_edges.view(n * b, b, dim), first.reshape(n * b, dim, 1)).view(n, b, b),
                (grad_edges * second[:, None, :]).sum(-1),
            ),
            grad_weight,
            grad_bias,
        )

    def messages(
        self,
        edges: Tensor,
        weight: Tensor,
        bias: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
        low: torch.dtype | None,
        *,
        mirrored: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Sums of GELU(Linear(e)) over the nodes at the other end.

        Args:
            edges: (n, b, b, D).
            weight, bias: (D, D) and (D,) of the Linear; the weight in `low` where that is set.
            masks: (n, b, b) factors in the sums of first and of second nodes, None for ones.
            low: Dtype of the operands of the matrix product.
            mirrored: Whether second nodes get sums, too.
        Returns:
            Linear(e) (R, D) if this backend holds it; (n, b, D) sums at the first nodes; at the second nodes or None.
        """
        inner = self.linear(edges.flatten(0, 2), weight, bias, low)
        message = aten.gelu(inner).view(edges.shape)
        first = _node_sum(message, masks[0], 2, edges.dtype)
        return inner, first, _node_sum(message, masks[1], 1, edges.dtype) if mirrored else None

    def product_messages(
        self,
        factors: tuple[Tensor, Tensor],
        weight: Tensor,
        bias: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
        low: torch.dtype | None,
        *,
        mirrored: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """`messages` for first-layer edges e_ij = x_i * x_j."""
        edges = factors[0][:, :, None] * factors[1][:, None, :]
        return self.messages(edges, weight, bias, masks, low, mirrored=mirrored)

    def messages_backward(
        self,
        edges: Tensor,
        inner: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
        low: torch.dtype | None,
        grads: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        """Gradient of Linear(e), (R, D), in `low` where that is set.

        Args:
            edges, weight, bias, masks, low: As in `messages`.
            inner: (R, D) Linear(e) if it was kept, else None: computed again.
            grads: (n, b, D) gradients of the sums at the first and at the second nodes (None if not mirrored).
        """
        if inner is None:
            inner = self.linear(edges.flatten(0, 2), weight, bias, low)
        grad = _masked(grads[0][:, :, None], masks[0])
        if grads[1] is not None:
            grad = grad + _masked(grads[1][:, None, :], masks[1])
        return aten.gelu_backward(lowered(grad.expand(edges.shape).reshape(inner.shape), low), inner)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, low: torch.dtype | None) -> Tensor:
        """x weightᵀ + bias, in `low` where that is set."""
        return torch.addmm(lowered(bias, low), lowered(x, low), weight.t())

    def hidden(
        self, x: Tensor, weights: HiddenWeights, low: torch.dtype | None, *, keep: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """h = GELU(Linear(x)) and its statistics over F.

        Args:
            x: (R, D).
            weights: Of the feed-forward part.
            low: Dtype of the operands of the matrix product.
            keep: Whether Linear(x) is asked for.
        Returns:
            Linear(x) (R, F) if it is asked for and this backend holds it, h (R, F), both in `low` where that is set;
            mean (R, 1) and rstd (R, 1) of h.
        """
        inner = self.linear(x, weights.weight_in, weights.bias_in, low)
        h = aten.gelu(inner)
        mean, rstd = row_statistics(h, x.dtype, weights.eps)
        return (inner if keep else None), h, mean, rstd

    def hidden_backward(
        self,
        x: Tensor,
        inner: Tensor | None,
        grad: Tensor,
        row: Tensor,
        mean: Tensor,
        weights: HiddenWeights,
        low: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the gradient behind the hidden layer to the one before it.

        dh = grad weight_out - row (h - mean), then through GELU.

        Args:
            x: (R, D), the hidden layer's input.
            inner: (R, F) Linear(x) if it was kept, else None: computed again.
            grad: (R, D), times rstd, in `low` where that is set.
            row: (R, 1) row factor of the LayerNorm's variance part.
            mean: (R, 1) of h.
            weights: Of the feed-forward part.
            low: Dtype of the operands of matrix products.
        Returns:
            Gradient of Linear(x) (R, F), h (R, F), both in `low` where that is set, and the gradient of the bias (F,).
        """
        if inner is None:
            inner = self.linear(x, weights.weight_in, weights.bias_in, low)
        h = aten.gelu(inner)
        grad_h = grad @ weights.weight_out
        grad_h.addcmul_(h, lowered(-row, low)).add_(lowered(row * mean, low))
        grad_inner = aten.gelu_backward(grad_h, inner)
        return grad_inner, h, column_sums(grad_inner, x.dtype)


def row_statistics(h: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of the rows of h, (R, 1) each, in `dtype`."""
    width = h.shape[1]
    if h.dtype != dtype and h.device.type == "cpu":
        # The only operation there that sums lower precision in float32 without a copy; its main result is not used.
        ones = torch.ones(width, dtype=dtype)
        _, mean, rstd = aten.native_layer_norm(h, [width], ones, torch.zeros_like(ones), eps)
        return mean, rstd
    # Two plain sums: torch.var_mean takes ten times as long on CPU.
    mean = h.sum(1, keepdim=True, dtype=dtype) / width
    length = torch.linalg.vector_norm(h, dim=1, keepdim=True, dtype=dtype)
    variance = (length.square() / width - mean.square()).clamp_min(0)
    return mean, torch.rsqrt(variance + eps)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over the rows of x (R, C), (C,) in `dtype`."""
    if x.dtype != dtype and x.device.type == "cpu":
        # A product adds up in float32; a sum into another dtype copies x first.
        return (x.new_ones(1, x.shape[0]) @ x)[0].to(dtype)
    return x.sum(0, dtype=dtype)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask[..., None].to(x.dtype)


def _node_sum(message: Tensor, mask: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    return _masked(message, mask).sum(dim, dtype=dtype)
