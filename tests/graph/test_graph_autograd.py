"""The graph inside autograd: frozen parts, inference, repeated and forbidden backward passes, memory given back."""

import gc
import weakref

import pytest
import torch
from maths_cases import Size, assert_close, batch_of, generator, graph_of, plan_of, results
from torch import Tensor

from gcahng.graph import ConstantCoefficients, GraphNetwork, GraphOutput, PairCoefficients

SIZE = Size(5, 2, 8, 2, 2)
BACKENDS = pytest.mark.parametrize("backend", ["eager", "scatter"])


def loss_of(output: GraphOutput) -> Tensor:
    table = output.pull_coefficients
    mixes = (torch.randn(t.shape, generator=generator(3), dtype=t.dtype) for t in (output.node_logits, table))
    return sum((t * mix).sum() for t, mix in zip((output.node_logits, table), mixes, strict=True))  # type: ignore[return-value]


def gradients(graph: GraphNetwork, z: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of all that takes one."""
    graph.zero_grad(set_to_none=True)
    loss_of(graph(z, labels, dropout_key=1)).backward()
    found = {f"gradient {n}": p.grad for n, p in graph.named_parameters() if p.grad is not None}
    return found if z.grad is None else found | {"gradient z": z.grad}


FROZEN = {
    "edge blocks": ("edge_blocks",),
    "node blocks": ("node_blocks", "reduction"),
    "feed-forward parts": ("ffn",),
    "norms": ("norm",),
    "read-outs": ("edge_out", "edge_norm", "node_norm", "node_classifier"),
    "first edge block": ("edge_blocks.0",),
    "edge-to-node": ("edge_to_node",),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("with_z", [True, False])
def test_frozen_parameters_get_no_gradient_and_leave_the_others_theirs(frozen: str, with_z: bool) -> None:
    z, labels = batch_of(SIZE)
    z.requires_grad_(with_z)
    found = {}
    for backend in ("eager", "scatter"):
        graph = graph_of(SIZE, backend=backend)
        for name, parameter in graph.named_parameters():
            parameter.requires_grad_(not any(part in name for part in FROZEN[frozen]))
        z.grad = None
        found[backend] = gradients(graph, z, labels)
        assert not [n for n in found[backend] if any(part in n for part in FROZEN[frozen])]
        # Leaf gradients of frozen inputs are None, not zeros.
        assert ("gradient z" in found[backend]) == with_z
    wanted = {n for n, p in graph.named_parameters() if p.requires_grad and n.endswith(("weight", "bias"))}
    assert {f"gradient {n}" for n in wanted} == found["eager"].keys() - {"gradient z"}
    assert_close(found["eager"], found["scatter"])


def test_everything_frozen_but_z() -> None:
    z, labels = batch_of(SIZE)
    found = {}
    for backend in ("eager", "scatter"):
        graph = graph_of(SIZE, backend=backend).requires_grad_(False)
        leaf = z.clone().requires_grad_()
        found[backend] = gradients(graph, leaf, labels)
        assert found[backend].keys() == {"gradient z"}
    assert_close(found["eager"], found["scatter"])


def test_nothing_takes_a_gradient() -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE).requires_grad_(False)
    output = graph(z, labels, dropout_key=1)
    assert not output.node_logits.requires_grad
    assert not output.pull_coefficients.requires_grad
    want = graph_of(SIZE)(z, labels, dropout_key=1)
    torch.testing.assert_close(output.pull_coefficients, want.pull_coefficients.detach(), rtol=1e-13, atol=1e-14)


@BACKENDS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_modes_without_gradient(backend: str, mode: type, training: bool) -> None:
    z, labels = batch_of(SIZE)
    plain, free = (graph_of(SIZE, backend=backend).train(training) for _ in range(2))
    want = plain(z, labels, dropout_key=1, plan=plan_of(SIZE))
    with mode():
        output = free(z, labels, dropout_key=1, plan=plan_of(SIZE))
        assert not output.pull_coefficients.requires_grad
        torch.testing.assert_close(output.pull_coefficients, want.pull_coefficients.detach(), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(output.node_logits, want.node_logits.detach(), rtol=1e-13, atol=1e-14)
        if backend == "eager":
            assert isinstance(output.coefficients, ConstantCoefficients)
    for name, buffer in free.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=1e-13, atol=1e-14)
    # The same network trains on.
    results(free, z, labels, dropout_key=1, plan=plan_of(SIZE))


@BACKENDS
def test_both_outputs_together_and_one_by_one(backend: str) -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, backend=backend)
    parameters = [p for p in graph.parameters() if p.requires_grad]

    def grads(*, nodes: bool, edges: bool) -> list[Tensor]:
        output = graph(z, labels, dropout_key=1)
        loss = torch.zeros((), dtype=z.dtype)
        if nodes:
            loss = loss + output.node_logits.square().sum()
        if edges:
            loss = loss + output.pull_coefficients.square().sum()
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    both, nodes, edges = grads(nodes=True, edges=True), grads(nodes=True, edges=False), grads(nodes=False, edges=True)
    for number, (one, two, together) in enumerate(zip(nodes, edges, both, strict=True)):
        torch.testing.assert_close(one + two, together, rtol=1e-10, atol=1e-11, msg=str(number))


@BACKENDS
def test_an_output_may_be_used_twice(backend: str) -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, backend=backend)
    parameters = [p for p in graph.parameters() if p.requires_grad]
    output = graph(z, labels, dropout_key=1)
    once = torch.autograd.grad(output.pull_coefficients.square().sum(), parameters, allow_unused=True)
    output = graph(z, labels, dropout_key=1)
    one, two = output.pull_coefficients, output.pull_coefficients
    assert torch.equal(one, two)
    twice = torch.autograd.grad(one.square().sum() + two.square().sum(), parameters, allow_unused=True)
    for single, double in zip(once, twice, strict=True):
        assert (single is None) == (double is None)
        if single is not None and double is not None:
            torch.testing.assert_close(2 * single, double, rtol=1e-11, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("keep_bytes", [1 << 30, 0])
def test_a_graph_that_is_retained_gives_the_same_gradients_again(backend: str, keep_bytes: int) -> None:
    z, labels = batch_of(SIZE)
    z.requires_grad_()
    graph = graph_of(SIZE, backend=backend)
    graph.keep_bytes = keep_bytes
    loss = loss_of(graph(z, labels, dropout_key=1))
    inputs = [z, *(p for p in graph.parameters() if p.requires_grad)]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_second_derivatives_are_refused() -> None:
    z, labels = batch_of(SIZE)
    z.requires_grad_()
    # Without the nodes' attention, which torch itself cannot differentiate twice.
    output = graph_of(SIZE, node_propagation=False)(z, labels, dropout_key=1)
    (gradient,) = torch.autograd.grad(output.pull_coefficients.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


class Kept:
    """A tensor that waits for the backward pass, in a wrapper that can be watched."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("keep_bytes", [1 << 30, 0])
def test_the_edges_are_given_back_by_the_backward_pass(keep_bytes: int) -> None:
    """Though the loss, and with it the nodes of autograd's graph, is still held."""
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE)
    graph.keep_bytes = keep_bytes
    gc.collect()
    of_others = [t for t in gc.get_objects() if type(t) is Tensor]
    waiting: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        waiting.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = graph(z, labels, dropout_key=1)
        coefficients = output.coefficients
        assert isinstance(coefficients, PairCoefficients)
        rows = coefficients.layout.num_rows
        loss = loss_of(output)
    del output, coefficients

    def edges_held() -> int:
        gc.collect()
        known = {id(t) for t in of_others}
        tensors = [t for t in gc.get_objects() if type(t) is Tensor and id(t) not in known]
        # Single numbers per edge, such as drawn masks, may stay.
        return sum(t.shape[:1] == (rows,) and t.numel() > rows for t in tensors)

    assert len(waiting) > 50
    assert edges_held() > 0
    loss.backward()
    assert not waiting
    assert edges_held() == 0
    assert loss.grad_fn is not None


def test_an_edited_parameter_is_noticed() -> None:
    # What an operation keeps goes through autograd's own checks.
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE)
    loss = loss_of(graph(z, labels, dropout_key=1))
    with torch.no_grad():
        graph.edge_blocks[0].ffn_in.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@BACKENDS
def test_gradients_accumulate_over_two_passes(backend: str) -> None:
    # The metric pass without gradient of its coefficients, then the generation pass, on one network.
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, backend=backend)
    parameters = dict(graph.named_parameters())
    metric = graph(z, labels, dropout_key=1, coefficient_gradient=False)
    metric.node_logits.square().sum().backward()
    reached = {n for n, p in parameters.items() if p.grad is not None}
    groups = graph.parameter_groups()
    names = {id(p): n for n, p in parameters.items()}
    assert reached == {names[id(p)] for p in groups["both"] + groups["metric"]}
    graph.zero_grad(set_to_none=True)
    graph(z, labels, dropout_key=1).pull_coefficients.square().sum().backward()
    reached = {n for n, p in parameters.items() if p.grad is not None}
    assert reached == {names[id(p)] for p in groups["both"] + groups["generation"]}
