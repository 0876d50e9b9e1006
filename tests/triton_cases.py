"""Random arguments of the inner loops and their results by name: what the tests of the Triton kernels share.

Needs torch alone, so that these tests run on a machine that has little else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.edge_layout import edge_layout
from gcahng.graph.edge_messages import EdgePass, edge_to_node_sums
from gcahng.graph.edge_source import EdgeSource, ProductEdges, StoredEdges
from gcahng.graph.edge_update import BlockWeights, EndTerms, UpdateRule, update_edges
from gcahng.graph.kernels import EagerKernels, HiddenWeights, NormWeights
from gcahng.graph.pairs import pair_plan

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Chunk:
    """n block pairs of b x b edges, D channels."""

    pairs: int
    block: int
    dim: int

    def __str__(self) -> str:
        return f"n{self.pairs}-b{self.block}-D{self.dim}"


class Draw:
    """Random tensors on a device: drawn in float64 on the CPU, so that they are the same everywhere."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        # Values that float32 holds: rounding of the arguments is no error of the kernels.
        return drawn.float().to(self.device, self.dtype)

    def matrix(self, rows: int, columns: int, low: torch.dtype | None) -> Tensor:
        """A Linear's weight, in `low` where that is set."""
        drawn = self.normal(rows, columns) * columns**-0.5
        return drawn if low is None else drawn.to(low)

    def ones(self, *shape: int) -> Tensor:
        """Zeros and ones."""
        return (torch.rand(shape, generator=self.generator) < 0.7).to(self.device, self.dtype)

    def pair(self, *shape: int) -> tuple[Tensor, Tensor]:
        return self.normal(*shape), self.normal(*shape)


Case = Callable[[EagerKernels, Draw, Chunk, torch.dtype | None], Results]


def mix(kernels: EagerKernels, draw: Draw, chunk: Chunk, low: torch.dtype | None, *, gelu: bool = True) -> Results:
    """Both ways to mix: of stored edges and of products."""
    n, b, dim = chunk.pairs, chunk.block, chunk.dim
    factors, values = draw.pair(n, b, dim), draw.pair(n, b, dim)
    weights = draw.pair(n, b, b)
    norm = NormWeights(draw.normal(dim), draw.normal(dim), gelu, 1e-5)
    return {
        "stored": kernels.mix(draw.normal(n, b, b, dim), values, weights, norm),
        "products": kernels.product_mix(factors, values, weights, norm),
    }


def mix_without_gelu(kernels: EagerKernels, draw: Draw, chunk: Chunk, low: torch.dtype | None) -> Results:
    return mix(kernels, draw, chunk, low, gelu=False)


def messages(kernels: EagerKernels, draw: Draw, chunk: Chunk, low: torch.dtype | None) -> Results:
    """First-layer messages with every choice of masks, in mirrored and in diagonal chunks."""
    n, b, dim = chunk.pairs, chunk.block, chunk.dim
    factors, weight, bias = draw.pair(n, b, dim), draw.matrix(dim, dim, low), draw.normal(dim)
    to_first, to_second = draw.ones(n, b, b), draw.ones(n, b, b)
    found = {}
    for name, masks in {
        "no masks": (None, None),
        "padding": (to_first, to_first),
        "shared rows": (None, to_second),
        "both masks": (to_first, to_second),
    }.items():
        _, first, second = kernels.product_messages(factors, weight, bias, masks, low, mirrored=True)
        assert second is not None
        found[f"first, {name}"], found[f"second, {name}"] = first, second
    _, first, second = kernels.product_messages(factors, weight, bias, (to_first, None), low, mirrored=False)
    assert second is None
    return {**found, "diagonal": first}


def hidden(kernels: EagerKernels, draw: Draw, chunk: Chunk, low: torch.dtype | None) -> Results:
    """The wide layer and its backward pass, which computes Linear(x) again."""
    # Three rows more than the edges: no multiple of a tile.
    rows, dim = chunk.pairs * chunk.block**2 + 3, chunk.dim
    weights = HiddenWeights(
        draw.matrix(4 * dim, dim, low),
        draw.normal(4 * dim),
        draw.matrix(dim, 4 * dim, low),
        draw.normal(dim),
        1e-5,
    )
    x, grad, row, at = draw.normal(rows, dim), draw.normal(rows, dim), draw.normal(rows, 1), draw.normal(rows, 1)
    _, h, mean, rstd = kernels.hidden(x, weights, low)
    lowered = grad if low is None else grad.to(low)
    grad_inner, again, grad_bias = kernels.hidden_backward(x, None, lowered, row, at, weights, low)
    return {
        "h": h,
        "mean": mean,
        "rstd": rstd,
        "gradient inner": grad_inner,
        "h of the backward pass": again,
        "gradient bias": grad_bias,
    }


CASES: dict[str, Case] = {
    "mix": mix,
    "mix without GELU": mix_without_gelu,
    "messages": messages,
    "hidden": hidden,
}


def run(
    case: str, kernels: EagerKernels, chunk: Chunk, seed: int, low: torch.dtype | None, device: str = "cpu"
) -> Results:
    """The results of kernels on float32 arguments."""
    return CASES[case](kernels, Draw(seed, torch.float32, device), chunk, low)


def reference(case: str, chunk: Chunk, seed: int) -> Results:
    """The results of plain torch in float64 on the same arguments."""
    return CASES[case](EagerKernels(), Draw(seed, torch.float64, "cpu"), chunk, None)


def assert_near(got: Results, want: Results, tolerance: float) -> None:
    """Largest difference over the largest wanted value, quantity by quantity."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        expected = want[name].double().cpu()
        assert value.shape == expected.shape, name
        scale = max(float(expected.abs().max()), 1e-30)
        error = float((value.double().cpu() - expected).abs().max()) / scale
        assert error <= tolerance, f"{name} is off by {error:.2e} > {tolerance:.0e}"


def edge_stage(
    kernels: EagerKernels, draw: Draw, low: torch.dtype | None, *, block: int, tied: bool, gelu: bool, dim: int = 12
) -> Results:
    """Both operations of the edge stage over two layers: node sums and edges, and the gradients of all they take.

    Seven nodes, so that most blocks need padding; dropout; several chunks.
    """
    batch, layers = 7, 2
    order = torch.randperm(batch, generator=draw.generator).to(draw.device)
    plan = pair_plan(order, block, edges_per_chunk=2 * block**2)
    layout = edge_layout(plan, EdgeDropout(0.3, 5, tied=tied), layers)
    call = EdgePass(layout, kernels, low, low or draw.dtype, keep_bytes=0)
    node = {"x": (batch, dim), "direction": (batch, dim), "offset": (batch,), "value": (batch, dim)}
    wide = {"weight in": (4 * dim, dim), "bias in": (4 * dim,), "weight out": (dim, 4 * dim), "shift": (dim,)}
    message = {"message weight": (dim, dim), "message bias": (dim,)}
    shapes = {**node, "norm weight": (dim,), "norm bias": (dim,), **wide, **message}
    leaves = {
        name: (draw.normal(*shape) * (shape[-1] ** -0.5 if "weight" in name and len(shape) > 1 else 1.0))
        .detach()
        .requires_grad_()
        for name, shape in shapes.items()
    }
    found: Results = {}
    source: EdgeSource = ProductEdges(plan.positions(leaves["x"]))
    total = torch.zeros((), dtype=draw.dtype, device=draw.device)
    for layer in range(layers):
        sums = edge_to_node_sums(source, leaves["message weight"], leaves["message bias"], call)
        terms = EndTerms(*(plan.positions(leaves[name]) for name in ("direction", "offset", "value")))
        # As `EdgeBlock.weights` hands it over: the rows add up to zero.
        out = leaves["weight out"] - leaves["weight out"].mean(1, keepdim=True)
        weights = BlockWeights(
            leaves["norm weight"], leaves["norm bias"], leaves["weight in"], leaves["bias in"], out, leaves["shift"]
        )
        raw = update_edges(source, terms, weights, UpdateRule(layer, gelu, 1e-5, 1e-5, moments=False), call).raw
        source = StoredEdges(raw, leaves["norm weight"], leaves["norm bias"], gelu, 1e-5, kernels)
        found[f"sums of layer {layer}"] = sums.detach()
        total = total + (sums * draw.normal(*sums.shape)).sum()
    rows = [layout.weights(part, draw.dtype) for part in layout.all_rows()]
    real = torch.cat(
        [
            torch.as_tensor(weight, dtype=draw.dtype, device=draw.device).expand(part.chunk.num_rows)
            if isinstance(weight, float)
            else weight.flatten()
            for weight, part in zip(rows, layout.all_rows(), strict=True)
        ]
    )
    # Rows of padding nodes hold anything and count nothing.
    edges = raw.to(draw.dtype) * (real > 0)[:, None]
    found["edges"] = edges.detach()
    (total + (edges * draw.normal(*edges.shape)).sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        found[f"gradient {name}"] = leaf.grad
    return found
