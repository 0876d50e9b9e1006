"""Compiled inner loops against plain torch: values, gradients, and how many graphs they take.

Inductor itself compiles the cheapest functions only (it takes seconds each on a CPU); the others are traced and lowered
by "aot_eager", which runs torch's own operations: what is compiled is the same, who generates the code is not.
"""

from collections.abc import Iterator

import pytest
import torch
from maths_cases import Size, assert_close, batch_of, generator, graph_of, results
from torch import Tensor
from torch._dynamo.utils import counters

from gcahng.graph.kernels import EagerKernels, HiddenWeights, NormWeights
from gcahng.graph.kernels.compiled import CompiledKernels
from gcahng.graph.pairs import class_major_plan

PLAIN = EagerKernels()
D, F = 12, 48


@pytest.fixture(autouse=True)
def no_graphs_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs made so far; none may be broken in two."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


class Chunk:
    """Random arguments of every function for n block pairs of b x b edges."""

    def __init__(self, n: int, b: int, seed: int = 0, *, gelu: bool = True, dtype: torch.dtype = torch.float64) -> None:
        self.draw, self.dtype = generator(seed), dtype
        self.edges = self.of(n, b, b, D)
        self.factors = self.values = (self.of(n, b, D), self.of(n, b, D))
        self.weights = (self.of(n, b, b), self.of(n, b, b))
        self.grad = self.of(n, b, b, D)
        self.node_grads = (self.of(n, b, D), self.of(n, b, D))
        self.mask = (self.of(n, b, b) > 0).to(dtype)
        self.norm = NormWeights(self.of(D), self.of(D), gelu, 1e-5)
        self.matrix, self.bias = self.of(D, D), self.of(D)
        self.hidden = HiddenWeights(self.of(F, D), self.of(F), self.of(D, F), self.of(D), 1e-5)
        self.rows, self.row_grad = self.edges.flatten(0, 2), self.grad.flatten(0, 2)
        self.row, self.mean = self.of(len(self.rows), 1), self.of(len(self.rows), 1)

    def of(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw, dtype=self.dtype)


def everything(kernels: EagerKernels, chunk: Chunk, low: torch.dtype | None, *, keep: bool = True) -> list[Tensor]:
    """What all functions return for a chunk, one after the other."""
    c = chunk
    matrix = c.matrix if low is None else c.matrix.to(low)
    hidden = c.hidden
    if low is not None:
        hidden = HiddenWeights(
            hidden.weight_in.to(low), hidden.bias_in, hidden.weight_out.to(low), hidden.shift, hidden.eps
        )
    found: list[Tensor | None] = [kernels.normalise(c.edges, c.norm)]
    found += kernels.normalise_backward(c.edges, c.grad, c.norm)
    found.append(kernels.mix(c.edges, c.values, c.weights, c.norm))
    found.append(kernels.product_mix(c.factors, c.values, c.weights, c.norm))
    back = kernels.mix_backward(c.edges, c.values, c.weights, c.norm, c.grad)
    found += [back.edges, *back.values, *back.weights, back.norm_weight, back.norm_bias]
    inner = None
    for masks, mirrored in (((None, c.mask), True), ((c.mask, c.mask), False)):
        inner, *sums = kernels.messages(c.edges, matrix, c.bias, masks, low, mirrored=mirrored)
        found += [inner, *sums, *kernels.product_messages(c.factors, matrix, c.bias, masks, low, mirrored=mirrored)]
        grads = (c.node_grads[0], c.node_grads[1] if mirrored else None)
        found.append(kernels.messages_backward(c.edges, inner if keep else None, matrix, c.bias, masks, low, grads))
    inner, *rest = kernels.hidden(c.rows, hidden, low, keep=keep)
    grad = c.row_grad if low is None else c.row_grad.to(low)
    found += [inner, *rest, *kernels.hidden_backward(c.rows, inner, grad, c.row, c.mean, hidden, low)]
    return [t for t in found if t is not None]


def assert_equal(kernels: EagerKernels, chunk: Chunk, low: torch.dtype | None, *, keep: bool = True) -> None:
    got, want = (everything(k, chunk, low, keep=keep) for k in (kernels, PLAIN))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w)


def test_one_graph_of_each_function_serves_every_number_of_block_pairs() -> None:
    kernels = CompiledKernels("aot_eager")
    assert_equal(kernels, Chunk(3, 2), None)
    first = graphs()
    for n in (2, 5, 9):
        assert_equal(kernels, Chunk(n, 2, seed=n, gelu=n != 5), None)
    # Without the norm's GELU there is another graph of each function that has a norm.
    assert graphs() == first + 5


def test_low_precision_operands_and_nothing_kept() -> None:
    assert_equal(CompiledKernels("eager"), Chunk(2, 3, dtype=torch.float32), torch.bfloat16, keep=False)
    graphs()


def test_single_pairs_and_single_edges_have_graphs_of_their_own_and_nothing_needs_none() -> None:
    kernels, norm = CompiledKernels("aot_eager"), Chunk(1, 1).norm

    def mix(n: int, b: int) -> None:
        c = Chunk(n, b, seed=n)
        got = kernels.mix(c.edges, c.values, c.weights, norm)
        torch.testing.assert_close(got, PLAIN.mix(c.edges, c.values, c.weights, norm), rtol=1e-12, atol=1e-12)

    counts = []
    for n, b in ((0, 2), (3, 2), (1, 2), (4, 1), (0, 1), (7, 1), (6, 2), (1, 2)):
        mix(n, b)
        counts.append(graphs())
    assert counts == [0, 1, 2, 3, 3, 3, 3, 3]


def test_every_object_has_room_for_its_own_graphs() -> None:
    # torch gives up on the ninth graph of one function; a benchmark over many sizes must not end up uncompiled.
    for dim in range(2, 14):
        x = torch.randn(4, dim, dtype=torch.float64)
        norm = NormWeights(x[0], x[1], True, 1e-5)
        torch.testing.assert_close(CompiledKernels("eager").normalise(x, norm), PLAIN.normalise(x, norm))
    assert graphs() == 12


def test_inductor_equals_plain_torch() -> None:
    kernels = CompiledKernels()
    for n in (3, 5):
        c = Chunk(n, 2, seed=n)
        got = kernels.product_mix(c.factors, c.values, c.weights, c.norm)
        torch.testing.assert_close(
            got, PLAIN.product_mix(c.factors, c.values, c.weights, c.norm), rtol=1e-11, atol=1e-11
        )
        for g, w in zip(kernels.hidden(c.rows, c.hidden, None), PLAIN.hidden(c.rows, c.hidden, None), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)
    assert graphs() == 2


def test_a_whole_network_equals_plain_torch() -> None:
    # Two layers, masks per direction, padding: chunks of single edges, partly mirrored rows, messages of later layers.
    size = Size(5, 2, 8, 2, 2)
    z, labels = batch_of(size)
    plan = class_major_plan(size.num_classes, size.num_samples)
    options = {"edge_dropout": "independent"}
    want = results(graph_of(size, backend="eager", **options), z, labels, dropout_key=3, plan=plan)
    graph = graph_of(size, backend="compiled", **options)
    graph._kernels[z.device, plan.block_size] = CompiledKernels("eager")
    assert_close(results(graph, z, labels, dropout_key=3, plan=plan), want)
    assert graphs() > 10


def test_what_autograd_watches_is_left_to_plain_torch() -> None:
    kernels, c = CompiledKernels("eager"), Chunk(2, 2)
    x = c.rows.clone().requires_grad_()
    kernels.normalise(x, c.norm).sum().backward()
    assert x.grad is not None and graphs() == 0
    with torch.no_grad():
        kernels.normalise(x, c.norm)
    assert graphs() == 1


def _scaled_difference(pair: tuple[Tensor, Tensor], scale: float) -> Tensor:
    return (pair[0] - pair[1]) * scale


def test_other_functions_of_a_chunk() -> None:
    assert PLAIN.compile(_scaled_difference) is _scaled_difference
    kernels = CompiledKernels("aot_eager")
    function = kernels.compile(_scaled_difference)
    assert kernels.compile(_scaled_difference) is function
    for n in (2, 3, 0):
        pair = (torch.randn(n, 2, 4), torch.randn(n, 2, 4))
        torch.testing.assert_close(function(pair, 0.5), _scaled_difference(pair, 0.5))
    assert graphs() == 1
