"""The graph network as a component: arguments, parameters, what is refused."""

import itertools

import pytest
import torch
from maths_cases import Size, batch_of, graph_of

from gcahng.errors import InputError
from gcahng.graph import GraphNetwork

SIZE = Size(4, 2, 8, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_dim": 0}, "`embedding_dim` must be at least 1: got 0"),
        ({"num_classes": 0}, "`num_classes` must be at least 1: got 0"),
        ({"num_layers": -1}, "`num_layers` must be at least 1: got -1"),
        ({"num_heads": 0}, "`num_heads` must be at least 1: got 0"),
        ({"num_heads": 3}, r"`num_heads` must divide embedding_dim \(8\): got 3"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\): got 1.0"),
        ({"dropout": -0.1}, r"`dropout` must lie in \[0, 1\): got -0.1"),
        ({"edge_dropout": "both"}, "`edge_dropout` must be one of tied, independent: got 'both'"),
        ({"backend": "dense"}, "`backend` must be one of auto, triton, compiled, eager, scatter: got 'dense'"),
        ({"norm": "none"}, "`norm` must be one of gelu_layer_norm, layer_norm: got 'none'"),
    ],
)
def test_arguments_out_of_range(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "embedding_dim": 8,
        "num_classes": 5,
        "num_layers": 1,
        "num_heads": 2,
    }
    with pytest.raises(InputError, match=message):
        GraphNetwork(**(arguments | change))  # type: ignore[arg-type]


def test_batches_that_do_not_fit() -> None:
    graph = graph_of(SIZE)
    z, labels = batch_of(SIZE)
    for wrong, shape in ((z[:, :7], r"\(8, 7\)"), (z[:1], r"\(1, 8\)")):
        message = rf"`z` must have shape \(B, D\) with B >= 2 and D = 8: got {shape}"
        with pytest.raises(InputError, match=message):
            graph(wrong, labels[: wrong.shape[0]])
    with pytest.raises(InputError, match="`z` must be a floating tensor of shape"):
        graph(z.long(), labels)
    with pytest.raises(InputError, match=r"one entry per embedding: expected shape \(8,\), got \(7,\)"):
        graph(z, labels[:7])
    with pytest.raises(InputError, match="integer class numbers: expected int64, got torch.float64"):
        graph(z, labels.double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite(bad: float) -> None:
    z, labels = batch_of(SIZE)
    z[5, 2] = bad
    z[6, 1] = bad
    with pytest.raises(InputError, match="`z` must be finite: 2 of 8 embeddings are not, the first at position 5"):
        graph_of(SIZE)(z, labels)


def test_integer_labels_of_any_width() -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, dropout=0.0)
    want = graph(z, labels).node_logits
    assert torch.equal(graph(z, labels.to(torch.int32)).node_logits, want)


def test_output_shapes() -> None:
    z, labels = batch_of(SIZE)
    for backend in ("eager", "scatter"):
        output = graph_of(SIZE, backend=backend)(z, labels)
        assert output.node_logits.shape == (8, 11)
        assert output.pull_coefficients.shape == (8, 8, 8)
        assert float(output.pull_coefficients.detach().min()) > 0
        assert float(output.pull_coefficients.detach().max()) < 1
    nothing = graph_of(SIZE)(z, labels, need_coefficients=False)
    with pytest.raises(InputError, match="need_coefficients=False"):
        _ = nothing.pull_coefficients


def test_attention_starts_xavier_with_zero_bias() -> None:
    torch.manual_seed(0)
    graph = GraphNetwork(64, 5, 2, 4)
    bound = (6 / 128) ** 0.5
    node, edge = graph.node_blocks[1], graph.edge_blocks[1]
    layers = [node.query, node.key, node.value, node.out, edge.query, edge.key, edge.value]
    for layer in layers:
        assert float(layer.bias.detach().abs().max()) == 0
        assert bound * 0.95 < float(layer.weight.detach().abs().max()) <= bound
    default = 1 / 64**0.5  # PyTorch's bound for all other linear layers
    for layer in (graph.reduction, node.edge_to_node, node.ffn_in, edge.node_to_edge, edge.ffn_in):
        assert default * 0.95 < float(layer.weight.detach().abs().max()) <= default


def test_every_parameter_is_in_one_group_and_frozen_ones_in_none() -> None:
    for layers, propagate, add in itertools.product((1, 2, 3), (True, False), (True, False)):
        graph = GraphNetwork(8, 5, layers, 2, node_propagation=propagate, edge_to_node=add)
        grouped = [id(p) for group in graph.parameter_groups().values() for p in group]
        wanted = [id(p) for p in graph.parameters() if p.requires_grad]
        assert sorted(grouped) == sorted(wanted)
        assert len(set(grouped)) == len(grouped)


def test_a_switched_off_part_has_no_parameters() -> None:
    names = {name for name, _ in GraphNetwork(8, 5, 2, 2, node_propagation=False).named_parameters()}
    assert not [n for n in names if "node_blocks" in n and ("query" in n or "edge_to_node" in n)]
    names = {name for name, _ in GraphNetwork(8, 5, 2, 2, edge_to_node=False).named_parameters()}
    assert not [n for n in names if "edge_to_node" in n]
    assert [n for n in names if "node_blocks.0.query" in n]


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_without_node_propagation_an_edge_sees_its_two_ends_only(backend: str) -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, backend=backend, node_propagation=False, dropout=0.0).eval()
    z.requires_grad_()
    table = graph(z, labels).pull_coefficients
    (gradient,) = torch.autograd.grad(table[1, 4].sum(), z)
    touched = (gradient.abs().amax(1) > 1e-12).nonzero()[:, 0].tolist()
    assert touched == [1, 4]
    everything = graph_of(SIZE, backend=backend, dropout=0.0).eval()(z, labels).pull_coefficients
    (gradient,) = torch.autograd.grad(everything[1, 4].sum(), z)
    assert bool((gradient.abs().amax(1) > 1e-12).all())


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_without_the_edge_to_node_sum_nodes_ignore_edges(backend: str) -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, backend=backend, edge_to_node=False, dropout=0.0)
    logits = graph(z, labels).node_logits
    for block in graph.edge_blocks:
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.mul_(1.7)
    assert torch.equal(graph(z, labels).node_logits, logits)


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_the_key_bias_of_the_edge_attention_has_a_zero_gradient(backend: str) -> None:
    # It shifts both scores of an edge alike. None would keep it out of weight decay.
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, backend=backend)
    graph(z, labels, dropout_key=1).pull_coefficients.square().sum().backward()
    for block in graph.edge_blocks:
        gradient = block.key.bias.grad
        assert gradient is not None
        other = float(block.value.bias.grad.abs().max())
        if backend == "eager":
            assert float(gradient.abs().max()) == 0  # exactly: Adam would blow up rounding noise
        assert float(gradient.abs().max()) < 1e-12 * max(other, 1.0)
