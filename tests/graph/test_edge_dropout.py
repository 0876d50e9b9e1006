"""Dropout of the edge attention: what a mask depends on, its law, and its place in the edge block."""

import math

import pytest
import torch
from edge_cases import rows_of, table_of
from maths_cases import Size, assert_close, batch_of, graph_of, results
from torch import Tensor
from torch.nn import functional as F

from gcahng.graph import ConstantCoefficients, reference
from gcahng.graph.blocks import EdgeBlock
from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.edge_layout import edge_layout
from gcahng.graph.edge_messages import EdgePass
from gcahng.graph.edge_source import StoredEdges
from gcahng.graph.edge_update import EndTerms, update_edges
from gcahng.graph.kernels import EagerKernels
from gcahng.graph.pairs import PairChunk, pair_plan

SIDE = 60


def all_pairs(law: EdgeDropout, layer: int = 0, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Factors of node i and of node j for all ordered pairs: two (side, side) tables."""
    place = torch.arange(side)
    return law.scales(place[:, None], place[None, :], layer, torch.float64)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_factors_keep_the_mean(probability: float, tied: bool) -> None:
    first, second = all_pairs(EdgeDropout(probability, 77, tied), side=200)
    scale = 1 / (1 - probability)
    # Four standard errors of the mean over the n independent masks.
    masks = 200 * 201 / 2 if tied else 200 * 200
    slack = 4 * math.sqrt(probability * (1 - probability) / masks)
    for factors in (first, second):
        assert set(factors.unique().tolist()) == {0.0, scale}
        assert float((factors == 0).double().mean()) == pytest.approx(probability, abs=slack)
        assert float(factors.mean()) == pytest.approx(1.0, abs=slack * scale)


def test_the_two_weights_of_an_edge_are_dropped_independently() -> None:
    first, second = all_pairs(EdgeDropout(0.5, 5), side=200)
    assert abs(correlation(first, second)) < 0.03
    diagonal = torch.diagonal(first), torch.diagonal(second)
    assert not torch.equal(*diagonal)  # a self edge has two weights as well


def test_tied_directions_share_their_mask() -> None:
    first, second = all_pairs(EdgeDropout(0.5, 5))
    others = ~torch.eye(SIDE, dtype=torch.bool)
    assert torch.equal(first[others], second.T[others])  # node i in (i, j) is node i in (j, i)


def test_independent_directions_do_not() -> None:
    first, second = all_pairs(EdgeDropout(0.5, 5, tied=False), side=200)
    assert abs(correlation(first.triu(1), second.T.triu(1))) < 0.6  # both zero below the diagonal
    above = torch.triu_indices(200, 200, offset=1)
    assert abs(correlation(first[above[0], above[1]], second.T[above[0], above[1]])) < 0.03


def test_a_mask_depends_on_key_layer_and_pair() -> None:
    law = EdgeDropout(0.5, 5)
    base, _ = all_pairs(law)
    assert torch.equal(base, all_pairs(law)[0])
    assert abs(correlation(base, all_pairs(law, layer=1)[0])) < 0.1
    assert abs(correlation(base, all_pairs(EdgeDropout(0.5, 6))[0])) < 0.1
    assert abs(correlation(base[:-1], base[1:])) < 0.1
    assert abs(correlation(base[:, :-1], base[:, 1:])) < 0.1


def test_a_mask_does_not_depend_on_the_batch_around_it() -> None:
    law = EdgeDropout(0.5, 5)
    whole, _ = all_pairs(law)
    part, _ = law.scales(torch.tensor([[7], [50]]), torch.tensor([[3, 50, 59]]), 0, torch.float64)
    assert torch.equal(part, whole[[7, 50]][:, [3, 50, 59]])


class _AsTheyAre(StoredEdges):
    """Stored edges without the norm of a layer before."""

    def values(self, chunk: PairChunk) -> Tensor:
        return self.raw_values(chunk)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> "_AsTheyAre":
        return _AsTheyAre(*tensors, self.gelu, self.eps, self.kernels)


def edge_block_by_loops(block: EdgeBlock, edges: Tensor, h: Tensor, layer: int, law: EdgeDropout | None) -> Tensor:
    """Edge by edge: softmax over the two ends, dropout, values, feed-forward. (B, B, D)."""
    size, dim = h.shape
    nodes = F.gelu(block.node_to_edge(h))
    rows = []
    for i in range(size):
        row = []
        for j in range(size):
            query = block.query(edges[i, j])
            scores = torch.stack([query @ block.key(nodes[n]) / math.sqrt(dim) for n in (i, j)])
            weights = torch.softmax(scores, 0)
            if law is not None:
                factors = law.scales(torch.tensor(i), torch.tensor(j), layer, edges.dtype)
                weights = weights * torch.stack(factors)
            x = weights[0] * block.value(nodes[i]) + weights[1] * block.value(nodes[j])
            x = block.norm(x + edges[i, j])
            row.append(block.norm(block.ffn_out(block.ffn_norm(F.gelu(block.ffn_in(x)))) + x))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("law", [None, "tied", "independent"])
def test_an_edge_block_equals_a_loop(law: str | None) -> None:
    size = Size(3, 2, 8, 1, 1)
    block = graph_of(size).edge_blocks[0]
    assert isinstance(block, EdgeBlock)
    h, _ = batch_of(size)
    batch = size.batch
    edges = torch.randn(batch, batch, 8, generator=torch.Generator().manual_seed(1)).double()
    edges = edges + edges.transpose(0, 1)
    dropout = None if law is None else EdgeDropout(0.4, 9, law == "tied")
    want = edge_block_by_loops(block, edges, h, 3, dropout)
    row, column = (t.flatten() for t in torch.meshgrid(*[torch.arange(batch)] * 2, indexing="ij"))
    listed = reference.edge_update(block, edges.flatten(0, 1), h, row, column, 3, dropout)
    torch.testing.assert_close(listed.view_as(want), want, rtol=1e-11, atol=1e-12)
    # The fast path, its edges stored before a norm that leaves them as they are.
    call = EdgePass(
        edge_layout(pair_plan(torch.arange(batch), 4), dropout, 4), EagerKernels(), None, torch.float64, 1 << 30
    )
    plan = call.layout.plan
    raw = rows_of(call.layout, edges)
    source = _AsTheyAre(raw, torch.ones(8).double(), torch.zeros(8).double(), False, 0.0, EagerKernels())
    with torch.no_grad():
        terms = EndTerms(*(plan.positions(t) for t in block.end_node_terms(h, None)))
        new = update_edges(source, terms, block.weights(), block.rule(3, moments=False), call).raw
        # Without gradient the edges come finished.
        torch.testing.assert_close(table_of(call.layout, new), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "scatter"])
@pytest.mark.parametrize("layers", [1, 2])
def test_coefficients_of_a_pair(layers: int, backend: str) -> None:
    size = Size(5, 2, 8, layers, 2)
    z, labels = batch_of(size)

    def table(**options: object) -> Tensor:
        graph = graph_of(size, dropout=0.5, backend=backend, **options)
        return graph(z, labels, dropout_key=3).pull_coefficients.detach()

    tied, independent = table(edge_dropout="tied"), table(edge_dropout="independent")
    torch.testing.assert_close(tied, tied.transpose(0, 1), rtol=0, atol=1e-12)
    assert float((independent - independent.transpose(0, 1)).abs().max()) > 0.01


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("law", ["tied", "independent"])
def test_the_same_key_gives_the_numbers_of_the_edge_list(law: str, probability: float) -> None:
    size = Size(5, 2, 8, 3, 2)
    z, labels = batch_of(size)
    options = {"dropout": probability, "edge_dropout": law}
    for key in (0, 2**64 - 1):
        got = results(graph_of(size, backend="eager", **options), z, labels, dropout_key=key)
        assert_close(got, results(graph_of(size, backend="scatter", **options), z, labels, dropout_key=key))


def keyed_tables(law: str, keys: int) -> Tensor:
    """One channel's coefficients before the sigmoid under many keys: (keys, B, B)."""
    size = Size(3, 2, 4, 1, 1)
    z, labels = batch_of(size)
    # In evaluation the read-out would see no dropout, in training its statistics would mix the edges: the raw edges.
    graph = graph_of(size, dropout=0.1, edge_dropout=law)
    found = []
    with torch.no_grad():
        for key in range(keys):
            coefficients = graph(z, labels, dropout_key=key).coefficients
            assert isinstance(coefficients, ConstantCoefficients)
            # Under the batch statistics a logit is an affine map of its own edge, the same for all edges of a key.
            found.append(table_of(coefficients.layout, coefficients.logits())[..., 0])
    return torch.stack(found)


def test_moments_of_the_two_laws_in_the_graph() -> None:
    """Per edge both laws are one; e_ij and e_ji go together under "tied" and hardly at all under "independent"."""
    keys = 120
    tied, independent = keyed_tables("tied", keys), keyed_tables("independent", keys)
    spread = torch.sqrt((tied.var(0) + independent.var(0)) / keys)
    assert float(((tied.mean(0) - independent.mean(0)).abs() / spread).max()) < 4.5
    assert torch.equal(tied, tied.transpose(1, 2))
    above = torch.triu_indices(6, 6, offset=1)

    def directions_together(tables: Tensor) -> float:
        centred = tables - tables.mean(0)
        one, other = centred[:, above[0], above[1]], centred[:, above[1], above[0]]
        return float((one * other).mean() / torch.sqrt(one.square().mean() * other.square().mean()))

    assert directions_together(tied) == pytest.approx(1)
    # What is left is the batch statistics, which both edges of a key share.
    assert abs(directions_together(independent)) < 0.4


def test_evaluation_drops_nothing() -> None:
    size = Size(4, 2, 8, 2, 2)
    z, labels = batch_of(size)
    graph, without = graph_of(size, dropout=0.5).eval(), graph_of(size, dropout=0.0).eval()
    for key in (1, 2):
        got = graph(z, labels, dropout_key=key).pull_coefficients
        assert torch.equal(got, without(z, labels).pull_coefficients)
