"""Time of the graph's two passes in one training iteration: unordered pairs against the edge list.

    python benchmarks/graph_step.py [--device cpu|cuda] [--precision fp32|bf16] [--json FILE] [--sizes SIZE ...]

One run = metric pass (node loss, synthetic-negative loss with constant coefficients) and generation pass
(classification, similarity and diversity loss), each with its backward. Backbone and optimisers are left out. Three
arms compute the same losses, which is checked first; their runs alternate, so that a busy machine slows all:

- pairs: backend `pairs`;
- edge list: backend `scatter`, which computes keys and values once per node;
- edge list as released: the same with keys and values per edge, the arithmetic of the released code.
"""

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
from gcahng.graph import Coefficients, GraphNetwork, reference
from gcahng.graph.blocks import EdgeBlock
from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.precision import autocast_dtype, product
from gcahng.losses import diversity_from_spread, synthetic_loss_from_scores
from gcahng.random import mixing_weights

DEFAULT_SIZES = ("27x3-D512-L2-N100", "40x2-D512-L1-N100")
# Losses of the arms, relative: float32 sums in another order; bfloat16 lowers other operands in each.
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
    """The inputs of one run, the same for all arms."""

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

    def graph(self, backend: Literal["pairs", "scatter"]) -> GraphNetwork:
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

    def relate(z: Tensor, key: int, *, gradient: bool) -> tuple[Tensor, BatchSynthesis, Coefficients]:
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
    partial = synthetic_scores(batch, coefficients)
    losses["node"] = F.cross_entropy(logits, problem.labels)
    losses["synthetic"] = synthetic_loss_from_scores(z, partial.scores, partial.square_sum, size.num_samples)
    (losses["node"] + losses["synthetic"]).backward()

    graph.zero_grad(set_to_none=True)
    _, batch, coefficients = relate(problem.z, 2, gradient=True)
    class_labels = problem.labels[: size.num_classes]
    sums = generation_sums(batch, coefficients, class_labels, classify)
    entries = batch_size * size.num_classes
    losses["classification"] = sums.classification / entries
    losses["similarity"] = sums.similarity / entries
    row_mean = coefficient_row_sums(coefficients, plan) / batch_size
    spread = coefficient_spread(coefficients, row_mean, plan)
    losses["diversity"] = diversity_from_spread(spread, batch_size)
    (10 * losses["classification"] + 10 * losses["similarity"] + 0.3 * losses["diversity"]).backward()
    graph.zero_grad(set_to_none=True)
    return {name: loss.detach() for name, loss in losses.items()}


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


@contextmanager
def released_arithmetic() -> Iterator[None]:
    """Let the edge list compute what the released code computes."""
    original = reference.edge_update
    reference.edge_update = edge_update_per_edge
    try:
        yield
    finally:
        reference.edge_update = original


def arms(problem: Problem) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """The runs to compare, by name."""
    pairs, listed = problem.graph("pairs"), problem.graph("scatter")

    def as_released() -> dict[str, Tensor]:
        with released_arithmetic():
            return both_passes(problem, listed)

    return {
        "pairs": lambda: both_passes(problem, pairs),
        "edge list": lambda: both_passes(problem, listed),
        "edge list as released": as_released,
    }


def check_agreement(losses: dict[str, dict[str, Tensor]], size: Size, tolerance: float) -> None:
    """Stop unless all arms compute the same losses.

    Raises:
        RuntimeError: They do not.
    """
    for arm, found in losses.items():
        for name, want in losses["edge list as released"].items():
            difference = abs(float(found[name] - want)) / max(abs(float(want)), 1e-2)
            if not difference <= tolerance:
                raise RuntimeError(f"{size}: the {name} loss of {arm} is off by {difference:.1e} > {tolerance:.0e}.")


def time_once(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall time and processor time of one run in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(size: Size, device: str, precision: str, repeats: int) -> list[dict[str, object]]:
    """One row per edge list: median wall seconds of `pairs`, and how many times as long the edge list takes.

    The ratio is the median over rounds of neighbouring runs, which a load that comes and goes hardly moves.
    """
    runs = arms(Problem.of(size, device, precision))
    # This round also warms up.
    check_agreement({arm: run() for arm, run in runs.items()}, size, AGREEMENT[precision])
    rounds = [{arm: time_once(run, device) for arm, run in runs.items()} for _ in range(repeats)]
    library = "torch's own scatter" if reference.scatter_library() is None else "torch_scatter"
    rows: list[dict[str, object]] = []
    for arm in runs:
        walls = [each[arm][0] for each in rounds]
        wall_ratio, processor_ratio = (
            statistics.median(each[arm][clock] / each["pairs"][clock] for each in rounds) for clock in (0, 1)
        )
        print(
            f"{size!s:<20} {arm:<22} {statistics.median(walls):8.4f} s ({min(walls):.4f} to {max(walls):.4f})  "
            f"{wall_ratio:5.2f} x pairs (processor time {processor_ratio:.2f})"
        )
        if arm != "pairs":
            rows.append(
                {
                    "name": f"graph step, pairs over {arm} ({library}), {device} {precision} {size}",
                    "value": statistics.median(each["pairs"][0] for each in rounds),
                    "unit": "s",
                    "ratio": wall_ratio,
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure every size, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--sizes", nargs="+", type=Size.parse, default=[Size.parse(s) for s in DEFAULT_SIZES])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each arm")
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
