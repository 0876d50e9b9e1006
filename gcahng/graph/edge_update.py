"""One edge block as one differentiable operation over chunks of pairs.

Kept for the backward pass: the input and output buffers, six numbers per row at most, and the hidden layer and the
finished edges if they fit into `keep_bytes`; everything else is computed again, chunk by chunk.

Shapes: num_positions nodes by block position, D channels, F = 4 D hidden channels, rows of the edge buffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcahng.graph.edge_messages import EdgePass, accumulate_product
from gcahng.graph.edge_moments import EdgeMoments
from gcahng.graph.edge_source import EdgeSource, ProductEdges, bare
from gcahng.graph.kernels import HiddenWeights, NormWeights
from gcahng.graph.kernels.eager import MixState, lowered
from gcahng.graph.pairs import PairChunk, add_ends, ends
from gcahng.graph.precision import without_autocast


@dataclass(frozen=True)
class EndTerms:
    """What an edge needs of its end nodes, by block position (see `EdgeBlock.end_node_terms`).

    Attributes:
        direction: (num_positions, D), score direction u.
        offset: (num_positions,), score offset c.
        value: (num_positions, D), value v.
    """

    direction: Tensor
    offset: Tensor
    value: Tensor


@dataclass(frozen=True)
class BlockWeights:
    """Weights of an edge block's later half.

    Attributes:
        norm_weight, norm_bias: (D,) of the norm, used before and after the feed-forward part.
        weight_in, bias_in: (F, D), (F,).
        weight_out, shift: (D, F), (D,); see `HiddenWeights`.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    shift: Tensor


@dataclass(frozen=True)
class UpdateRule:
    """Constants of an edge block.

    Attributes:
        layer: Its number, a coordinate of the dropout masks.
        gelu: Whether the norm has a GELU.
        norm_eps, hidden_eps: Of the two LayerNorms.
        moments: Whether the moments of the new edges are asked for.
    """

    layer: int
    gelu: bool
    norm_eps: float
    hidden_eps: float
    moments: bool


@dataclass(frozen=True)
class UpdatedEdges:
    """The edges after a block.

    Attributes:
        raw: (rows, D) before the last norm, raw = FFN(e') + e' with e' = norm(att + e), in the pass's storage dtype.
            Without gradient nobody asks for them, and the finished edges stand there.
        values: (rows, D) finished edges norm(raw) if there is room for them, or `raw` itself; without gradient.
        moments: Partial moments of the finished edges over the ordered edges, if asked for, without gradient.
    """

    raw: Tensor
    values: Tensor | None
    moments: EdgeMoments | None


def update_edges(
    source: EdgeSource, terms: EndTerms, weights: BlockWeights, rule: UpdateRule, call: EdgePass
) -> UpdatedEdges:
    """One edge block on all edges of this process."""
    like = weights.norm_weight
    moments = EdgeMoments.zeros(like) if rule.moments else None
    values: Tensor | None = None
    if torch.is_grad_enabled() and call.keeps(like.shape[0], like, like.dtype):
        values = torch.empty((call.layout.num_rows, like.shape[0]), dtype=like.dtype, device=like.device)
    raw = _Update.apply(
        call,
        source,
        rule,
        moments,
        values,
        torch.is_grad_enabled(),
        terms.direction,
        terms.offset,
        terms.value,
        weights.norm_weight,
        weights.norm_bias,
        weights.weight_in,
        weights.bias_in,
        weights.weight_out,
        weights.shift,
        *source.tensors,
    )
    return UpdatedEdges(raw, values if torch.is_grad_enabled() else raw, moments)


@dataclass(frozen=True)
class _Attention:
    """Attention weights of one chunk: six numbers per edge at most, kept for the backward pass.

    Attributes:
        shares: (n, b, b) softmax weights of the first and of the second node.
        keep: Their dropout factors; None without dropout.
    """

    shares: tuple[Tensor, Tensor]
    keep: tuple[Tensor, Tensor] | None

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        if self.keep is None:
            return self.shares
        return self.shares[0] * self.keep[0], self.shares[1] * self.keep[1]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Four of them."""
        return (*self.shares, *(self.keep or (None, None)))

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> "_Attention":
        """From what `tensors` gave."""
        first, second, keep_first, keep_second = tensors
        return cls((first, second), None if keep_first is None else (keep_first, keep_second))


class _Chunk:
    """Attention of one chunk, as both passes compute it."""

    def __init__(
        self,
        call: EdgePass,
        source: EdgeSource,
        rule: UpdateRule,
        terms: EndTerms,
        norm: NormWeights,
        chunk: PairChunk,
        attention: _Attention | None = None,
    ) -> None:
        self.call, self.source, self.norm, self.chunk = call, source, norm, chunk
        self.directions = ends(terms.direction, chunk)
        self.values = ends(terms.value, chunk)
        self.edges: Tensor | None = None
        if isinstance(source, ProductEdges):
            self.factors = source.factors(chunk)
        else:
            self.edges = source.values(chunk)
        self.attention = self._attend(terms, rule) if attention is None else attention

    def _attend(self, terms: EndTerms, rule: UpdateRule) -> _Attention:
        offset = ends(terms.offset, self.chunk)
        of_first, of_second = self.directions
        if self.edges is None:
            first, second = self.factors
            # sum_c x_i x_j (u_i - u_j), without the (b, b, D) product.
            margin = torch.bmm(first * of_first, second.mT) - torch.bmm(first, (second * of_second).mT)
        else:
            margin = (self.edges * (of_first[:, :, None] - of_second[:, None, :])).sum(-1)
        margin = margin + offset[0][:, :, None] - offset[1][:, None, :]
        keep = self.call.layout.keep_scales(self.chunk, rule.layer, margin.dtype, self.call.kernels)
        return _Attention((torch.sigmoid(margin), torch.sigmoid(-margin)), keep)

    def mix(self) -> Tensor:
        """(R, D) edges after the attention and the first norm."""
        if self.edges is None:
            x = self.call.kernels.product_mix(self.factors, self.values, self.attention.weights, self.norm)
        else:
            x = self.call.kernels.mix(self.edges, self.values, self.attention.weights, self.norm)
        return x.flatten(0, 2)

    def mix_again(self) -> tuple[Tensor, MixState | None]:
        """`mix` in the backward pass, with what its gradient can use if these kernels have it."""
        kernels = self.call.kernels
        if not kernels.keeps_mix_state:
            return self.mix(), None
        edges = self.source.values(self.chunk) if self.edges is None else self.edges
        x, state = kernels.mix_state(edges, self.values, self.attention.weights, self.norm)
        return x.flatten(0, 2), state


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: EdgePass,
        source: EdgeSource,
        rule: UpdateRule,
        moments: EdgeMoments | None,
        values: Tensor | None,
        keep: bool,
        *tensors: Tensor,
    ) -> Tensor:
        terms, weights, source_tensors = EndTerms(*tensors[:3]), BlockWeights(*tensors[3:9]), tensors[9:]
        source = source.with_tensors(source_tensors)
        norm, hidden = _norm(weights, rule), _hidden(weights, rule, call)
        keep_inner = keep and call.keeps(weights.weight_in.shape[0], weights.weight_in)
        raw = terms.value.new_empty((call.layout.num_rows, terms.value.shape[1]), dtype=call.storage)
        kept: list[Tensor | None] = []
        for part in call.layout.all_rows():
            work = _Chunk(call, source, rule, terms, norm, part.chunk)
            x = work.mix()
            inner, h, mean, rstd = call.kernels.hidden(x, hidden, call.low, keep=keep_inner)
            # x is this chunk's own, and the backward pass mixes it again.
            x.addcmul_((h @ hidden.weight_out.t()).to(x.dtype), rstd)
            del h
            rows, done = part.chunk.rows, None
            if keep:
                x = _store(x, weights.shift, raw[rows])
                if values is not None:
                    done = call.kernels.normalise_into(x, norm, values[rows])
                elif moments is not None:
                    done = call.kernels.normalise(x, norm)
            else:
                done = call.kernels.normalise_into(x.add_(weights.shift), norm, raw[rows])
            if moments is not None and done is not None:
                moments.add(done, call.layout.weights(part, done.dtype))
            if keep:
                kept += [*work.attention.tensors(), inner, mean, rstd]
        call.kernels.release()
        ctx.call, ctx.source, ctx.rule = call, bare(source), rule
        # Saved as autograd saves: freed by the backward pass, kept by retain_graph.
        ctx.save_for_backward(raw, *tensors, *kept)
        return raw

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad_raw,) = grads
        raw, *saved = ctx.saved_tensors
        count = 9 + len(ctx.source.tensors)
        tensors, saved = saved[:count], saved[count:]
        kept_rows = [saved[i : i + 7] for i in range(0, len(saved), 7)]
        call: EdgePass = ctx.call
        rule: UpdateRule = ctx.rule
        terms, weights = EndTerms(*tensors[:3]), BlockWeights(*tensors[3:9])
        source: EdgeSource = ctx.source.with_tensors(tuple(tensors[9:]))
        norm, hidden = _norm(weights, rule), _hidden(weights, rule, call)
        found_terms = EndTerms(*(torch.zeros_like(t) for t in tensors[:3]))
        found = BlockWeights(*(torch.zeros_like(t) for t in tensors[3:9]))
        collected = source.gradient(any(ctx.needs_input_grad[15:]))
        for part, kept in zip(call.layout.all_rows(), kept_rows, strict=True):
            work = _Chunk(call, source, rule, terms, norm, part.chunk, _Attention.of(kept[:4]))
            x, state = work.mix_again()
            rows = part.chunk.rows
            grad = grad_raw[rows].to(x.dtype)
            grad_x = _feed_forward_backward(x, raw[rows].to(x.dtype), grad, kept[4:], hidden, call, found)
            grad_edges = _attention_backward(work, state, grad_x, norm, found_terms, found)
            if collected.needed:
                collected.add(part.chunk, grad_edges)
        call.kernels.release()
        return (
            *(None,) * 6,
            found_terms.direction,
            found_terms.offset,
            found_terms.value,
            found.norm_weight,
            found.norm_bias,
            found.weight_in,
            found.bias_in,
            found.weight_out,
            found.shift,
            *collected.results(),
        )


def _store(x: Tensor, shift: Tensor, into: Tensor) -> Tensor:
    """Write x + shift to `into`, (R, D), in its dtype; returns the sum in that of x."""
    if into.dtype == x.dtype:
        return torch.add(x, shift, out=into)
    x += shift
    into.copy_(x)
    return x


def _norm(weights: BlockWeights, rule: UpdateRule) -> NormWeights:
    return NormWeights(weights.norm_weight, weights.norm_bias, rule.gelu, rule.norm_eps)


def _hidden(weights: BlockWeights, rule: UpdateRule, call: EdgePass) -> HiddenWeights:
    return HiddenWeights(
        lowered(weights.weight_in, call.low),
        weights.bias_in,
        lowered(weights.weight_out, call.low),
        weights.shift,
        rule.hidden_eps,
    )


def _feed_forward_backward(
    x: Tensor,
    raw: Tensor,
    grad: Tensor,
    kept: Sequence[Tensor | None],
    hidden: HiddenWeights,
    call: EdgePass,
    found: BlockWeights,
) -> Tensor:
    """Gradient of x (R, D) from that of raw = FFN(x) + x; adds the weights' to `found`."""
    inner, mean, rstd = kept
    assert mean is not None and rstd is not None
    # raw - x - shift is the product with weight_out times rstd: what the variance acts on.
    through_rstd = (raw - x).mul_(grad).sum(1) - grad @ hidden.shift
    row = through_rstd[:, None] * rstd.square() / hidden.bias_in.numel()
    scaled = lowered(grad * rstd, call.low)
    grad_inner, h, grad_bias = call.kernels.hidden_backward(x, inner, scaled, row, mean, hidden, call.low)
    accumulate_product(found.weight_out, scaled, h)
    accumulate_product(found.weight_in, grad_inner, lowered(x, call.low))
    found.bias_in.add_(grad_bias)
    found.shift.add_(grad.sum(0))
    return torch.addmm(grad, grad_inner, hidden.weight_in) if call.low is None else grad + grad_inner @ hidden.weight_in


def _attention_backward(
    work: _Chunk, state: MixState | None, grad: Tensor, norm: NormWeights, found_terms: EndTerms, found: BlockWeights
) -> Tensor:
    """Gradient of the edges (n, b, b, D) from that of the mixed ones (R, D); adds the nodes' to `found_terms`."""
    chunk = work.chunk
    kernels, ends_of = work.call.kernels, (work.values, work.attention.weights, norm, chunk.of_rows(grad))
    if state is None:
        edges = work.source.values(chunk) if work.edges is None else work.edges
        back = kernels.mix_backward(edges, *ends_of)
    else:
        back = kernels.mix_gradient(state, *ends_of)
    found.norm_weight.add_(back.norm_weight)
    found.norm_bias.add_(back.norm_bias)
    add_ends(found_terms.value, chunk, *back.values)
    by_first, by_second = back.weights
    keep, shares = work.attention.keep, work.attention.shares
    if keep is not None:
        by_first, by_second = by_first * keep[0], by_second * keep[1]
    margin = (by_first - by_second) * shares[0] * shares[1]
    add_ends(found_terms.offset, chunk, margin.sum(2), -margin.sum(1))
    if work.edges is None:
        first, second = work.factors
        by_first, by_second = first * torch.bmm(margin, second), -second * torch.bmm(margin.mT, first)
    else:
        weighted = work.edges * margin[..., None]
        by_first, by_second = weighted.sum(2), -weighted.sum(1)
    add_ends(found_terms.direction, chunk, by_first, by_second)
    slope = work.directions[0][:, :, None] - work.directions[1][:, None, :]
    return back.edges.addcmul_(margin[..., None], slope)
