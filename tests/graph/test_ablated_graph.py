"""What the graph's ablations take away, by gradient: who depends on whom with a switch on and off.

Further: `test_graph_network.py` (parts without parameters), `test_pairs_against_scatter.py` (numbers).
"""

import pytest
import torch
from maths_cases import Size, batch_of, graph_of
from torch import Tensor

from gcahng.graph import GraphNetwork

SIZE = Size(3, 2, 4, 2, 2)
ANCHOR = 1
NOTHING = 1e-12
BACKENDS = ["eager", "scatter"]


def frozen_statistics(**options: object) -> GraphNetwork:
    """In evaluation mode, where the two read-out BatchNorms do not tie the samples of a batch together."""
    return graph_of(SIZE, dropout=0.0, **options).eval()


def dependence(outputs: Tensor, z: Tensor) -> Tensor:
    """(len(outputs), B): the largest gradient of each output by each sample's embedding."""
    rows = [torch.autograd.grad(output, z, retain_graph=True)[0].abs().amax(1) for output in outputs]
    return torch.stack(rows)


def pairs_by_sample(**options: object) -> Tensor:
    """(B, B): how the coefficients of ANCHOR with negative j depend on sample k; a weighted sum over channels."""
    z, labels = batch_of(SIZE)
    z.requires_grad_()
    table = frozen_statistics(**options)(z, labels).pull_coefficients
    mix = torch.arange(1.0, SIZE.dim + 1, dtype=torch.float64)
    return dependence(table[ANCHOR] @ mix, z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_global_correlations_no_third_sample_moves_a_coefficient(backend: str) -> None:
    ends = torch.eye(SIZE.batch, dtype=torch.bool)
    ends[:, ANCHOR] = True
    local = pairs_by_sample(backend=backend, node_propagation=False)
    assert float(local[~ends].max()) < NOTHING
    assert float(local[ends].min()) > NOTHING
    assert float(pairs_by_sample(backend=backend).min()) > NOTHING


def test_the_batch_statistics_of_the_read_out_stay() -> None:
    """In training third samples still set mean and variance of the edges' BatchNorm, and nothing else."""
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, dropout=0.0, node_propagation=False)
    norm, edges = graph.edge_norm, SIZE.batch**2
    norm.momentum = 1.0
    training = graph(z, labels).pull_coefficients
    with torch.no_grad():
        norm.running_var.mul_((edges - 1) / edges)
    torch.testing.assert_close(graph.eval()(z, labels).pull_coefficients, training, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_hadamard_addition_attention_alone_moves_nodes(backend: str) -> None:
    """In one layer a node knows other classes by attention, and its own class's other samples by the sum alone."""
    size = Size(3, 2, 4, 1, 2)
    z, labels = batch_of(size)
    z.requires_grad_()
    mates = (labels[:, None] == labels) & ~torch.eye(size.batch, dtype=torch.bool)
    found = {}
    for added in (True, False):
        graph = graph_of(size, backend=backend, dropout=0.0, edge_to_node=added).eval()
        found[added] = dependence(graph(z, labels).node_logits.square().sum(1), z)
    assert float(found[True].min()) > NOTHING
    assert float(found[False][mates].max()) < NOTHING
    assert float(found[False][~mates].min()) > NOTHING


def test_parts_that_stay_start_alike() -> None:
    """Also those that are drawn after the ones that are left out."""
    torch.manual_seed(3)
    whole = dict(GraphNetwork(8, 5, 2, 2).state_dict())
    for options, missing in (({"edge_to_node": False}, 4), ({"node_propagation": False}, 20)):
        torch.manual_seed(3)
        part = GraphNetwork(8, 5, 2, 2, **options).state_dict()  # type: ignore[arg-type]
        assert len(whole) - len(part) == missing
        assert all(torch.equal(value, whole[name]) for name, value in part.items())
