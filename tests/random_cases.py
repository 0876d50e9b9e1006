"""Sizes, switches, weights and batches drawn afresh in every run; a failure names the seed that repeats it."""

import os
import random
from dataclasses import dataclass

import torch
from maths_cases import Size, generator, results
from torch import Tensor

from gcahng.graph import GraphNetwork, PairPlan, pair_plan
from gcahng.graph.pairs import class_major_plan

# Channels and the classes that keep a case small. One class alone is left out: its nodes see nobody, and a read-out
# normalised over so few is ill-conditioned in any precision.
CLASSES = {64: (3, 5, 7), 384: (3,), 512: (3,)}


def fresh_seed() -> int:
    """A new seed, or the one of TEST_SEED."""
    return int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**31)))


@dataclass(frozen=True)
class Case:
    """One drawn case.

    Attributes:
        size: Sizes.
        options: Switches of the graph network.
        keep_bytes: What its edge operations may keep.
        plan: Block pairs.
        z, labels: The batch, in float64.
        key: Of the dropout masks.
        seed: Of all of this.
    """

    size: Size
    options: dict[str, object]
    keep_bytes: int
    plan: PairPlan | None
    z: Tensor
    labels: Tensor
    key: int
    seed: int

    def __str__(self) -> str:
        return f"TEST_SEED={self.seed} {self.size} {self.options} keep_bytes={self.keep_bytes}"

    def graph(self, backend: str, *, moved: bool = True) -> GraphNetwork:
        """The network in float64: started as always, then every weight moved by a part of its own size."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            graph = GraphNetwork(
                self.size.dim, 11, self.size.layers, self.size.heads, backend=backend, **self.options
            ).double()  # type: ignore[arg-type]
        graph.keep_bytes = self.keep_bytes
        if not moved:
            return graph
        draw = generator(self.seed)
        with torch.no_grad():
            for parameter in graph.parameters():
                scale = 0.3 * parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.2
                parameter.add_(scale * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        return graph

    def results(self, backend: str, dtype: torch.dtype, *, moved: bool = True) -> dict[str, Tensor]:
        """Outputs and all gradients, see `maths_cases.results`."""
        graph = self.graph(backend, moved=moved).to(dtype)
        return results(graph, self.z.to(dtype), self.labels, dropout_key=self.key, plan=self.plan)


def draw_case(seed: int, dim: int) -> Case:
    """The case of a seed with D = dim."""
    rng = random.Random(seed)
    heads = rng.choice([h for h in range(1, 9) if dim % h == 0])
    size = Size(rng.choice(CLASSES[dim]), rng.randint(2, 4), dim, rng.randint(1, 2), heads)
    options: dict[str, object] = {
        "dropout": rng.choice([0.0, 0.1, 0.5]),
        "edge_dropout": rng.choice(["tied", "independent"]),
        "norm": rng.choice(["gelu_layer_norm", "gelu_layer_norm", "layer_norm"]),
        "edge_aggregation": rng.choice(["sum", "mean", "scaled"]),
        "node_propagation": rng.random() < 0.9,
        "edge_to_node": rng.random() < 0.9,
    }
    draw = generator(seed)
    centres = torch.randn(size.num_classes, dim, generator=draw, dtype=torch.float64)
    noise = torch.randn(size.batch, dim, generator=draw, dtype=torch.float64)
    order = torch.randperm(size.batch, generator=draw)
    plan = rng.choice(
        [
            None,
            class_major_plan(size.num_classes, size.num_samples),
            pair_plan(order, rng.randint(1, size.batch + 2), edges_per_chunk=rng.choice([1, 30, 1024])),
        ]
    )
    labels = torch.randperm(11, generator=draw)[: size.num_classes].repeat(size.num_samples)
    z = centres.repeat(size.num_samples, 1) + rng.uniform(0.1, 1.5) * noise
    keep_bytes = rng.choice([0, 1 << 40])
    return Case(size, options, keep_bytes, plan, z, labels, rng.randrange(2**63), seed)
