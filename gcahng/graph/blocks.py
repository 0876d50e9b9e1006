"""The trained parts of the graph network: one node block and one edge block per layer, and the read-outs.

Shapes: B samples, D channels, H heads, n node-block pairs of b x b edges.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.graph.edge_update import BlockWeights, UpdateRule
from gcahng.graph.pair_attention import Reducer, pair_attention
from gcahng.graph.pairs import PairPlan
from gcahng.graph.precision import linear, product, without_autocast


class Norm(nn.Module):
    """LayerNorm(GELU(x)) as the released code has it, or LayerNorm(x) as the paper writes."""

    def __init__(self, dim: int, *, gelu: bool) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(F.gelu(x) if self.gelu else x)


class _Folded(torch.autograd.Function):
    """(D, F) weight times (F,) scale with centred rows; autograd's own gradient takes twice the sweeps."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        folded = weight * scale
        return folded.sub_(folded.mean(1, keepdim=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        weight, scale = ctx.saved_tensors
        centred = grads[0] - grads[0].mean(1, keepdim=True)
        by_scale = (centred * weight).sum(0)
        return centred.mul_(scale), by_scale


def _attention_linear(dim: int) -> nn.Linear:
    layer = nn.Linear(dim, dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class NodeBlock(nn.Module):
    """Attention over the other classes' samples, the edge-to-node sum, a feed-forward part (method: node block).

    `self.norm` is one parameter pair shared by its three uses. Parts that a switch turns off do not exist, so no
    parameter is ever without a use; they are drawn all the same, so that the others start alike.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        gelu_norm: bool,
        node_propagation: bool,
        edge_to_node: bool,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attends = node_propagation
        self.sums_edges = node_propagation and edge_to_node
        attention, message = [_attention_linear(dim) for _ in range(4)], nn.Linear(dim, dim)
        if self.attends:
            self.query, self.key, self.value, self.out = attention
        if self.sums_edges:
            self.edge_to_node = message
        self.ffn_in = nn.Linear(dim, 4 * dim)
        self.ffn_out = nn.Linear(4 * dim, dim)
        self.norm = Norm(dim, gelu=gelu_norm)

    def project(self, h: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (H, B, D/H)."""
        batch, dim = h.shape

        def heads(layer: nn.Linear) -> Tensor:
            return linear(h, layer, dtype).view(batch, self.num_heads, dim // self.num_heads).transpose(0, 1)

        return heads(self.query), heads(self.key), heads(self.value)

    def attend(self, h: Tensor, other_class: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Off-by-one softmax attention (B, D): one more key of logit 0 and value 0 takes part in the softmax.

        Args:
            h: (B, D) nodes.
            other_class: (B, B) bool, True where key j has another class than query i.
        """
        query, key, value = (
            F.pad(x, (0, 0, 0, extra)) for x, extra in zip(self.project(h, dtype), (0, 1, 1), strict=True)
        )
        mask = F.pad(other_class, (0, 1), value=True)
        if dtype is not None:
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        # SDPA wants a batch axis to choose its fused kernels.
        mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask)[0]
        return linear(mixed.to(h.dtype).transpose(0, 1).reshape(h.shape), self.out, dtype)

    def attend_listed(
        self, h: Tensor, labels: Tensor, plan: PairPlan, dtype: torch.dtype | None, reduce: Reducer
    ) -> Tensor:
        """`attend` over the pairs that a sparse plan lists: no (B, B) mask, no scores of other pairs.

        Args:
            h: (B, D) nodes.
            labels: (B,) classes; nodes of one class do not attend to each other.
            plan: Block pairs of this process.
            dtype: Of the operands of matrix products.
            reduce: Differentiable sum over processes.
        """
        query, key, value = (x.transpose(0, 1) for x in self.project(h, dtype))
        mixed = pair_attention(query, key, value, labels, plan, low=dtype, reduce=reduce)
        return linear(mixed.reshape(h.shape), self.out, dtype)

    def update(self, h: Tensor, attended: Tensor | None, edge_sum: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        """New nodes (B, D) from the old ones, the attention output and the edge-to-node sum."""
        if attended is not None:
            h = self.norm(h + attended)
        if edge_sum is not None:
            h = self.norm(h + edge_sum)
        return self.norm(h + linear(F.gelu(linear(h, self.ffn_in, dtype)), self.ffn_out, dtype))


class EdgeBlock(nn.Module):
    """Cross-attention of an edge over its two end nodes, then a feed-forward part (method: edge block).

    `self.norm` is one parameter pair shared by its two uses.
    """

    def __init__(self, dim: int, *, gelu_norm: bool) -> None:
        super().__init__()
        self.node_to_edge = nn.Linear(dim, dim)
        self.query, self.key, self.value = (_attention_linear(dim) for _ in range(3))
        self.ffn_in = nn.Linear(dim, 4 * dim)
        self.ffn_norm = nn.LayerNorm(4 * dim)
        self.ffn_out = nn.Linear(4 * dim, dim)
        self.norm = Norm(dim, gelu=gelu_norm)

    def end_node_terms(self, h: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        """What an edge needs of an end node: score direction u (B, D), score offset c (B), value v (B, D).

        The score of node i for edge e is q(e)·k_i / sqrt(D) = e·u_i + c_i with u_i = W_qᵀ k_i / sqrt(D), so no edge
        ever computes a query. The key bias shifts both scores of an edge alike; it is left out of the arithmetic
        and kept in the graph with an exactly zero gradient (its optimiser still decays it, as in the released code,
        and no rounding noise is blown up by Adam).
        """
        nodes = F.gelu(linear(h, self.node_to_edge, dtype))
        key = product(nodes, self.key.weight, None, dtype) / math.sqrt(h.shape[-1])
        direction = product(key, self.query.weight.T, None, dtype)
        offset = key @ self.query.bias + 0.0 * self.key.bias.sum()
        return direction, offset, linear(nodes, self.value, dtype)

    def weights(self) -> BlockWeights:
        """The weights behind the attention, the hidden LayerNorm folded into the Linear that follows it.

        Linear(LayerNorm(h)) = ((W diag(g)) (h - mean)) rstd + (W beta + b). With the columns of W diag(g) centred over
        the hidden channels the mean needs no subtraction.
        """
        norm, hidden = self.norm.layer_norm, self.ffn_norm
        folded = _Folded.apply(self.ffn_out.weight, hidden.weight)
        shift = self.ffn_out.weight @ hidden.bias + self.ffn_out.bias
        return BlockWeights(norm.weight, norm.bias, self.ffn_in.weight, self.ffn_in.bias, folded, shift)

    def rule(self, layer: int, *, moments: bool) -> UpdateRule:
        """Its constants."""
        return UpdateRule(layer, self.norm.gelu, self.norm.layer_norm.eps, self.ffn_norm.eps, moments)


def frozen_bias_batch_norm(dim: int) -> nn.BatchNorm1d:
    """BatchNorm1d whose bias stays zero (both read-outs)."""
    layer = nn.BatchNorm1d(dim)
    layer.bias.requires_grad_(False)
    return layer
