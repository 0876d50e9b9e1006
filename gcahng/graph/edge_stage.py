"""The edge stage on block pairs: edge features, messages to nodes, edge updates, read-out.

Every function works on a list of tensors, one (n, b, b, D) tensor per chunk of the plan, and returns either such a
list or *partial sums* over this process's pairs, which the caller reduces.
"""

import torch
from torch import Tensor, nn

from gcahng.graph.blocks import EdgeBlock, NodeBlock
from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.pairs import PairChunk, PairPlan
from gcahng.graph.precision import linear


def unit_centred(z: Tensor) -> Tensor:
    """Embeddings (B, D) centred over their channels and scaled to unit length.

    An embedding that is constant but for rounding (length at most 1e-12, or a few roundings of its own length) becomes
    zero with zero gradient; the released code divides 0, or noise, by 0 there.
    """
    centred = z - z.mean(1, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    rounding = 4 * torch.finfo(z.dtype).eps * torch.linalg.vector_norm(z.detach(), dim=1, keepdim=True)
    usable = length > rounding.clamp_min(1e-12)
    return torch.where(usable, centred / torch.where(usable, length, torch.ones_like(length)), 0.0)


def pair_products(x: Tensor, plan: PairPlan) -> list[Tensor]:
    """First-layer edges x_i * x_j, channel by channel (method section 3), from `unit_centred` embeddings."""
    blocks = plan.blocks(x)
    return [blocks[c.first][:, :, None] * blocks[c.second][:, None, :] for c in plan.chunks]


def edge_to_node_sums(edges: list[Tensor], plan: PairPlan, block: NodeBlock, dtype: torch.dtype | None) -> Tensor:
    """Partial sums over j of the messages of the ordered edges (i, j): (B, D)."""
    dim = edges[0].shape[-1] if edges else block.edge_to_node.out_features
    weight = block.edge_to_node.weight
    sums = torch.zeros(plan.num_blocks, plan.block_size, dim, dtype=weight.dtype, device=weight.device)
    for chunk, e in zip(plan.chunks, edges, strict=True):
        sums = plan.sum_to_nodes(chunk, block.edge_message(e, dtype), sums)
    return plan.samples(sums)


def update_edges(
    edges: list[Tensor],
    h: Tensor,
    plan: PairPlan,
    block: EdgeBlock,
    *,
    layer: int,
    dropout: EdgeDropout | None,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """One edge block (method section 4) on every chunk.

    Args:
        h: (B, D) nodes of this layer.
        dropout: Law of the attention dropout, None for none.
    """
    direction, offset, value = (plan.blocks(t) for t in block.end_node_terms(h, dtype))
    updated = []
    for chunk, e in zip(plan.chunks, edges, strict=True):
        slope = direction[chunk.first][:, :, None] - direction[chunk.second][:, None, :]
        margin = (e * slope).sum(-1) + offset[chunk.first][:, :, None] - offset[chunk.second][:, None, :]
        weight_first = torch.sigmoid(margin)
        weight_second = torch.sigmoid(-margin)
        if dropout is not None:
            scale_first, scale_second = _dropout_scales(chunk, plan, dropout, layer, e.dtype)
            weight_first, weight_second = weight_first * scale_first, weight_second * scale_second
        x = torch.addcmul(e, weight_first[..., None], value[chunk.first][:, :, None])
        x = torch.addcmul(x, weight_second[..., None], value[chunk.second][:, None, :])
        updated.append(block.feed_forward(block.norm(x), dtype))
    return updated


def _dropout_scales(
    chunk: PairChunk, plan: PairPlan, dropout: EdgeDropout, layer: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    samples = plan.order.view(plan.num_blocks, plan.block_size)
    return dropout.scales(samples[chunk.first][:, :, None], samples[chunk.second][:, None, :], layer, dtype)


def edge_sum(edges: list[Tensor], plan: PairPlan) -> Tensor:
    """Partial sum over all ordered edges: (D,)."""
    return torch.stack([plan.edge_total(c, e) for c, e in zip(plan.chunks, edges, strict=True)]).sum(0)


def edge_square_sum(edges: list[Tensor], mean: Tensor, plan: PairPlan) -> Tensor:
    """Partial sum over all ordered edges of (e - mean)², (D,): a second pass, so float32 does not cancel."""
    totals = [plan.edge_total(c, (e - mean).square()) for c, e in zip(plan.chunks, edges, strict=True)]
    return torch.stack(totals).sum(0)


def read_out(
    edges: list[Tensor],
    mean: Tensor,
    variance: Tensor,
    norm: nn.BatchNorm1d,
    out: nn.Linear,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Pull coefficients sigmoid(Linear(BatchNorm(e))) per chunk; (mean, variance) are the statistics to use."""
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return [torch.sigmoid(linear((e - mean) * scale + norm.bias, out, dtype)) for e in edges]


def dense(chunks: list[Tensor], plan: PairPlan) -> Tensor:
    """The chunks of a plan that lists every pair, as one (B, B, D) tensor in the order of the samples."""
    dim = chunks[0].shape[-1]
    size = (plan.num_blocks, plan.num_blocks, plan.block_size, plan.block_size, dim)
    table = chunks[0].new_zeros(size)
    for chunk, values in zip(plan.chunks, chunks, strict=True):
        table = table.index_put((chunk.first, chunk.second), values)
        if not chunk.diagonal:
            table = table.index_put((chunk.second, chunk.first), values.transpose(1, 2))
    positions = plan.num_blocks * plan.block_size
    table = table.transpose(1, 2).reshape(positions, positions, dim)[: plan.batch_size, : plan.batch_size]
    place = torch.empty_like(plan.order[: plan.batch_size])
    place[plan.order[: plan.batch_size]] = torch.arange(plan.batch_size, device=place.device)
    return table[place][:, place]
