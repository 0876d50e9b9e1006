"""Time of the graph's two passes in one training iteration: unordered pairs against the edge list.

    python benchmarks/graph_step.py [--device cpu|cuda] [--precision fp32|bf16] [--json FILE] [--sizes SIZE ...]

One run = metric pass (node loss, synthetic-negative loss with constant coefficients) and generation pass
(classification, similarity and diversity loss), each with its backward. Backbone and optimisers are left out. Both
backends compute the same losses, which is checked first; their runs alternate, so that a busy machine slows both.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.generation import Interpolation
from gcahng.generation.block_losses import (
    coefficient_row_sums,
    coefficient_spread,
    generation_sums,
    synthetic_scores,
)
from gcahng.generation.block_synthesis import BatchSynthesis, class_major_plan
from gcahng.graph import GraphNetwork
from gcahng.graph.precision import autocast_dtype, product
from gcahng.graph.reference import scatter_library
from gcahng.losses import diversity_from_spread, synthetic_loss_from_scores
from gcahng.random import mixing_weights

DEFAULT_SIZES = ("27x3-D512-L2-N100", "40x2-D512-L1-N100")
# Losses of the two backends, relative: float32 sums in another order; bfloat16 lowers other operands in each.
AGREEMENT = {"fp32": 1e-4, "bf16": 4e-2}


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
            raise argparse.ArgumentTypeError(f"expected a size like {DEFAULT_SIZES[0]}, got {text!r}")
        classes, samples, dim, layers, training = map(int, match.groups()[:5])
        size = cls(classes, samples, dim, layers, training, int(match[6] or 2 * layers))
        if size.num_samples < 2 or not 1 <= size.num_classes <= size.training_classes or dim % size.heads:
            raise argparse.ArgumentTypeError(f"needs K >= 2, 1 <= P <= N, and H that divides D: got {text!r}")
        return size

    def __str__(self) -> str:
        return f"{self.num_classes}x{self.num_samples} D{self.dim} L{self.layers} N{self.training_classes}"


@dataclass(frozen=True)
class Problem:
    """The inputs of one run, the same for both backends."""

    size: Size
    z: Tensor
    labels: Tensor
    classifier: torch.nn.Linear
    low: torch.dtype | None

    @classmethod
    def of(cls, size: Size, device: str, precision: str) -> "Problem":
        """Embeddings that cluster by class, and a classifier, from a fixed seed."""
        torch.manual_seed(0)
        centres = torch.randn(size.num_classes, size.dim).repeat(size.num_samples, 1)
        z = centres + 0.5 * torch.randn_like(centres)
        labels = torch.arange(size.num_classes).repeat(size.num_samples)
        classifier = torch.nn.Linear(size.dim, size.training_classes).requires_grad_(False)
        low = torch.bfloat16 if precision == "bf16" else None
        return cls(size, z.to(device), labels.to(device), classifier.to(device), low)

    def graph(self, backend: str) -> GraphNetwork:
        """A graph network with the same weights for every backend."""
        size = self.size
        torch.manual_seed(1)
        graph = GraphNetwork(size.dim, size.training_classes, size.layers, size.heads, backend=backend)
        return graph.to(self.z.device)


def both_passes(problem: Problem, graph: GraphNetwork) -> dict[str, Tensor]:
    """One run, forward and backward; the losses by name."""
    size = problem.size
    plan = class_major_plan(size.num_classes, size.num_samples, problem.z.device)
    rule = Interpolation(alpha=5.0, mean_metric_loss=3.0)
    batch_size = problem.z.shape[0]
    losses: dict[str, Tensor] = {}

    def weights(phase: str) -> Tensor:
        return mixing_weights(size.num_samples, seed=0, step=0, phase=phase, device=problem.z.device)

    def relate(z: Tensor, key: int, *, gradient: bool) -> tuple[Tensor, BatchSynthesis, object]:
        with torch.autocast(z.device.type, dtype=problem.low, enabled=problem.low is not None):
            output = graph(z, problem.labels, dropout_key=key, plan=plan, coefficient_gradient=gradient)
        assert output.coefficients is not None
        phase = "generation" if gradient else "metric"
        batch = BatchSynthesis.of(z, plan, size.num_samples, rule, weights(phase))
        return output.node_logits, batch, output.coefficients

    def classify(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=problem.low, enabled=problem.low is not None):
            return product(x, problem.classifier.weight, problem.classifier.bias, autocast_dtype(x))

    z = problem.z.clone().requires_grad_()
    logits, batch, coefficients = relate(z, 1, gradient=False)
    partial = synthetic_scores(batch, coefficients)  # type: ignore[arg-type]
    losses["node"] = F.cross_entropy(logits, problem.labels)
    losses["synthetic"] = synthetic_loss_from_scores(z, partial.scores, partial.square_sum, size.num_samples)
    (losses["node"] + losses["synthetic"]).backward()

    graph.zero_grad(set_to_none=True)
    _, batch, coefficients = relate(problem.z, 2, gradient=True)
    class_labels = problem.labels[: size.num_classes]
    sums = generation_sums(batch, coefficients, class_labels, classify)  # type: ignore[arg-type]
    entries = batch_size * size.num_classes
    losses["classification"] = sums.classification / entries
    losses["similarity"] = sums.similarity / entries
    row_mean = coefficient_row_sums(coefficients, plan) / batch_size  # type: ignore[arg-type]
    spread = coefficient_spread(coefficients, row_mean, plan)  # type: ignore[arg-type]
    losses["diversity"] = diversity_from_spread(spread, batch_size)
    (10 * losses["classification"] + 10 * losses["similarity"] + 0.3 * losses["diversity"]).backward()
    graph.zero_grad(set_to_none=True)
    return {name: loss.detach() for name, loss in losses.items()}


def check_agreement(problem: Problem, graphs: dict[str, GraphNetwork], tolerance: float) -> None:
    """Stop unless both backends compute the same losses.

    Raises:
        RuntimeError: They do not.
    """
    ours, reference = (both_passes(problem, graphs[backend]) for backend in ("pairs", "scatter"))
    for name, want in reference.items():
        difference = abs(float(ours[name] - want)) / max(abs(float(want)), 1e-2)
        if not difference <= tolerance:
            raise RuntimeError(f"{problem.size}: the {name} losses differ by {difference:.1e} > {tolerance:.0e}.")


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one run."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(size: Size, device: str, precision: str, repeats: int) -> list[dict[str, object]]:
    """One row per backend: median seconds, and the reference's median over it."""
    problem = Problem.of(size, device, precision)
    graphs = {backend: problem.graph(backend) for backend in ("scatter", "pairs")}
    check_agreement(problem, graphs, AGREEMENT[precision])
    times: dict[str, list[float]] = {backend: [] for backend in graphs}
    for number in range(repeats + 1):
        for backend, graph in graphs.items():
            spent = seconds(lambda graph=graph: both_passes(problem, graph), device)  # type: ignore[misc]
            if number:  # the first round warms up
                times[backend].append(spent)
    medians = {backend: statistics.median(spent) for backend, spent in times.items()}
    library = "torch scatter" if scatter_library() is None else "torch_scatter"
    labels = {"scatter": f"edge list ({library})", "pairs": "pairs"}
    for backend, spent in times.items():
        print(
            f"{size}  {labels[backend]:<26} median {medians[backend]:.4f} s  "
            f"({min(spent):.4f} to {max(spent):.4f})  ratio {medians['scatter'] / medians[backend]:.2f}"
        )
    return [
        {
            "name": f"graph step, {labels[backend]}, {device} {precision} {size}",
            "value": medians[backend],
            "unit": "s",
            "ratio": medians["scatter"] / medians[backend],
        }
        for backend in graphs
    ]


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure every size, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--sizes", nargs="+", type=Size.parse, default=[Size.parse(s) for s in DEFAULT_SIZES])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each backend")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1: got {options.repeats}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.precision}, {torch.get_num_threads()} threads")
    rows = [row for size in options.sizes for row in measure(size, options.device, options.precision, options.repeats)]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
