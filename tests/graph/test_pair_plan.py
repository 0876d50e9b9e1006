"""Block pairs: every pair once, padding left out of sums, shares of processes."""

import copy
import itertools

import pytest
import torch
from maths_cases import OWN_PATHS, SIZES, Size, batch_of, graph_of
from share_threads import Group

from gcahng.graph import PairPlan, block_classes, identity, pair_plan
from gcahng.graph.network import Reducer
from gcahng.graph.pairs import add_ends, class_major_plan, ends

BATCH = 13


def block_pairs(plan: PairPlan) -> list[tuple[int, int]]:
    found = []
    for chunk in plan.chunks:
        assert chunk.mirrored == bool((chunk.first != chunk.second).any())
        assert not chunk.mirrored or bool((chunk.first < chunk.second).all())
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


@pytest.mark.parametrize("block", [1, 3, 5, 13, 16])
def test_ends_and_their_adjoint(block: int) -> None:
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(block))
    plan = pair_plan(order, block, edges_per_chunk=60)
    values = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    positions = plan.positions(values)
    assert torch.equal(plan.samples(positions), values)
    samples = plan.order.view(plan.num_blocks, block)
    into, product = torch.zeros_like(positions), 0.0
    for number, chunk in enumerate(plan.chunks):
        first, second = ends(positions, chunk)
        assert torch.equal(first, values[samples[chunk.first]])
        assert torch.equal(second, values[samples[chunk.second]])
        draw = torch.Generator().manual_seed(number)
        mix = [torch.randn(first.shape, generator=draw, dtype=torch.float64) for _ in range(2)]
        product += float((first * mix[0]).sum() + (second * mix[1]).sum())
        add_ends(into, chunk, mix[0], None)
        add_ends(into, chunk, None, mix[1])
    assert float((positions * into).sum()) == pytest.approx(product, rel=1e-12)


def test_chunks_lie_one_after_the_other_in_the_buffer() -> None:
    plan = pair_plan(torch.arange(BATCH), 4, edges_per_chunk=40)
    buffer = torch.arange(2.0 * plan.num_rows).view(-1, 2)
    seen = [chunk.of(buffer) for chunk in plan.chunks]
    assert torch.equal(torch.cat([rows.flatten(0, 2) for rows in seen]), buffer)
    assert all(rows.shape == (chunk.first.numel(), 4, 4, 2) for rows, chunk in zip(seen, plan.chunks, strict=True))


def test_more_processes_than_pairs_leave_some_an_empty_chunk() -> None:
    plans = [pair_plan(torch.arange(4), 4, share=(rank, 3)) for rank in range(3)]
    assert sorted(plan.num_rows for plan in plans) == [0, 0, 16]
    assert all(len(plan.chunks) == 1 for plan in plans)
    assert all(plan.edge_count == 16 and plan.dense for plan in plans)


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
    assert plan.order.tolist() == [*range(7), 0, 0]
    values = torch.arange(9.0).view(9, 1)
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


SOME_BATCHES = ((24, 2), (27, 3), (40, 2), (64, 4), (100, 2), (320, 2))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(("classes", "samples"), SOME_BATCHES)
def test_blocks_can_be_dealt_out_evenly(classes: int, samples: int, ranks: int, device: str) -> None:
    def rows(of_block: int) -> list[int]:
        order = torch.arange(classes * samples)
        plans = [pair_plan(order, of_block * samples, share=(rank, ranks)) for rank in range(ranks)]
        together = [pair for plan in plans for pair in block_pairs(plan) if plan.num_rows]
        assert sorted(together) == list(itertools.combinations_with_replacement(range(plans[0].num_blocks), 2))
        return [plan.num_rows for plan in plans]

    found = rows(block_classes(classes, samples, device, ranks))
    assert max(found) <= 1.05 * sum(found) / ranks
    # No rank has noticeably more to do than with the blocks of one process, or far more than the pairs that are needed.
    assert max(found) <= 1.01 * max(rows(block_classes(classes, samples, device)))
    assert max(found) <= 1.22 * classes * samples * (classes * samples + 1) / 2 / ranks


def test_blocks_of_one_process_stay_and_large_ones_give_way() -> None:
    # 15 pairs of blocks of 16 would be 4 for one of 4 processes: 1024 rows of 3240 that are needed.
    assert [block_classes(40, 2, "cuda", ranks) * 2 for ranks in (1, 4, 8)] == [16, 8, 8]
    assert [block_classes(320, 2, "cuda", ranks) * 2 for ranks in (1, 4, 8)] == [16, 16, 16]
    assert block_classes(5, 30, "cuda", 4) == 1
    assert [block_classes(24, 2, "cpu", ranks) * 2 for ranks in (1, 4)] == [4, 2]


def test_processes_choose_the_same_blocks_and_find_the_same_nodes() -> None:
    size, ranks = Size(24, 2, 8, 2, 2, training_classes=30), 4
    z, labels = batch_of(size)
    graph = graph_of(size, dropout=0.3)

    def nodes(share: tuple[int, int], reduce: Reducer) -> torch.Tensor:
        plan = class_major_plan(size.num_classes, size.num_samples, share=share)
        assert plan.block_size == (4 if share[1] == 1 else 2)
        with torch.no_grad():
            return copy.deepcopy(graph)(z, labels, dropout_key=3, plan=plan, reduce=reduce).node_logits

    group = Group(ranks)
    want = nodes((0, 1), identity)
    for found in group.run(lambda rank: nodes((rank, ranks), group.reducer(rank))):
        assert float((found - want).abs().max()) <= OWN_PATHS * float(want.abs().max())


def test_a_plan_is_made_once_and_serves_every_mode() -> None:
    class_major_plan.cache_clear()
    with torch.inference_mode():
        made = class_major_plan(3, 2)
    assert class_major_plan(3, 2) is made
    assert class_major_plan(3, 2, share=(0, 2)) is not made
    x = torch.randn(6, 2, requires_grad=True)
    made.positions(x).sum().backward()  # an index made in inference mode could not be kept for this
    class_major_plan.cache_clear()
