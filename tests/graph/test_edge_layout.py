"""Rows of a pass: every ordered edge has one, with its own masks; sums over rows are sums over edges."""

import math

import pytest
import torch
from edge_cases import LAWS, edge_pass, listed_edges, plans, rows_of, samples_of, some_pairs, table_of
from maths_cases import generator

from gcahng.graph.coefficients import dense
from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.edge_layout import edge_layout
from gcahng.graph.pairs import pair_plan

BATCH = 7
PLANS = pytest.mark.parametrize("name", plans(BATCH))


@PLANS
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("layers", [1, 3])
def test_every_ordered_edge_has_a_row_with_its_masks(name: str, law: str, layers: int) -> None:
    plan = plans(BATCH)[name]
    layout = edge_layout(plan, LAWS[law], layers)
    dropout = LAWS[law]
    place = torch.arange(BATCH)
    i, j = place[:, None].expand(BATCH, BATCH), place[None, :].expand(BATCH, BATCH)
    for layer in range(layers):
        columns = []
        for part in layout.all_rows():
            factors = layout.keep_scales(part.chunk, layer, torch.float64)
            assert (factors is None) == (dropout is None)
            ends = samples_of(layout, part.chunk)
            columns.append(torch.stack([*ends, *(ends if factors is None else factors)], -1).flatten(0, 2).double())
        row = table_of(layout, torch.cat(columns))
        forward = (row[..., 0] == i) & (row[..., 1] == j)
        assert bool((forward | ((row[..., 0] == j) & (row[..., 1] == i))).all())
        if dropout is not None:
            # A row that stands for the reverse edge has the factors of its two nodes the other way round.
            of_i, of_j = dropout.scales(i, j, layer, torch.float64)
            assert torch.equal(torch.where(forward, row[..., 2], row[..., 3]), of_i)
            assert torch.equal(torch.where(forward, row[..., 3], row[..., 2]), of_j)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_rows_per_pair_with_masks_per_direction(layers: int) -> None:
    # Two directions draw the same masks with probability q, in all layers with q^L: else the pair takes two rows.
    q = 0.81**2 + 2 * 0.09**2 + 0.01**2
    plan = pair_plan(torch.arange(64), 8)
    pairs = sum(chunk.num_rows for chunk in plan.chunks if chunk.mirrored)
    keys = range(10)
    extra = 0
    for key in keys:
        layout = edge_layout(plan, EdgeDropout(0.1, key, tied=False), layers)
        extra += layout.num_rows - plan.num_rows
        assert extra >= 0
    total = len(keys) * pairs
    slack = 4 * math.sqrt(q**layers * (1 - q**layers) / total)
    assert 1 + extra / total == pytest.approx(2 - q**layers, abs=slack)


def test_rows_without_masks_or_with_masks_per_pair_are_those_of_the_plan() -> None:
    plan = plans(BATCH)["padded, mixed order"]
    for law in (None, EdgeDropout(0.5, 3)):
        layout = edge_layout(plan, law, 2)
        assert layout.num_rows == plan.num_rows
        assert layout.extra == ()
        assert all(part.mirror is None and part.reverse is None for part in layout.parts)


@PLANS
@pytest.mark.parametrize("law", LAWS)
def test_rows_lie_one_after_the_other(name: str, law: str) -> None:
    layout = edge_layout(plans(BATCH)[name], LAWS[law], 2)
    start = 0
    for part in layout.all_rows():
        assert part.chunk.start == start
        start += part.chunk.num_rows
    assert start == layout.num_rows
    taken = [range(layout.num_rows)[part.reverse] for part in layout.parts if part.reverse is not None]
    assert [row for rows in taken for row in rows] == list(range(layout.plan.num_rows, layout.num_rows))


@PLANS
@pytest.mark.parametrize("law", LAWS)
def test_adding_directions_is_the_adjoint_of_taking_them(name: str, law: str) -> None:
    layout = edge_layout(plans(BATCH)[name], LAWS[law], 2)
    draw = generator(3)
    buffer = torch.randn(layout.num_rows, 3, generator=draw, dtype=torch.float64)
    # What is written over must not leak into the result.
    into = torch.full_like(buffer, float("nan"))
    product = torch.zeros((), dtype=torch.float64)
    for part in layout.parts:
        taken = layout.directions(part, buffer)
        given = [None if t is None else torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in taken]
        assert given[0] is not None
        product += sum((t * g).sum() for t, g in zip(taken, given, strict=True) if t is not None and g is not None)
        layout.add_directions(part, given[0], given[1], into)
    torch.testing.assert_close((buffer * into).sum(), product, rtol=1e-13, atol=1e-12)
    assert not bool(into.isnan().any())


@pytest.mark.parametrize("law", LAWS)
def test_directions_are_differentiable(law: str) -> None:
    layout = edge_layout(plans(5)["padded, mixed order"], LAWS[law], 1)
    buffer = torch.randn(layout.num_rows, 2, generator=generator(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: table_of(layout, rows), (buffer,))


@pytest.mark.parametrize("ranks", [1, 2, 5])
@PLANS
@pytest.mark.parametrize("law", LAWS)
def test_weights_of_all_processes_count_every_edge_once(name: str, law: str, ranks: int) -> None:
    total = 0.0
    listed = torch.zeros(BATCH, BATCH, dtype=torch.float64)
    for rank in range(ranks):
        layout = edge_layout(plans(BATCH, (rank, ranks))[name], LAWS[law], 2)
        listed += listed_edges(layout)
        for part in layout.all_rows():
            weights = layout.weights(part, torch.float64)
            if isinstance(weights, torch.Tensor):
                assert weights.shape == (part.chunk.first.numel(), *[part.chunk.block_size] * 2)
                total += float(weights.sum())
            else:
                total += weights * part.chunk.num_rows
    assert total == BATCH**2
    assert bool((listed == 1).all())


@PLANS
@pytest.mark.parametrize("law", LAWS)
def test_masked_sums_of_rows_are_sums_over_the_edges_of_a_node(name: str, law: str) -> None:
    layout = edge_layout(plans(BATCH)[name], LAWS[law], 2)
    rows = torch.randn(layout.num_rows, generator=generator(8), dtype=torch.float64)
    sums = torch.zeros(layout.plan.order.numel(), dtype=torch.float64)
    for part in layout.all_rows():
        chunk = part.chunk
        values = chunk.of(rows)
        at_first, at_second = (1.0 if m is None else m for m in layout.masks(part, torch.float64))
        blocks = sums.view(-1, chunk.block_size)
        blocks.index_add_(0, chunk.first, (values * at_first).sum(2))
        if chunk.mirrored:
            blocks.index_add_(0, chunk.second, (values * at_second).sum(1))
    want = table_of(layout, rows[:, None])[..., 0].sum(1)
    torch.testing.assert_close(layout.plan.samples(sums), want, rtol=1e-12, atol=1e-12)


@PLANS
@pytest.mark.parametrize("law", LAWS)
def test_the_dense_table_is_the_table_edge_by_edge(name: str, law: str) -> None:
    layout = edge_layout(plans(BATCH)[name], LAWS[law], 2)
    rows = torch.randn(layout.num_rows, 2, generator=generator(9), dtype=torch.float64)
    assert torch.equal(dense(layout, rows), table_of(layout, rows))
    table = torch.randn(BATCH, BATCH, 2, generator=generator(10), dtype=torch.float64)
    table = table + table.transpose(0, 1)
    assert torch.equal(dense(layout, rows_of(layout, table)), table)


def test_a_plan_of_some_pairs_counts_its_own_edges() -> None:
    plan = some_pairs(BATCH, 2)
    call = edge_pass(plan, "independent", layers=2)
    listed = listed_edges(call.layout)
    assert 0 < float(listed.sum()) < BATCH**2
    assert torch.equal(listed, listed.T)
    assert plan.degree is not None
    assert plan.degree.tolist() == listed.sum(1).tolist()
    weights = [call.layout.weights(part, torch.float64) for part in call.layout.all_rows()]
    sizes = [part.chunk.num_rows for part in call.layout.all_rows()]
    total = sum(float(w.sum()) if isinstance(w, torch.Tensor) else w * n for w, n in zip(weights, sizes, strict=True))
    assert total == plan.edge_count == float(listed.sum())
