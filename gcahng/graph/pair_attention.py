"""Node attention over the listed block pairs: the sparse graph's counterpart of `NodeBlock.attend`.

A node attends to the nodes of other classes that share a listed block pair with it, by the off-by-one softmax: one more
key of logit 0 and value 0. Scores exist for one chunk of pairs at a time; kept for the backward pass are the
projections, the result and one number per node and head. Each process goes over its own pairs; what it finds is added
up over the processes.

Shapes: B nodes, num_blocks blocks of b nodes, n block pairs of b x b edges, H heads of d channels.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcahng.graph.block_sums import add_blocks
from gcahng.graph.kernels.eager import lowered
from gcahng.graph.pairs import PairPlan
from gcahng.graph.precision import without_autocast

Reducer = Callable[[Tensor], Tensor]


def pair_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    labels: Tensor,
    plan: PairPlan,
    *,
    low: torch.dtype | None,
    reduce: Reducer,
) -> Tensor:
    """Off-by-one softmax attention over listed pairs of different classes, on every process.

    Args:
        query, key, value: (B, H, d).
        labels: (B,) int64 classes.
        plan: The pairs of this process.
        low: Dtype that the three are rounded to, as operands of matrix products elsewhere; None for their own.
        reduce: Differentiable sum over processes.
    Returns:
        (B, H, d) in the dtype of `query`. A node without any listed pair of another class gets 0.
    """
    result: Tensor = _PairAttention.apply(_Pairs(plan, labels, low, reduce), query, key, value)
    return result


@dataclass(frozen=True)
class _Side:
    """The block pairs of a chunk in one direction.

    Attributes:
        anchors, others: (n,) block numbers of queries and of keys.
        apart: (n, 1, b, b) bool by anchor and other node, True where they are real and of different classes.
    """

    anchors: Tensor
    others: Tensor
    apart: Tensor


@dataclass(frozen=True)
class _Pairs:
    """What does not depend on the embeddings.

    Attributes:
        plan: The pairs of this process.
        labels: (B,) classes.
        low: See `pair_attention`.
        reduce: Sum over processes.
    """

    plan: PairPlan
    labels: Tensor
    low: torch.dtype | None
    reduce: Reducer

    def sides(self) -> Iterator[_Side]:
        """Every listed ordered pair once."""
        b = self.plan.block_size
        labels = self.plan.positions(self.labels).view(-1, b)
        valid = None if self.plan.valid is None else self.plan.valid.view(-1, b)
        for chunk in self.plan.chunks:
            apart = labels[chunk.first][:, :, None] != labels[chunk.second][:, None, :]
            if valid is not None:
                apart = apart & valid[chunk.first][:, :, None] & valid[chunk.second][:, None, :]
            yield _Side(chunk.first, chunk.second, apart[:, None])
            if chunk.mirrored:
                yield _Side(chunk.second, chunk.first, apart.mT[:, None])

    def blocks(self, x: Tensor) -> Tensor:
        """(B, H, d) by block: (num_blocks, H, b, d), so that products of blocks need no copies."""
        return self.plan.positions(x).view(-1, self.plan.block_size, *x.shape[1:]).transpose(1, 2).contiguous()

    def samples(self, blocks: Tensor) -> Tensor:
        """Back from `blocks`."""
        return self.plan.samples(blocks.transpose(1, 2).flatten(0, 1))


class _Scores:
    """Scores of ordered pairs, chunk by chunk.

    Blocks are gathered in `low`, which halves the traffic, and multiplied in the dtype of the result: products of
    K x K nodes are too small for the low-precision units of a GPU to matter.
    """

    def __init__(self, pairs: _Pairs, query: Tensor, key: Tensor) -> None:
        self.dtype = query.dtype
        self.query, self.key = (lowered(pairs.blocks(x), pairs.low) for x in (query, key))
        self.scale = 1.0 / math.sqrt(query.shape[-1])

    def ends(self, side: _Side) -> tuple[Tensor, Tensor]:
        """(n, H, b, d) queries of the anchors and keys of the others."""
        return self.query[side.anchors].to(self.dtype), self.key[side.others].to(self.dtype)

    def of(self, queries: Tensor, keys: Tensor, side: _Side) -> Tensor:
        """(n, H, b, b) by anchor and other node; -inf where the pair does not attend."""
        return (queries @ keys.mT).mul_(self.scale).masked_fill_(~side.apart, -torch.inf)


class _PairAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: _Pairs, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores, values = _Scores(pairs, query, key), lowered(pairs.blocks(value), pairs.low)
        mixed = torch.zeros_like(scores.query, dtype=query.dtype)
        total = mixed.new_zeros(mixed.shape[:3])
        peak = _peaks(pairs, scores, torch.zeros_like(total))
        for side in pairs.sides():
            weights = scores.of(*scores.ends(side), side).sub_(peak[side.anchors][..., None]).exp_()
            add_blocks(mixed, side.anchors, weights @ values[side.others].to(query.dtype))
            add_blocks(total, side.anchors, weights.sum(-1))
        total = pairs.reduce(total) + torch.exp(-peak)
        mixed = pairs.reduce(mixed) / total[..., None]
        # log of the sum of exponentials over all keys, the additional one included.
        ctx.save_for_backward(query, key, value, mixed, peak + torch.log(total))
        ctx.pairs = pairs
        return pairs.samples(mixed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        pairs: _Pairs = ctx.pairs
        query, key, value, mixed, log_total = ctx.saved_tensors
        scores, values = _Scores(pairs, query, key), lowered(pairs.blocks(value), pairs.low)
        grad = pairs.blocks(pairs.reduce(grads[0]))
        # The softmax takes the mean gradient of a row away from each of its scores.
        mean = (grad * mixed).sum(-1)
        by_query, by_key, by_value = (torch.zeros_like(mixed) for _ in range(3))
        for side in pairs.sides():
            queries, keys = scores.ends(side)
            weights = scores.of(queries, keys, side).sub_(log_total[side.anchors][..., None]).exp_()
            anchor_grad = grad[side.anchors]
            by_score = anchor_grad @ values[side.others].to(grad.dtype).mT
            by_score.sub_(mean[side.anchors][..., None]).mul_(weights).mul_(scores.scale)
            add_blocks(by_query, side.anchors, by_score @ keys)
            add_blocks(by_key, side.others, by_score.mT @ queries)
            add_blocks(by_value, side.others, weights.mT @ anchor_grad)
        return None, *(pairs.samples(x) for x in (by_query, by_key, by_value))


def _peaks(pairs: _Pairs, scores: _Scores, peak: Tensor) -> Tensor:
    """Largest score of each node and head over all processes, at least 0 (the additional key): `peak`, filled.

    Args:
        peak: (num_blocks, H, b) zeros.
    """
    for side in pairs.sides():
        largest = scores.of(*scores.ends(side), side).amax(-1)
        # A maximum is the same in whatever order a device takes it.
        peak.scatter_reduce_(0, side.anchors[:, None, None].expand_as(largest), largest, "amax")
    rank, ranks = pairs.plan.share
    if ranks == 1:
        return peak
    # A maximum over processes by sums alone: each fills its own row of a table.
    table = peak.new_zeros(ranks, *peak.shape)
    table[rank] = peak
    return pairs.reduce(table).amax(0)
