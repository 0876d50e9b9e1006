"""Random batches, graph networks and the error measure that the tests of the maths share.

The measure is that of the golden files (`golden_replay.Comparison`): the largest difference over the largest wanted
value, the latter at least 1e-3 of the largest in the same family (all gradients of a module).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from golden_replay import Comparison
from torch import Tensor

from gcahng.graph import GraphNetwork, PairPlan
from gcahng.graph.pairs import class_major_plan

# Between two paths of our own in float64 (method, section on golden files).
OWN_PATHS = 1e-10


@dataclass(frozen=True)
class Size:
    """P classes, K samples, D channels, L layers, H heads, N training classes."""

    num_classes: int
    num_samples: int
    dim: int
    layers: int
    heads: int
    training_classes: int = 11

    def __str__(self) -> str:
        return f"{self.num_classes}x{self.num_samples}-D{self.dim}-L{self.layers}-H{self.heads}"

    @property
    def batch(self) -> int:
        return self.num_classes * self.num_samples


# Odd and even P, every K and L, one to eight heads, D that is no power of two. Their plans on the CPU have one class
# per block and no padding: tests of padding make plans of their own.
SIZES = (
    Size(2, 2, 4, 1, 1),
    Size(7, 2, 12, 1, 2),
    Size(5, 3, 16, 2, 4),
    Size(3, 4, 24, 2, 3),
    Size(9, 3, 8, 3, 8),
    Size(13, 2, 20, 2, 1),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(size: Size, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings (B, D) in float64 that cluster by class, group-major labels (B,)."""
    draw = generator(seed)
    classes = torch.randperm(size.training_classes + size.num_classes, generator=draw)
    classes = classes[: size.num_classes] % size.training_classes
    if classes.unique().numel() < size.num_classes:
        classes = torch.arange(size.num_classes)
    centres = torch.randn(size.num_classes, size.dim, generator=draw, dtype=torch.float64)
    noise = torch.randn(size.batch, size.dim, generator=draw, dtype=torch.float64)
    return centres.repeat(size.num_samples, 1) + 0.7 * noise, classes.repeat(size.num_samples)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Move every trained parameter off its start, so that no zero bias or unit weight hides a mistake."""
    draw = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.add_(0.2 * noise.to(parameter.dtype))


def graph_of(size: Size, seed: int = 0, **options: object) -> GraphNetwork:
    """A graph network in float64 with random parameters, the same for every backend."""
    training_classes = max(size.training_classes, size.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        graph = GraphNetwork(size.dim, training_classes, size.layers, size.heads, **options)  # type: ignore[arg-type]
    graph.double()
    randomise(graph, seed + 1)
    with torch.no_grad():
        # Frozen at zero in training, but a loaded state may hold others.
        for number, norm in enumerate((graph.edge_norm, graph.node_norm)):
            norm.bias.copy_(0.2 * torch.randn(size.dim, generator=generator(number), dtype=torch.float64))
    return graph


def plan_of(size: Size) -> PairPlan:
    return class_major_plan(size.num_classes, size.num_samples)


def results(graph: GraphNetwork, z: Tensor, labels: Tensor, *, seed: int = 5, **call: object) -> dict[str, Tensor]:
    """Outputs of a graph and the gradients of a random functional of them, by name.

    The functional weighs the two directions of a pair differently and reaches every parameter.
    """
    graph.zero_grad(set_to_none=True)
    z = z.detach().clone().requires_grad_()
    output = graph(z, labels, **call)
    # Also of a plan that lists some pairs only.
    table = output.coefficients.table()
    draw = generator(seed)
    mix_nodes, mix_pairs = (
        torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.dtype) for t in (output.node_logits, table)
    )
    ((output.node_logits * mix_nodes).sum() + (table * mix_pairs).sum()).backward()
    assert z.grad is not None
    found = {"node_logits": output.node_logits, "coefficients": table, "gradient z": z.grad}
    for name, parameter in graph.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[f"gradient {name}"] = parameter.grad
    for name, buffer in graph.named_buffers():
        found[f"buffer {name}"] = buffer.clone()
    return {name: value.detach().double() for name, value in found.items()}


def errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each quantity; gradients of a module's parameters are one family."""
    assert got.keys() == want.keys()
    compare = Comparison()
    for name, value in got.items():
        family = name.split()[0] if name.startswith("gradient") and name != "gradient z" else name
        compare.add(name, value, want[name].detach().double().numpy(), family)
    return dict(compare.errors())


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = OWN_PATHS) -> None:
    found = errors(got, want)
    worst = max(found, key=lambda name: found[name])
    assert found[worst] <= tolerance, f"{worst} is off by {found[worst]:.2e} > {tolerance:.0e}"
