"""The graph network over an explicit list of all B² ordered edges: slow, plain, the oracle of every other path.

Each formula stands as the method writes it: queries per edge, a softmax by scatter, dropout per direction. The
parameters are those of `GraphNetwork`; only the arithmetic differs. Sums go through torch_scatter where it is
installed, else through torch's own `index_add` and `scatter_reduce`.
"""

import logging
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.graph.blocks import EdgeBlock, NodeBlock
from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.features import unit_centred

log = logging.getLogger(__name__)


@cache
def scatter_library() -> Any | None:
    """The torch_scatter module, or None with one notice if it is not installed or was built for another torch."""
    try:
        import torch_scatter
    except (ImportError, OSError) as error:
        log.warning(
            "torch_scatter cannot be imported (%s); backend 'scatter' uses torch's own scatter. "
            'Install it with `pip install --no-build-isolation "gcahng[scatter]"`.',
            error,
        )
        return None
    return torch_scatter


def scatter_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Row sums of (E, ...) values by (E,) index: (size, ...)."""
    library = scatter_library()
    if library is not None:
        return library.scatter_add(values, index, dim=0, dim_size=size)
    return values.new_zeros(size, *values.shape[1:]).index_add(0, index, values)


def scatter_max(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Row maxima of (E, H) values by (E,) index, 0 where a row is empty: (size, H)."""
    library = scatter_library()
    if library is not None:
        return library.scatter_max(values, index, dim=0, dim_size=size)[0]
    spread = index[:, None].expand_as(values)
    empty = values.new_zeros(size, values.shape[1])
    return empty.scatter_reduce(0, spread, values, "amax", include_self=False)


def off_by_one_softmax(scores: Tensor, index: Tensor, size: int) -> Tensor:
    """exp(s - m) / (exp(-m) + sum exp(s - m)) within each row, m = max(0, row maximum).

    Args:
        scores: (E, H).
        index: (E,) row of each score.
        size: Number of rows.
    """
    peak = scatter_max(scores.detach(), index, size).clamp_min(0)
    exponential = torch.exp(scores - peak[index])
    total = torch.exp(-peak) + scatter_sum(exponential, index, size)
    return exponential / total[index]


def node_attention(block: NodeBlock, h: Tensor, labels: Tensor) -> Tensor:
    """Attention of each node over the nodes of other classes: (B, D)."""
    size, dim = h.shape
    query_index, key_index = torch.nonzero(labels[:, None] != labels[None, :], as_tuple=True)
    query, key, value = (
        layer(h).view(size, block.num_heads, dim // block.num_heads) for layer in (block.query, block.key, block.value)
    )
    scores = (query[query_index] * key[key_index]).sum(-1) / math.sqrt(dim // block.num_heads)
    weights = off_by_one_softmax(scores, query_index, size)
    mixed = scatter_sum(weights[..., None] * value[key_index], query_index, size)
    return block.out(mixed.reshape(size, dim))


def edge_update(
    block: EdgeBlock,
    edges: Tensor,
    h: Tensor,
    row: Tensor,
    column: Tensor,
    layer: int,
    dropout: EdgeDropout | None,
) -> Tensor:
    """One edge block on the (B², D) edge list."""
    nodes = F.gelu(block.node_to_edge(h))
    query = block.query(edges)
    key, value = block.key(nodes), block.value(nodes)
    ends = torch.stack([row, column], 1)
    scores = (query[:, None] * key[ends]).sum(-1) / math.sqrt(edges.shape[1])
    weights = torch.softmax(scores, 1)
    if dropout is not None:
        weights = weights * torch.stack(dropout.scales(row, column, layer, weights.dtype), 1)
    attended = (weights[..., None] * value[ends]).sum(1)
    e = block.norm(attended + edges)
    hidden = block.ffn_out(block.ffn_norm(F.gelu(block.ffn_in(e))))
    return block.norm(hidden + e)


def initial_edges(z: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """x_i * x_j / (|x_i| |x_j|) for the listed pairs, x the channel-centred embeddings: (E, D)."""
    unit = unit_centred(z)
    return unit[row] * unit[column]


def propagate(
    z: Tensor,
    labels: Tensor,
    reduction: nn.Linear,
    node_blocks: list[NodeBlock],
    edge_blocks: list[EdgeBlock],
    dropout: EdgeDropout | None,
    *,
    message_factor: Tensor | float = 1.0,
    last_edge_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """All layers of message propagation: nodes (B, D) and edges (B², D), row i * B + j for the pair (i, j).

    `message_factor`, one number or (B, 1), multiplies the edge-to-node sums.
    """
    size = z.shape[0]
    row = torch.arange(size, device=z.device).repeat_interleave(size)
    column = torch.arange(size, device=z.device).repeat(size)
    edges = initial_edges(z, row, column)
    h = reduction(z)
    for layer, (node_block, edge_block) in enumerate(zip(node_blocks, edge_blocks, strict=True)):
        attended = node_attention(node_block, h, labels) if node_block.attends else None
        message = None
        if node_block.sums_edges:
            message = scatter_sum(F.gelu(node_block.edge_to_node(edges)), row, size) * message_factor
        h = node_block.update(h, attended, message, None)
        gradient = last_edge_gradient or layer < len(node_blocks) - 1
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
            edges = edge_update(edge_block, edges, h, row, column, layer, dropout)
    return h, edges
