"""Plans, layouts and plain formulas that the tests of the edge stage share.

A *table* is (B, B, ...), entry [i, j] for the ordered edge of anchor i and sample j. The formulas are those of the
method, edge by edge, with autograd's own derivatives.
"""

import dataclasses

import torch
from maths_cases import generator
from torch import Tensor
from torch.nn import functional as F

from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.edge_layout import EdgeLayout, edge_layout
from gcahng.graph.edge_messages import EdgePass
from gcahng.graph.edge_source import StoredEdges
from gcahng.graph.edge_update import BlockWeights, EndTerms
from gcahng.graph.kernels import EagerKernels
from gcahng.graph.pairs import PairChunk, PairPlan, ends, pair_plan

# What an operation may keep: all of it, or nothing.
EVERYTHING, NOTHING = 1 << 40, 0
LAWS = {"none": None, "tied": EdgeDropout(0.3, 11), "independent": EdgeDropout(0.3, 11, tied=False)}


def plans(batch: int, share: tuple[int, int] = (0, 1)) -> dict[str, PairPlan]:
    """Plans with and without padding, in one chunk and in many, in any order of the samples."""
    order = torch.arange(batch)
    mixed = torch.randperm(batch, generator=generator(1))
    return {
        "one block": pair_plan(order, batch, share=share),
        "single samples": pair_plan(order, 1, share=share),
        "padded, mixed order": pair_plan(mixed, 4, edges_per_chunk=40, share=share),
        "more padding than samples": pair_plan(mixed, batch + 3, share=share),
    }


def some_pairs(batch: int, block_size: int) -> PairPlan:
    """A plan that leaves out every third pair of different blocks; its degree counts the edges of each sample."""
    plan = pair_plan(torch.arange(batch), block_size, edges_per_chunk=30)
    chunks, start = [], 0
    for chunk in plan.chunks:
        keep = (chunk.first + chunk.second) % 3 != 0 if chunk.mirrored else torch.ones_like(chunk.first, dtype=bool)
        if keep.any():
            chunks.append(dataclasses.replace(chunk, first=chunk.first[keep], second=chunk.second[keep], start=start))
            start += chunks[-1].num_rows
    plan = dataclasses.replace(plan, chunks=tuple(chunks))
    listed = listed_edges(edge_layout(plan, None, 1))
    return dataclasses.replace(plan, edge_count=int(listed.sum()), degree=listed.sum(1).long())


def samples_of(layout: EdgeLayout, chunk: PairChunk) -> tuple[Tensor, Tensor]:
    """(n, b, b) sample numbers of the first and of the second node of each row."""
    samples = layout.plan.order.view(-1, chunk.block_size)
    shape = (chunk.first.numel(), chunk.block_size, chunk.block_size)
    return (
        samples[chunk.first][:, :, None].expand(shape),
        samples[chunk.second][:, None, :].expand(shape),
    )


def rows_of(layout: EdgeLayout, table: Tensor) -> Tensor:
    """A table as an edge buffer: each row from its forward edge."""
    rows = [table[samples_of(layout, part.chunk)].flatten(0, 2) for part in layout.all_rows()]
    return torch.cat(rows)


def table_of(layout: EdgeLayout, buffer: Tensor) -> Tensor:
    """An edge buffer as a table, edge by edge; zero where no row stands for the edge."""
    batch = layout.plan.batch_size
    table = buffer.new_zeros(batch, batch, *buffer.shape[1:])
    valid = layout.plan.valid
    for part in layout.parts:
        first, second = samples_of(layout, part.chunk)
        forward, backward = layout.directions(part, buffer)
        real = torch.ones_like(first, dtype=torch.bool)
        if valid is not None:
            at_first, at_second = ends(valid, part.chunk)
            real = at_first[:, :, None] & at_second[:, None, :]
        table = table.index_put((first[real], second[real]), forward[real])
        if backward is not None:
            table = table.index_put((second[real], first[real]), backward[real])
    return table


def listed_edges(layout: EdgeLayout) -> Tensor:
    """(B, B) one for each ordered edge that the plan lists."""
    return table_of(layout, torch.ones(layout.num_rows, 1, dtype=torch.float64))[..., 0]


def edge_pass(
    plan: PairPlan,
    law: str = "none",
    *,
    layers: int = 1,
    keep_bytes: int = EVERYTHING,
    low: torch.dtype | None = None,
    storage: torch.dtype = torch.float64,
) -> EdgePass:
    layout = edge_layout(plan, LAWS[law], layers)
    return EdgePass(layout, EagerKernels(), low, storage, keep_bytes)


def normal(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers that may take a gradient."""
    drawn = scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def symmetric(batch: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(B, B, D) with entry [i, j] = [j, i]."""
    table = torch.randn(batch, batch, dim, generator=generator(seed), dtype=torch.float64)
    return (table + table.transpose(0, 1)).to(dtype)


def norm_of(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(F.gelu(x) if gelu else x, x.shape[-1:], weight, bias, eps)


def stored(raw: Tensor, dim: int, *, gelu: bool, seed: int = 40) -> StoredEdges:
    """A source over a buffer of raw edges; its norm's weights take a gradient."""
    weight, bias = (normal(dim, seed=seed + n, dtype=torch.float64) for n in range(2))
    if raw.dtype == torch.float32:
        weight, bias = (t.detach().float().requires_grad_() for t in (weight, bias))
    return StoredEdges(raw, weight, bias, gelu, 1e-5, EagerKernels())


def plain_update(
    edges: Tensor,
    terms: EndTerms,
    weights: BlockWeights,
    law: EdgeDropout | None,
    *,
    layer: int,
    gelu: bool,
    eps: float = 1e-5,
) -> Tensor:
    """raw = FFN(e') + e' with e' = norm(att + e) of a table, the terms by sample: (B, B, D)."""
    batch = edges.shape[0]
    i, j = torch.arange(batch)[:, None], torch.arange(batch)[None, :]
    scores = torch.stack(
        [
            (edges * terms.direction[:, None]).sum(-1) + terms.offset[:, None],
            (edges * terms.direction[None]).sum(-1) + terms.offset[None],
        ]
    )
    share = torch.softmax(scores, 0)
    if law is not None:
        share = share * torch.stack(law.scales(i, j, layer, share.dtype))
    attended = share[0][..., None] * terms.value[:, None] + share[1][..., None] * terms.value[None]
    x = norm_of(attended + edges, weights.norm_weight, weights.norm_bias, gelu=gelu)
    hidden = F.gelu(F.linear(x, weights.weight_in, weights.bias_in))
    variance, mean = torch.var_mean(hidden, -1, correction=0, keepdim=True)
    normalised = (hidden - mean) / torch.sqrt(variance + eps)
    return F.linear(normalised, weights.weight_out, weights.shift) + x
