"""Block pairs: every pair once, padding left out of sums, shares of processes."""

import itertools

import pytest
import torch
from maths_cases import SIZES, Size, graph_of

from gcahng.generation.block_synthesis import class_major_plan
from gcahng.graph import PairPlan, block_classes, pair_plan
from gcahng.graph.edge_stage import dense, edge_square_sum, edge_sum, edge_to_node_sums

BATCH = 13


def block_pairs(plan: PairPlan) -> list[tuple[int, int]]:
    found = []
    for chunk in plan.chunks:
        assert chunk.diagonal == bool((chunk.first == chunk.second).all())
        found += list(zip(chunk.first.tolist(), chunk.second.tolist(), strict=True))
    return found


@pytest.mark.parametrize("block", [1, 2, 4, 5, 13, 20])
@pytest.mark.parametrize("edges_per_chunk", [1, 50, 1024])
def test_every_block_pair_is_listed_once(block: int, edges_per_chunk: int) -> None:
    plan = pair_plan(torch.arange(BATCH), block, edges_per_chunk=edges_per_chunk)
    wanted = list(itertools.combinations_with_replacement(range(plan.num_blocks), 2))
    assert sorted(block_pairs(plan)) == wanted
    limit = max(1, edges_per_chunk // block**2)
    assert all(chunk.first.numel() <= limit for chunk in plan.chunks)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("blocks", [3, 5, 6, 9, 11])
def test_shares_are_disjoint_complete_and_balanced(blocks: int, ranks: int) -> None:
    shares = [block_pairs(pair_plan(torch.arange(2 * blocks), 2, share=(rank, ranks))) for rank in range(ranks)]
    together = [pair for share in shares for pair in share]
    assert sorted(together) == list(itertools.combinations_with_replacement(range(blocks), 2))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def symmetric_table(size: int, dim: int = 3) -> torch.Tensor:
    table = torch.randn(size, size, dim, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return table + table.transpose(0, 1)


def cut(table: torch.Tensor, plan: PairPlan) -> list[torch.Tensor]:
    """The chunks of a plan out of a (B, B, D) table."""
    samples = plan.order.view(plan.num_blocks, plan.block_size)
    return [table[samples[c.first][:, :, None], samples[c.second][:, None, :]] for c in plan.chunks]


@pytest.mark.parametrize("block", [1, 3, 5, 13, 16])
def test_sums_over_the_plan_are_sums_over_all_ordered_edges(block: int) -> None:
    table = symmetric_table(BATCH)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(block))
    plan = pair_plan(order, block)
    chunks = cut(table, plan)
    assert torch.equal(dense(chunks, plan), table)
    torch.testing.assert_close(edge_sum(chunks, plan), table.sum((0, 1)), rtol=1e-12, atol=1e-12)
    mean = table.mean((0, 1))
    torch.testing.assert_close(edge_square_sum(chunks, mean, plan), (table - mean).square().sum((0, 1)))
    into = table.new_zeros(plan.num_blocks, plan.block_size, table.shape[-1])
    for chunk, edges in zip(plan.chunks, chunks, strict=True):
        into = plan.sum_to_nodes(chunk, edges, into)
    torch.testing.assert_close(plan.samples(into), table.sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_partial_sums_of_the_shares_add_up(ranks: int) -> None:
    table = symmetric_table(BATCH, dim=4)
    block = graph_of(Size(2, 2, 4, 1, 1)).node_blocks[0]
    order = torch.arange(BATCH)
    whole = pair_plan(order, 3)
    parts = [pair_plan(order, 3, share=(rank, ranks)) for rank in range(ranks)]
    for function in (
        lambda plan: edge_to_node_sums(cut(table, plan), plan, block, None),
        lambda plan: edge_sum(cut(table, plan), plan),
        lambda plan: edge_square_sum(cut(table, plan), table.mean((0, 1)), plan),
    ):
        added = torch.stack([function(plan) for plan in parts]).sum(0)
        torch.testing.assert_close(added, function(whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_blocks_of_a_class_major_plan_hold_whole_classes(size: Size) -> None:
    plan = class_major_plan(size.num_classes, size.num_samples)
    labels = torch.arange(size.num_classes).repeat(size.num_samples)
    blocks = labels[plan.order].view(-1, size.num_samples)
    assert (blocks == blocks[:, :1]).all()
    real = plan.order if plan.valid is None else plan.order[plan.valid]
    assert sorted(real.tolist()) == list(range(size.batch))
    # Samples of a class in the order of the groups.
    groups = (real // size.num_classes).view(-1, size.num_samples)
    assert (groups == torch.arange(size.num_samples)).all()


def test_padding_is_marked_and_not_gathered_back() -> None:
    plan = pair_plan(torch.arange(7), 3)
    assert plan.num_blocks == 3
    assert plan.valid is not None
    assert plan.valid.tolist() == [True] * 7 + [False] * 2
    values = torch.arange(9.0).view(3, 3, 1)
    assert plan.samples(values)[:, 0].tolist() == list(range(7))
    assert pair_plan(torch.arange(6), 3).valid is None


def test_block_size_wastes_few_edges() -> None:
    # All edges of the plan against the P(P+1)/2 pairs that are needed.
    for classes, samples in ((27, 3), (40, 2), (320, 2), (81, 1)):
        plan = class_major_plan(classes, samples)
        computed = plan.num_blocks * (plan.num_blocks + 1) // 2 * plan.block_size**2
        batch = classes * samples
        assert computed <= 1.16 * batch * (batch + 1) / 2
        assert plan.block_size == block_classes(classes, samples) * samples
