"""A sparse graph and its losses over all pairs with a mask of the edges kept: plain autograd, a witness in float64.

Letters: B samples group-major, P classes, K samples per class, D channels, L layers; `kept` is (B, B) bool.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.generation import generate_negatives
from gcahng.graph import GraphNetwork
from gcahng.graph.blocks import EdgeBlock, NodeBlock
from gcahng.graph.dropout import EdgeDropout


def chosen_by_loops(z: Tensor, num_samples: int, k: int) -> list[list[int]]:
    """Sample by sample and class by class, in the words of the definition."""
    num_classes = z.shape[0] // num_samples
    unit = [row / row.norm() for row in z]
    chosen = []
    for i in range(z.shape[0]):
        nearness = {
            p: max(float(unit[i] @ unit[g * num_classes + p]) for g in range(num_samples))
            for p in range(num_classes)
            if p != i % num_classes
        }
        chosen.append(sorted(sorted(nearness, key=lambda p: (-nearness[p], p))[:k]))
    return chosen


def kept_by_loops(z: Tensor, num_samples: int, k: int) -> Tensor:
    """(B, B) bool, the edges of the sparse graph."""
    num_classes = z.shape[0] // num_samples
    connected = torch.eye(num_classes, dtype=torch.bool)
    for i, classes in enumerate(chosen_by_loops(z, num_samples, k)):
        for p in classes:
            connected[i % num_classes, p] = connected[p, i % num_classes] = True
    return connected.repeat(num_samples, num_samples)


def _node_attention(block: NodeBlock, h: Tensor, apart: Tensor) -> Tensor:
    def heads(layer: torch.nn.Module) -> Tensor:
        return layer(h).unflatten(1, (block.num_heads, -1)).transpose(0, 1)

    query, key, value = heads(block.query), heads(block.key), heads(block.value)
    weight = torch.exp(query @ key.mT / math.sqrt(query.shape[-1])) * apart
    mixed = (weight @ value) / (1 + weight.sum(-1, keepdim=True))
    return block.out(mixed.transpose(0, 1).flatten(1))


def _node_update(block: NodeBlock, h: Tensor, edges: Tensor, kept: Tensor, apart: Tensor, factor: Tensor) -> Tensor:
    if block.attends:
        h = block.norm(h + _node_attention(block, h, apart))
    if block.sums_edges:
        messages = F.gelu(block.edge_to_node(edges)) * kept[..., None]
        h = block.norm(h + messages.sum(1) * factor)
    return block.norm(h + block.ffn_out(F.gelu(block.ffn_in(h))))


def _edge_update(block: EdgeBlock, h: Tensor, edges: Tensor, layer: int, dropout: EdgeDropout | None) -> Tensor:
    nodes = F.gelu(block.node_to_edge(h))
    query, key, value = block.query(edges), block.key(nodes), block.value(nodes)
    scores = torch.stack([(query * key[:, None]).sum(-1), (query * key[None]).sum(-1)]) / math.sqrt(h.shape[1])
    weights = scores.softmax(0)
    if dropout is not None:
        index = torch.arange(h.shape[0])
        weights = weights * torch.stack(dropout.scales(index[:, None], index[None], layer, h.dtype))
    edges = block.norm(weights[0][..., None] * value[:, None] + weights[1][..., None] * value[None] + edges)
    return block.norm(block.ffn_out(block.ffn_norm(F.gelu(block.ffn_in(edges)))) + edges)


def masked_graph(
    graph: GraphNetwork, z: Tensor, labels: Tensor, kept: Tensor, dropout: EdgeDropout | None = None
) -> tuple[Tensor, Tensor]:
    """Node logits (B, N) and pull coefficients (B, B, D), of which those of edges not kept mean nothing.

    Training mode; the running statistics of the read-outs move.
    """
    centred = z - z.mean(1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True)
    edges = unit[:, None] * unit[None]
    h = graph.reduction(z)
    apart = (kept & (labels[:, None] != labels)).to(z.dtype)
    degree = kept.sum(1, keepdim=True).to(z.dtype)
    factor = {"sum": degree / degree, "mean": 1 / degree, "scaled": 80 / degree}[graph.edge_aggregation]
    for layer, (node, edge) in enumerate(zip(graph.node_blocks, graph.edge_blocks, strict=True)):
        h = _node_update(node, h, edges, kept, apart, factor)
        edges = _edge_update(edge, h, edges, layer, dropout)
    logits = graph.node_classifier(graph.node_norm(h))
    coefficients = torch.zeros_like(edges)
    coefficients[kept] = torch.sigmoid(graph.edge_out(graph.edge_norm(edges[kept])))
    return logits, coefficients


class MaskedLosses:
    """The losses on synthetic negatives over the entries (anchor, class) that a mask keeps."""

    def __init__(
        self, z: Tensor, coefficients: Tensor | None, kept: Tensor, weights: Tensor, alpha: float, mean_loss: float
    ) -> None:
        """
        Args:
            z: (B, D).
            coefficients: (B, B, D), or None for 1.
            kept: (B, B) bool.
            weights: (K, K-1) mixing weights.
            alpha, mean_loss: Of the interpolation.
        """
        num_classes = len(z) // len(weights)
        order = torch.arange(num_classes).repeat(len(weights))
        self.synthetic = generate_negatives(
            z, order, coefficients, alpha=alpha, mean_metric_loss=mean_loss, weights=weights
        )
        self.z, self.kept, self.coefficients = z, kept, coefficients
        self.num_classes, self.num_samples = num_classes, len(weights)
        # Group 0 holds one sample of each class; whole class blocks are kept or not.
        self.entries = kept[:, :num_classes]
        self.other = order[:, None] != torch.arange(num_classes)

    def synthetic_loss(self) -> Tensor:
        """J_syn."""
        positive = self.z.roll(-self.num_classes, 0)
        candidates = torch.where(self.other[..., None], self.synthetic, positive[:, None])
        scores = (self.z[:, None] * candidates).sum(-1).masked_fill(~self.entries, -torch.inf)
        own = torch.arange(len(self.z)) % self.num_classes
        lengths = self.z.square().sum(1).mean() + candidates.square().sum(-1)[self.entries].mean()
        return F.cross_entropy(scores, own) + 3e-3 * 0.25 * lengths

    def classification(self, classifier: torch.nn.Linear, class_labels: Tensor) -> Tensor:
        """J_cls."""
        targets = class_labels.expand(self.entries.shape)[self.entries]
        return F.cross_entropy(classifier(self.synthetic[self.entries]), targets)

    def similarity(self) -> Tensor:
        """J_sim."""
        away = 1 - F.cosine_similarity(self.z[:, None], self.synthetic, dim=-1)
        return (away * self.other)[self.entries].mean()

    def diversity(self) -> Tensor:
        """J_div."""
        assert self.coefficients is not None
        kept = self.kept[..., None].to(self.z.dtype)
        mean = (self.coefficients * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        return 1 - torch.sqrt(((self.coefficients - mean).square() * kept).sum() / self.kept.sum())
