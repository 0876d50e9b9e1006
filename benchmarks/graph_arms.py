"""What the graph benchmarks compare: this project's graph, and the edge list with the released code's arithmetic.

A run of an arm = metric pass (node loss, synthetic-negative loss) and generation pass (classification, similarity and
diversity loss), each forward and backward. Backbone and optimisers are left out.

Letters: P classes, K samples per class, B = P * K, D channels, L layers, H heads, N training classes.
"""

import argparse
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.generation import Interpolation, generate_negatives
from gcahng.generation.generation_loss import ConstantClassifier, LossFactors, generation_loss
from gcahng.generation.synthesis import Synthesis
from gcahng.generation.synthetic_loss import synthetic_loss
from gcahng.graph import GraphNetwork, GraphOutput, reference
from gcahng.graph.blocks import EdgeBlock
from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.pairs import class_major_plan
from gcahng.losses.synthetic import classification_loss, diversity_loss, similarity_loss, synthetic_n_pair_loss
from gcahng.random import mixing_weights

Backend = Literal["auto", "triton", "compiled", "eager"]
RULE = Interpolation(alpha=5.0, mean_metric_loss=3.0)
FACTORS = LossFactors(classification=20.0, similarity=20.0, diversity=0.6)
EXAMPLE_SIZE = "27x3-D512-L2-N100"


@dataclass(frozen=True)
class Size:
    """P classes of K samples, D channels, L layers with H heads, N training classes."""

    num_classes: int
    num_samples: int
    dim: int
    layers: int
    training_classes: int
    heads: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        """From `PxK-Dd-Ll-Nn[-Hh]`; H is 2 L if it is left out, as in the released settings."""
        match = re.fullmatch(r"(\d+)x(\d+)-D(\d+)-L(\d+)-N(\d+)(?:-H(\d+))?", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"expected a size like {EXAMPLE_SIZE}, got {text!r}")
        classes, samples, dim, layers, training = map(int, match.groups()[:5])
        heads = int(match[6] or 2 * layers)
        fits = samples >= 2 and 1 <= classes <= training and layers >= 1 and heads >= 1
        if not fits or dim < 1 or dim % heads:
            raise argparse.ArgumentTypeError(f"needs K >= 2, 1 <= P <= N, L >= 1, and H that divides D: got {text!r}")
        return cls(classes, samples, dim, layers, training, heads)

    def __str__(self) -> str:
        return f"{self.num_classes}x{self.num_samples} D{self.dim} L{self.layers} N{self.training_classes}"

    @property
    def text(self) -> str:
        """What `parse` takes."""
        return (
            f"{self.num_classes}x{self.num_samples}-D{self.dim}-L{self.layers}-N{self.training_classes}-H{self.heads}"
        )

    @property
    def batch(self) -> int:
        return self.num_classes * self.num_samples

    @property
    def edges(self) -> int:
        """Ordered edges."""
        return self.batch**2

    @property
    def floor_flop(self) -> float:
        """Operations of the leanest known algebra without recomputation, forward and backward.

        54 L - 13 times D² multiply-adds per unordered pair (self pairs included); two products of the synthetic
        negatives with the classifier (logits, and back to the negatives).
        """
        pairs = self.batch * (self.batch + 1) / 2
        edge_work = (54 * self.layers - 13) * self.dim**2 * pairs
        classifier = 2 * self.batch * self.num_classes * self.dim * self.training_classes
        return 2.0 * (edge_work + classifier)

    @property
    def reference_bytes(self) -> float:
        """About what R0 holds at once: edge tensors (a count of the live ones), and three tensors of logits."""
        edge_tensors = 62.4 * self.layers + 20.2
        logits = 3 * self.batch * self.num_classes * self.training_classes
        return 4.0 * (edge_tensors * self.edges * self.dim + logits)


@dataclass(frozen=True)
class Problem:
    """The inputs of one run, the same for all arms.

    Attributes:
        size: Its size.
        z, labels: (B, D) and (B,), group-major.
        classifier: The linear classifier of the synthetic negatives.
        edge_dropout: Law of the dropout masks.
        node_classes: Outputs of the graph's own classifier of nodes; None for N.
    """

    size: Size
    z: Tensor
    labels: Tensor
    classifier: torch.nn.Linear
    edge_dropout: Literal["tied", "independent"] = "tied"
    node_classes: int | None = None

    @classmethod
    def of(cls, size: Size, device: str, edge_dropout: Literal["tied", "independent"] = "tied") -> "Problem":
        """Embeddings that cluster by class, and a classifier, from a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            centres = torch.randn(size.num_classes, size.dim).repeat(size.num_samples, 1)
            z = centres + 0.5 * torch.randn_like(centres)
            classifier = torch.nn.Linear(size.dim, size.training_classes)
        labels = torch.arange(size.num_classes).repeat(size.num_samples)
        return cls(size, z.to(device), labels.to(device), classifier.to(device), edge_dropout)

    def graph(self, backend: Backend | Literal["scatter"]) -> GraphNetwork:
        """A graph network with the same weights for every backend."""
        size = self.size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            graph = GraphNetwork(
                size.dim,
                self.node_classes or size.training_classes,
                size.layers,
                size.heads,
                edge_dropout=self.edge_dropout,
                backend=backend,
            )
        return graph.to(self.z.device)

    def weights(self, phase: str) -> Tensor:
        """(K, K-1) mixing weights."""
        return mixing_weights(self.size.num_samples, seed=0, step=0, phase=phase, device=self.z.device)


class Arm(ABC):
    """One way to compute both passes."""

    def __init__(self, name: str, problem: Problem, graph: GraphNetwork) -> None:
        self.name = name
        self.problem = problem
        self.graph = graph
        self.keeps_metric_graph = False

    def run(self, gradients: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Both passes, forward and backward.

        Args:
            gradients: Receives copies of the gradients of both passes.
        Returns:
            Detached losses by name.
        """
        z = self.problem.z.clone().requires_grad_()
        metric = self.metric_losses(z)
        sum(metric.values(), start=z.new_zeros(())).backward(retain_graph=self.keeps_metric_graph)
        if gradients is not None:
            assert z.grad is not None
            gradients |= {"metric z": z.grad} | self._parameter_gradients("metric")
        self.graph.zero_grad(set_to_none=True)
        generation = self.generation_losses(self.problem.z)
        generation["generation"].backward()
        if gradients is not None:
            gradients |= self._parameter_gradients("generation")
        self.graph.zero_grad(set_to_none=True)
        return {name: loss.detach() for name, loss in (metric | generation).items()}

    @abstractmethod
    def metric_losses(self, z: Tensor) -> dict[str, Tensor]:
        """Forward of the metric pass; the sum of the losses is sent back."""

    @abstractmethod
    def generation_losses(self, z: Tensor) -> dict[str, Tensor]:
        """Forward of the generation pass; the loss `generation` is sent back."""

    def _parameter_gradients(self, phase: str) -> dict[str, Tensor]:
        named = self.graph.named_parameters()
        return {f"{phase} {name}": p.grad.clone() for name, p in named if p.grad is not None}


class Ours(Arm):
    """This project's graph network and losses."""

    def __init__(self, problem: Problem, precision: str, backend: Backend = "auto") -> None:
        super().__init__("ours", problem, problem.graph(backend))
        size = problem.size
        self.low = torch.bfloat16 if precision == "bf16" else None
        self.plan = class_major_plan(size.num_classes, size.num_samples, problem.z.device)
        layer = problem.classifier
        self.classifier = ConstantClassifier(layer.weight.detach(), layer.bias.detach(), self.low)

    def metric_losses(self, z: Tensor) -> dict[str, Tensor]:
        output = self._relate(z, 1, gradient=False)
        return {
            "node": F.cross_entropy(output.node_logits, self.problem.labels),
            "synthetic": synthetic_loss(z, output.coefficients, self._synthesis("metric")),
        }

    def generation_losses(self, z: Tensor) -> dict[str, Tensor]:
        output = self._relate(z, 2, gradient=True)
        class_labels = self.problem.labels[: self.problem.size.num_classes]
        found = generation_loss(
            z, output.coefficients, self._synthesis("generation"), self.classifier, class_labels, FACTORS
        )
        assert found.diversity is not None
        return {
            "classification": found.classification,
            "similarity": found.similarity,
            "diversity": found.diversity,
            "generation": found.total,
        }

    def _relate(self, z: Tensor, key: int, *, gradient: bool) -> GraphOutput:
        with torch.autocast(z.device.type, dtype=self.low, enabled=self.low is not None):
            return self.graph(z, self.problem.labels, dropout_key=key, plan=self.plan, coefficient_gradient=gradient)

    def _synthesis(self, phase: str) -> Synthesis:
        return Synthesis(self.problem.size.num_samples, RULE, self.problem.weights(phase))


class EdgeList(Arm):
    """R0: all B² ordered edges in float32, with what the released code computes and keeps.

    A query, two keys and two values per edge; the last edge block of the metric pass with a gradient graph that nobody
    uses; full tables of coefficients, synthetic negatives and logits; the gradient of the classifier's weights, which
    is thrown away; the metric pass's graph kept until the iteration ends (`retain_graph`).
    """

    def __init__(self, problem: Problem, name: str = "R0", *, tf32: bool = False, lean: bool = False) -> None:
        """
        Args:
            tf32: Products in TF32 (CUDA): R1.
            lean: No gradient graph that nobody uses, and the metric pass's graph freed by its backward pass.
        """
        super().__init__(name, problem, problem.graph("scatter"))
        self.precision = "high" if tf32 else "highest"
        self.lean = lean
        self.keeps_metric_graph = not lean
        self._unused: Tensor | None = None

    def run(self, gradients: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        with released_arithmetic(), product_precision(self.precision):
            losses = super().run(gradients)
        self.problem.classifier.zero_grad(set_to_none=True)
        return losses

    def metric_losses(self, z: Tensor) -> dict[str, Tensor]:
        logits, coefficients = self._relate(z, 1, gradient=not self.lean)
        if not self.lean:
            # A variable of the released code holds them, graph and all, until the second pass has made new ones.
            self._unused = coefficients
        synthetic = self._synthesise(z, coefficients.detach(), "metric")
        return {
            "node": F.cross_entropy(logits, self.problem.labels),
            "synthetic": synthetic_n_pair_loss(z, synthetic),
        }

    def generation_losses(self, z: Tensor) -> dict[str, Tensor]:
        _, coefficients = self._relate(z, 2, gradient=True)
        self._unused = None
        synthetic = self._synthesise(z, coefficients, "generation")
        class_labels = self.problem.labels[: self.problem.size.num_classes]
        losses = {
            "classification": classification_loss(self.problem.classifier(synthetic), class_labels),
            "similarity": similarity_loss(z, synthetic),
            "diversity": diversity_loss(coefficients),
        }
        total = (
            FACTORS.classification * losses["classification"]
            + FACTORS.similarity * losses["similarity"]
            + FACTORS.diversity * losses["diversity"]
        )
        return losses | {"generation": 0.5 * total}

    def _relate(self, z: Tensor, key: int, *, gradient: bool) -> tuple[Tensor, Tensor]:
        output = self.graph(z, self.problem.labels, dropout_key=key, coefficient_gradient=gradient)
        return output.node_logits, output.pull_coefficients

    def _synthesise(self, z: Tensor, coefficients: Tensor, phase: str) -> Tensor:
        return generate_negatives(
            z,
            self.problem.labels,
            coefficients,
            alpha=RULE.alpha,
            mean_metric_loss=RULE.mean_metric_loss,
            weights=self.problem.weights(phase),
        )


def edge_update_per_edge(
    block: EdgeBlock,
    edges: Tensor,
    h: Tensor,
    row: Tensor,
    column: Tensor,
    layer: int,
    dropout: EdgeDropout | None,
) -> Tensor:
    """`gcahng.graph.reference.edge_update` with keys and values computed for each end of each edge."""
    ends = F.gelu(block.node_to_edge(h))[torch.stack([row, column], 1)]
    query, key, value = block.query(edges), block.key(ends), block.value(ends)
    weights = torch.softmax((query[:, None] * key).sum(-1) / math.sqrt(edges.shape[1]), 1)
    if dropout is not None:
        weights = weights * torch.stack(dropout.scales(row, column, layer, weights.dtype), 1)
    e = block.norm((weights[..., None] * value).sum(1) + edges)
    return block.norm(block.ffn_out(block.ffn_norm(F.gelu(block.ffn_in(e)))) + e)


def arm_named(name: str, problem: Problem, precision: str, backend: Backend = "auto") -> Arm:
    """`ours`, `R0`, `R1` (R0 with TF32) or `R0 lean`."""
    if name == "ours":
        return Ours(problem, precision, backend)
    return EdgeList(problem, name, tf32=name == "R1", lean=name == "R0 lean")


@contextmanager
def released_arithmetic() -> Iterator[None]:
    """Let the edge list compute what the released code computes."""
    original = reference.edge_update
    reference.edge_update = edge_update_per_edge
    try:
        yield
    finally:
        reference.edge_update = original


@contextmanager
def product_precision(name: str) -> Iterator[None]:
    """Precision of float32 matrix products: "highest" is float32, "high" TF32 where the device has it."""
    original = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(original)
