"""What a training step costs one of W ranks, as formulas, and what times follow from stated speeds.

`docs/scaling.md` says where they come from; `scaling.py` counts the same things and stops where a count differs.

Letters: B = P * K samples of the global batch, P classes, K samples per class, D channels, L layers, N training
classes, W ranks, R rows of a rank's edge buffer. Backbone left out.
"""

import math
from dataclasses import dataclass

FLOAT = 4


@dataclass(frozen=True)
class Costs:
    """One step of one rank.

    Attributes:
        num_classes, num_samples, dim, layers, training_classes, ranks: P, K, D, L, N, W.
    """

    num_classes: int
    num_samples: int
    dim: int
    layers: int
    training_classes: int
    ranks: int

    @property
    def batch(self) -> int:
        return self.num_classes * self.num_samples

    @property
    def pairs(self) -> float:
        """Unordered pairs of samples that a rank computes, itself with itself included: R without any waste."""
        return self.batch * (self.batch + 1) / 2 / self.ranks

    def edge_flop(self, rows: float, *, kept: bool = True) -> float:
        """Operations on the rows of the edge buffer, both passes.

        Args:
            rows: R.
            kept: Whether hidden layers and messages are kept for the backward pass; else they are computed again.
        """
        again = 0 if kept else 4 * (2 * self.layers - 1) + 2 * self.layers
        return 2 * rows * self.dim**2 * (54 * self.layers - 13 + again)

    def judge_flop(self, entries: float | None = None) -> float:
        """Operations of classifying synthetic negatives: forward, and back to the negatives.

        Args:
            entries: Synthetic negatives of the rank, padding included; B P / W by default.
        """
        entries = self.batch * self.num_classes / self.ranks if entries is None else entries
        return 2 * 2 * entries * self.dim * self.training_classes

    @property
    def node_flop(self) -> float:
        """Operations that every rank repeats: node stream, classifiers of nodes and embeddings, N-pair loss."""
        weights = (96 * self.layers - 3) * self.dim**2 + 6 * self.dim * self.training_classes
        n_pair = 3 * self.num_classes**2 * (self.num_samples - 1) * self.dim
        return 2 * (self.batch * weights + n_pair)

    @property
    def attention_flop(self) -> float:
        """Operations of the nodes' attention, which every rank repeats; scores are computed again on the way back."""
        return 2 * 14 * self.layers * self.batch * (self.batch + 1) * self.dim

    def edge_bytes(self, rows: float, *, kept: bool = True, size: int = FLOAT) -> float:
        """Edge buffers of the generation pass, the larger one, at their peak.

        Every layer's edges; then their logits and, if kept, the finished edges of the last one, or on the way back two
        gradients of edges.

        Args:
            rows: R.
            kept: Whether finished edges are kept for the backward pass, in float32.
            size: Bytes per number of the buffers.
        """
        forward = (self.layers + 1) * size + FLOAT * kept
        backward = (self.layers + 2) * size if self.layers > 1 else 0
        return rows * self.dim * max(forward, backward)

    @property
    def sent_bytes(self) -> float:
        """What a rank sends for the global batch and its graph in rings, in float32: O(B D L), and O(B W) beside it."""
        padded = -(-self.num_classes // self.ranks) * self.ranks * self.num_samples
        gathered = (2 * self.dim + 1) * padded
        # Messages both ways in both passes, and the rows' means; scores of each rank's candidates both ways.
        nodes = self.batch * ((4 * self.layers + 1) * self.dim + 2 * self.ranks)
        statistics = 6 * self.dim + 6
        return FLOAT * (self.ranks - 1) / self.ranks * (gathered + 2 * (nodes + statistics))

    def gradient_bytes(self, moved: float) -> float:
        """What a rank sends for the mean of parameter gradients in rings, in float32.

        Args:
            moved: Numbers of parameters, those of the graph twice: both passes move them.
        """
        return FLOAT * 2 * (self.ranks - 1) / self.ranks * moved

    @property
    def graph_parameters(self) -> int:
        """Numbers that both passes move, about."""
        return (self.layers * 25 + 2) * self.dim**2

    @property
    def collectives(self) -> int:
        """Messages between devices, each of which waits for the one in front of it; parameter gradients left out."""
        gathered, metric, generation = 3, 2 * self.layers + 6, 2 * self.layers + 7
        return gathered + metric + generation if self.ranks > 1 else 0


@dataclass(frozen=True)
class Machine:
    """Speeds that a prediction assumes, per GPU.

    Attributes:
        edge_flops, node_flops: Operations per second that the edge stage and the node stream reach.
        node_size: GPUs of one machine.
        link_inside, link: Bytes per second that a rank sends in a ring within a machine, and between several.
        latency: Seconds that a collective takes within a machine however small it is.
        latency_per_doubling: Seconds more each time the machines double.
    """

    edge_flops: float
    node_flops: float
    node_size: int
    link_inside: float
    link: float
    latency: float
    latency_per_doubling: float

    def link_of(self, ranks: int) -> float:
        return self.link_inside if ranks <= self.node_size else self.link

    def collective_seconds(self, ranks: int) -> float:
        doublings = math.log2(max(1, ranks / self.node_size))
        return self.latency + self.latency_per_doubling * doublings


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step of the graph, in parts that follow one after the other."""

    edges: float
    nodes: float
    sending: float
    latency: float

    @property
    def total(self) -> float:
        return self.edges + self.nodes + self.sending + self.latency


def predict(costs: Costs, machine: Machine) -> Prediction:
    """What the formulas and the speeds say, with nothing overlapped and parameter gradients of the graph included."""
    gradients = costs.gradient_bytes(2 * costs.graph_parameters)
    return Prediction(
        edges=(costs.edge_flop(costs.pairs, kept=False) + costs.judge_flop()) / machine.edge_flops,
        nodes=(costs.node_flop + costs.attention_flop) / machine.node_flops,
        sending=(costs.sent_bytes + gradients) / machine.link_of(costs.ranks),
        latency=costs.collectives * machine.collective_seconds(costs.ranks),
    )
