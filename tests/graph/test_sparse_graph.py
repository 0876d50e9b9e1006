"""The sparse graph against a mask over all pairs: node logits, coefficients, running statistics and every gradient."""

import copy

import pytest
import torch
from maths_cases import Size, assert_close, batch_of, generator, graph_of, results
from share_threads import Group
from sparse_reference import kept_by_loops, masked_graph
from torch import Tensor

from gcahng.graph import GraphNetwork
from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.neighbours import neighbour_plan

SPARSE = (
    (Size(7, 2, 12, 1, 2), 1),
    (Size(9, 3, 8, 3, 4), 2),
    (Size(6, 4, 16, 2, 1), 2),
    (Size(13, 2, 20, 2, 5), 3),
)
KEY = 17


def masked_results(graph: GraphNetwork, z: Tensor, labels: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """`maths_cases.results` of the witness."""
    graph.zero_grad(set_to_none=True)
    z = z.detach().clone().requires_grad_()
    dropout = EdgeDropout(graph.dropout, KEY, graph.tied) if graph.dropout else None
    logits, table = masked_graph(graph, z, labels, kept, dropout)
    draw = generator(5)
    mix_nodes, mix_pairs = (torch.randn(t.shape, generator=draw, dtype=torch.float64) for t in (logits, table))
    ((logits * mix_nodes).sum() + (table * mix_pairs).sum()).backward()
    assert z.grad is not None
    found = {"node_logits": logits, "coefficients": table, "gradient z": z.grad}
    for name, parameter in graph.named_parameters():
        if parameter.requires_grad:
            found[f"gradient {name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    found |= {f"buffer {name}": buffer.clone() for name, buffer in graph.named_buffers()}
    return {name: value.detach().double() for name, value in found.items()}


@pytest.mark.parametrize(("dropout", "law"), [(0.0, "tied"), (0.3, "tied"), (0.3, "independent")])
@pytest.mark.parametrize(("size", "k"), SPARSE, ids=str)
def test_equals_a_mask_over_all_pairs(size: Size, k: int, dropout: float, law: str) -> None:
    z, labels = batch_of(size, seed=k)
    graph = graph_of(size, dropout=dropout, edge_dropout=law)
    kept = kept_by_loops(z, size.num_samples, k)
    assert not kept.all()
    want = masked_results(copy.deepcopy(graph), z, labels, kept)
    plan = neighbour_plan(z, size.num_samples, k)
    assert_close(results(graph, z, labels, plan=plan, dropout_key=KEY), want)


@pytest.mark.parametrize(
    "switch",
    [
        {"node_propagation": False},
        {"edge_to_node": False},
        {"norm": "layer_norm"},
        {"edge_aggregation": "mean"},
        {"edge_aggregation": "scaled"},
    ],
    ids=str,
)
def test_switches_reach_the_sparse_graph(switch: dict[str, object]) -> None:
    size, k = SPARSE[1]
    z, labels = batch_of(size)
    graph = graph_of(size, dropout=0.0, **switch)
    want = masked_results(copy.deepcopy(graph), z, labels, kept_by_loops(z, size.num_samples, k))
    assert_close(results(graph, z, labels, plan=neighbour_plan(z, size.num_samples, k)), want)


def test_shares_of_the_pairs_give_what_one_process_gives() -> None:
    size, k = SPARSE[1]
    z, labels = batch_of(size)
    graph = graph_of(size, dropout=0.3)
    whole = neighbour_plan(z, size.num_samples, k)
    want = results(copy.deepcopy(graph), z, labels, plan=whole, dropout_key=KEY)
    group = Group(3)

    def work(rank: int) -> dict[str, Tensor]:
        mine, leaf = copy.deepcopy(graph), z.clone().requires_grad_()
        plan = neighbour_plan(z, size.num_samples, k, share=(rank, 3))
        output = mine(leaf, labels, plan=plan, dropout_key=KEY, reduce=group.reducer(rank))
        output.node_logits.square().sum().backward()
        found = {"node_logits": output.node_logits.detach(), "gradient z": leaf.grad}
        found |= {f"gradient {name}": p.grad for name, p in mine.named_parameters() if p.grad is not None}
        return found | {f"buffer {name}": buffer for name, buffer in mine.named_buffers()}

    parts = group.run(work)
    alone = copy.deepcopy(graph)
    leaf = z.clone().requires_grad_()
    output = alone(leaf, labels, plan=whole, dropout_key=KEY)
    output.node_logits.square().sum().backward()
    expected = {"node_logits": want["node_logits"], "gradient z": leaf.grad}
    expected |= {f"gradient {name}": p.grad for name, p in alone.named_parameters() if p.grad is not None}
    expected |= {name: value for name, value in want.items() if name.startswith("buffer")}
    mean = {name: torch.stack([part[name].double() for part in parts]).mean(0) for name in expected}
    assert_close(mean, expected)
