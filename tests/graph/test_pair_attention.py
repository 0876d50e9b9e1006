"""Node attention over listed pairs against masks of all pairs, in values and gradients."""

import pytest
import torch
from maths_cases import Size, assert_close, batch_of, errors, generator, graph_of, plan_of
from share_threads import Group
from tensor_watch import TensorWatch
from torch import Tensor

from gcahng.graph import PairPlan, identity
from gcahng.graph.blocks import NodeBlock
from gcahng.graph.neighbours import neighbour_plan
from gcahng.graph.network import Reducer
from gcahng.graph.pair_attention import pair_attention
from gcahng.graph.pairs import PairChunk, pair_plan

SPARSE = (Size(5, 2, 12, 1, 3), Size(9, 3, 8, 1, 1), Size(4, 4, 16, 1, 4))


def projections(size: Size, seed: int = 0, spread: float = 1.0) -> list[Tensor]:
    """Query, key and value (B, H, d)."""
    draw = generator(seed)
    shape = (3, size.batch, size.heads, size.dim // size.heads)
    return [(spread * x).requires_grad_() for x in torch.randn(shape, generator=draw, dtype=torch.float64)]


def listed(plan: PairPlan) -> Tensor:
    """(B, B) bool, the edges of a plan."""
    kept = torch.zeros(plan.batch_size, plan.batch_size, dtype=torch.bool)
    samples = plan.order.view(-1, plan.block_size)
    for chunk in plan.chunks:
        for first, second in zip(chunk.first.tolist(), chunk.second.tolist(), strict=True):
            kept[samples[first][:, None], samples[second]] = True
            kept[samples[second][:, None], samples[first]] = True
    return kept


def by_mask(query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Tensor:
    """The off-by-one softmax over all pairs, those not kept left out: (B, H, d)."""
    scores = torch.einsum("ihd,jhd->hij", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~kept, -torch.inf)
    scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], 2)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1)[..., :-1], value)


def with_gradients(result: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
    weights = torch.randn(result.shape, generator=generator(9), dtype=torch.float64).to(result.dtype)
    grads = torch.autograd.grad((result * weights).sum(), inputs)
    return {"result": result.detach()} | {
        name: grad.double() for name, grad in zip(("query", "key", "value"), grads, strict=True)
    }


def attend(inputs: list[Tensor], labels: Tensor, plan: PairPlan, reduce: Reducer = identity) -> dict[str, Tensor]:
    return with_gradients(pair_attention(*inputs, labels, plan, low=None, reduce=reduce), inputs)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("size", SPARSE, ids=str)
def test_equals_a_mask_over_all_pairs(size: Size, k: int) -> None:
    z, labels = batch_of(size)
    plan = neighbour_plan(z, size.num_samples, k, edges_per_chunk=5 * size.num_samples**2)
    kept = listed(plan) & (labels[:, None] != labels)
    inputs = projections(size)
    assert_close(attend(inputs, labels, plan), with_gradients(by_mask(*inputs, kept), inputs), 1e-12)


@pytest.mark.parametrize("size", [Size(7, 2, 12, 1, 2), Size(13, 3, 8, 1, 8)], ids=str)
def test_plans_of_every_pair_equal_the_fused_attention(size: Size) -> None:
    # Blocks of several classes, padding, samples in any order.
    h, labels = batch_of(size)
    h.requires_grad_()
    block = graph_of(size).node_blocks[0]
    assert isinstance(block, NodeBlock)
    shuffled = pair_plan(torch.randperm(size.batch, generator=generator(1)), 4)
    want = block.attend(h, labels[:, None] != labels, None)
    weights = torch.randn(h.shape, generator=generator(2), dtype=h.dtype)
    (want_grad,) = torch.autograd.grad((want * weights).sum(), h)
    for plan in (plan_of(size), shuffled):
        got = block.attend_listed(h, labels, plan, None, identity)
        (got_grad,) = torch.autograd.grad((got * weights).sum(), h)
        assert_close({"value": got.detach(), "grad": got_grad}, {"value": want.detach(), "grad": want_grad}, 1e-12)


@pytest.mark.parametrize(("size", "ranks"), [(SPARSE[0], 2), (SPARSE[1], 3), (Size(3, 2, 4, 1, 1), 5)], ids=str)
def test_shares_of_the_pairs_give_what_one_process_gives(size: Size, ranks: int) -> None:
    z, labels = batch_of(size)
    # With the larger scores, a maximum over the own pairs alone would overflow; gradients of keys vanish there.
    for spread, names in ((2.0, ("result", "query", "key", "value")), (30.0, ("result", "value"))):
        want = attend(projections(size, spread=spread), labels, neighbour_plan(z, size.num_samples, 2))
        group = Group(ranks)

        def work(rank: int, spread: float = spread, group: Group = group) -> dict[str, Tensor]:
            plan = neighbour_plan(z, size.num_samples, 2, share=(rank, ranks))
            return attend(projections(size, spread=spread), labels, plan, group.reducer(rank))

        found = group.run(work)
        for one in found:
            assert torch.equal(one["result"], found[0]["result"])
        mean = {name: torch.stack([one[name] for one in found]).mean(0) for name in names}
        assert_close(mean, {name: want[name] for name in names}, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    size = SPARSE[0]
    z, labels = batch_of(size)
    plan = neighbour_plan(z, size.num_samples, 2)
    for spread in (1e-9, 200.0):
        inputs = [x.detach().to(dtype).requires_grad_() for x in projections(size, spread=spread)]
        found = attend(inputs, labels, plan)
        assert all(torch.isfinite(value).all() for value in found.values())


def test_low_scores_leave_the_weight_to_the_extra_key() -> None:
    size = Size(3, 2, 4, 1, 1)
    _, labels = batch_of(size)
    query = torch.full((6, 1, 4), 20.0, dtype=torch.float64)
    found = pair_attention(query, -query, query, labels, plan_of(size), low=None, reduce=identity)
    assert found.abs().max() < 1e-100


def test_a_node_without_listed_pairs_of_other_classes_gets_nothing() -> None:
    size = Size(4, 2, 8, 1, 2)
    z, labels = batch_of(size)
    whole = neighbour_plan(z, 2, 1)
    # Own-class blocks, and the pair of classes 0 and 2.
    lone = torch.tensor([0]), torch.tensor([2])
    chunks = (whole.chunks[0], PairChunk(*lone, 2, whole.chunks[0].num_rows, True))
    plan = PairPlan(8, 2, whole.order, None, chunks, (0, 1), 24, torch.tensor([4, 2, 4, 2]).repeat(2))
    inputs = projections(size)
    found = attend(inputs, labels, plan)
    alone = [1, 3, 5, 7]
    for value in found.values():
        assert value[alone].abs().max() == 0
    kept = listed(plan) & (labels[:, None] != labels)
    assert_close(found, with_gradients(by_mask(*inputs, kept), inputs), 1e-12)


def test_low_precision_operands_stay_near_the_fused_attention() -> None:
    size = Size(9, 2, 64, 1, 2)
    h, labels = batch_of(size)
    block = graph_of(size).node_blocks[0].float()
    assert isinstance(block, NodeBlock)
    h = h.float().requires_grad_()
    found = {}
    for name in ("exact", "listed", "fused"):
        low = None if name == "exact" else torch.bfloat16
        if name == "listed":
            out = block.attend_listed(h, labels, neighbour_plan(h, 2, 8), low, identity)
        else:
            out = block.attend(h, labels[:, None] != labels, low)
        (grad,) = torch.autograd.grad(out.square().sum(), h)
        found[name] = {"value": out.detach(), "grad": grad}
    assert not torch.equal(found["listed"]["value"], found["exact"]["value"])
    listed_error, fused_error = (errors(found[name], found["exact"]) for name in ("listed", "fused"))
    for name, error in listed_error.items():
        assert error <= 1.2 * fused_error[name] + 1e-3, name


def test_low_precision_rounds_the_operands_and_nothing_else() -> None:
    size = SPARSE[0]
    z, labels = batch_of(size)
    plan = neighbour_plan(z, size.num_samples, 2)
    inputs = [x.detach().float() for x in projections(size)]
    found = pair_attention(*inputs, labels, plan, low=torch.bfloat16, reduce=identity)
    rounded = [x.bfloat16().float() for x in inputs]
    assert torch.equal(found, pair_attention(*rounded, labels, plan, low=None, reduce=identity))
    for kept in range(3):
        some = [inputs[i] if i == kept else rounded[i] for i in range(3)]
        assert not torch.equal(found, pair_attention(*some, labels, plan, low=None, reduce=identity))


def test_a_backward_pass_inside_autocast_keeps_its_precision() -> None:
    size = SPARSE[0]
    z, labels = batch_of(size)
    plan = neighbour_plan(z, size.num_samples, 2)
    inputs = [x.detach().float().requires_grad_() for x in projections(size)]
    want = attend(inputs, labels, plan)
    result = pair_attention(*inputs, labels, plan, low=None, reduce=identity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(result, inputs)
    for name, value in want.items():
        assert torch.equal(found[name], value), name


def test_memory_is_that_of_the_nodes_and_one_chunk() -> None:
    size = Size(60, 2, 16, 1, 2, training_classes=60)
    z, labels = batch_of(size)
    plan = neighbour_plan(z, 2, 8, edges_per_chunk=32)
    inputs = projections(size)
    with TensorWatch() as watch:
        attend(inputs, labels, plan)
    assert plan.num_rows > size.batch
    # (B, D), no more: scores and gathered values of all pairs would be larger.
    assert watch.largest == size.batch * size.dim
    assert watch.with_axes([size.batch, size.batch]) == []
