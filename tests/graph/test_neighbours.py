"""The sparse graph: which classes a sample chooses, and which pairs a plan of them lists."""

import pytest
import torch
from maths_cases import SIZES, Size, assert_close, batch_of, generator, graph_of, plan_of, results
from sparse_reference import chosen_by_loops, kept_by_loops
from tensor_watch import TensorWatch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.graph import PairPlan, neighbours
from gcahng.graph.neighbours import connected_classes, nearest_classes, neighbour_plan


def times_listed(plan: PairPlan) -> Tensor:
    """(B, B) how often a plan's rows stand for each ordered edge."""
    count = torch.zeros(plan.batch_size, plan.batch_size, dtype=torch.int64)
    samples = plan.order.view(-1, plan.block_size)
    for chunk in plan.chunks:
        for first, second in zip(chunk.first.tolist(), chunk.second.tolist(), strict=True):
            count[samples[first][:, None], samples[second]] += 1
            if chunk.mirrored:
                count[samples[second][:, None], samples[first]] += 1
    return count


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("size", [Size(5, 2, 6, 1, 1), Size(11, 3, 4, 1, 1), Size(7, 4, 9, 1, 1)], ids=str)
def test_choice_and_plan_equal_loops(size: Size, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z, _ = batch_of(size, seed=k)
    # Two rows of anchors at a time, and a few pairs per chunk.
    monkeypatch.setitem(neighbours.SIMILARITIES_PER_CHUNK, "cpu", 2 * size.batch)
    assert nearest_classes(z, size.num_samples, k).tolist() == chosen_by_loops(z, size.num_samples, k)
    kept = kept_by_loops(z, size.num_samples, k)
    plan = neighbour_plan(z, size.num_samples, k, edges_per_chunk=3 * size.num_samples**2)
    assert torch.equal(times_listed(plan), kept.long())
    assert not plan.dense
    assert plan.degree is not None
    assert torch.equal(plan.degree, kept.sum(1))
    assert plan.edge_count == int(kept.sum())
    assert max(chunk.num_rows for chunk in plan.chunks) <= 3 * size.num_samples**2


def test_a_class_is_as_near_as_its_nearest_sample() -> None:
    # Class 1 has a sample beside the anchors and one opposite; class 2 lies between. Group-major, lengths differ.
    z = torch.tensor([[1.0, 0], [9, 1], [0, 1], [1, 0], [-1, 0], [0, 7]])
    assert nearest_classes(z, 2, 1).tolist() == [[1], [0], [1], [1], [2], [1]]


def test_length_does_not_matter() -> None:
    z, _ = batch_of(Size(6, 2, 5, 1, 1))
    scale = torch.rand(z.shape[0], 1, generator=generator(3), dtype=z.dtype) + 0.1
    assert torch.equal(nearest_classes(z, 2, 2), nearest_classes(scale * z, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equally_near_classes_are_taken_in_the_order_of_their_numbers(dtype: torch.dtype) -> None:
    # 40 classes, so that a sort of many equal values is at work: 30 alike, then 10 that are nearer.
    num_classes = 40
    z = torch.zeros(num_classes, 2, dtype=dtype)
    z[:30, 0], z[30:, 0], z[30:, 1] = 1, 3, 4
    want_alike = [[q for q in range(30) if q != p][:5] for p in range(30)]
    want_near = [[q for q in range(30, 40) if q != p] + [0, 1] for p in range(30, 40)]
    assert nearest_classes(z, 1, 5)[:30].tolist() == want_alike
    assert [sorted(row) for row in want_near] == nearest_classes(z, 1, 11)[30:].tolist()


def test_low_precision_operands_give_the_choice_of_the_rounded_vectors() -> None:
    # So many classes in so few channels that rounding changes who is near.
    size = Size(60, 2, 3, 1, 1, training_classes=60)
    z = batch_of(size)[0].float()
    rounded = torch.nn.functional.normalize(z, dim=1).bfloat16()
    similar = (rounded.double() @ rounded.double().T).view(120, 2, 60).amax(1)
    similar[torch.arange(120), torch.arange(120) % 60] = -2
    # The first of equal ones, as elsewhere.
    want = similar.sort(dim=1, descending=True, stable=True).indices[:, :3].sort(1).values
    exact = nearest_classes(z, 2, 3)
    assert not torch.equal(want, exact)
    assert torch.equal(nearest_classes(z, 2, 3, low=torch.bfloat16), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_classes(z, 2, 3), exact)


def test_pairs_are_symmetric_unique_and_ordered() -> None:
    # Sample 0 of class 0 chose class 2, so did sample 1; class 2 chose class 0 back; class 1 chose class 2 once.
    chosen = torch.tensor([[2], [2], [0], [2], [0], [0]])
    first, second = connected_classes(chosen, 3)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shares_list_every_pair_once(ranks: int) -> None:
    size = Size(13, 2, 6, 1, 1)
    z, _ = batch_of(size)
    whole = neighbour_plan(z, 2, 3)
    plans = [neighbour_plan(z, 2, 3, share=(rank, ranks)) for rank in range(ranks)]
    assert torch.equal(sum(times_listed(plan) for plan in plans), times_listed(whole))
    rows = [plan.num_rows for plan in plans]
    assert max(rows) - min(rows) <= 4
    for rank, plan in enumerate(plans):
        assert plan.share == (rank, ranks)
        assert plan.edge_count == whole.edge_count
        assert plan.degree is not None
        assert whole.degree is not None
        assert torch.equal(plan.degree, whole.degree)


def test_no_gradient_flows_through_the_choice() -> None:
    size = Size(6, 2, 5, 1, 1)
    z, _ = batch_of(size)
    plan = neighbour_plan(z.requires_grad_(), 2, 2)
    assert plan.degree is not None
    assert not plan.degree.requires_grad
    assert not any(chunk.first.requires_grad or chunk.second.requires_grad for chunk in plan.chunks)


def test_embeddings_that_are_not_finite_choose_and_are_chosen() -> None:
    z, _ = batch_of(Size(8, 2, 5, 1, 1))
    z[3] = torch.nan
    z[9, 2] = torch.inf
    z[12] = 0
    chosen = nearest_classes(z, 2, 3)
    assert chosen.min() >= 0
    assert chosen.max() < 8
    assert all(len(set(row)) == 3 and i % 8 not in row for i, row in enumerate(chosen.tolist()))


def test_choosing_never_holds_the_whole_similarity_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, dim = 600, 4
    bound = 50 * batch
    monkeypatch.setitem(neighbours.SIMILARITIES_PER_CHUNK, "cpu", bound)
    z = torch.randn(batch, dim, generator=generator(0))
    with TensorWatch() as watch:
        neighbour_plan(z, 2, 5)
    assert (50, batch) in watch.shapes
    assert watch.largest <= bound


@pytest.mark.parametrize("k", [0, -2])
def test_k_below_one_is_refused(k: int) -> None:
    z, _ = batch_of(Size(4, 2, 5, 1, 1))
    with pytest.raises(InputError, match=f"neighbour classes of a sample, must be at least 1: got {k}"):
        neighbour_plan(z, 2, k)


@pytest.mark.parametrize(("rows", "num_samples"), [(7, 2), (3, 3), (4, 0)])
def test_a_batch_that_is_not_group_major_is_refused(rows: int, num_samples: int) -> None:
    with pytest.raises(InputError, match=f"K = {num_samples} samples of each of two or more classes: got shape"):
        neighbour_plan(torch.randn(rows, 4), num_samples, 1)


@pytest.mark.parametrize("edge_dropout", ["tied", "independent"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_classes_as_neighbours_give_the_dense_graph(size: Size, edge_dropout: str) -> None:
    z, labels = batch_of(size)
    for beyond in (0, 5):
        plan = neighbour_plan(z, size.num_samples, size.num_classes - 1 + beyond)
        assert not plan.dense
        assert plan.edge_count == size.batch**2
        graphs = [graph_of(size, dropout=0.3, edge_dropout=edge_dropout) for _ in range(2)]
        dense = results(graphs[0], z, labels, plan=plan_of(size), dropout_key=3)
        sparse = results(graphs[1], z, labels, plan=plan, dropout_key=3)
        assert_close(sparse, dense, 1e-12)


def test_the_graph_holds_no_table_of_all_pairs() -> None:
    size = Size(31, 2, 8, 2, 2, training_classes=40)
    z, labels = batch_of(size)
    graph = graph_of(size)
    plan = neighbour_plan(z, 2, 2)
    with TensorWatch() as watch:
        output = graph(z.requires_grad_(), labels, plan=plan, dropout_key=1)
        output.node_logits.sum().backward()
    assert (size.batch, size.dim) in watch.shapes
    assert watch.with_axes([size.batch, size.batch]) == []
    with TensorWatch() as watch:
        graph(z, labels, plan=plan_of(size), dropout_key=1)
    assert watch.with_axes([size.batch, size.batch]) != []


def test_the_edge_list_backend_refuses_a_sparse_plan() -> None:
    size = Size(5, 2, 8, 1, 2)
    z, labels = batch_of(size)
    graph = graph_of(size, backend="scatter")
    with pytest.raises(InputError, match="scatter computes every pair, but the plan lists some"):
        graph(z, labels, plan=neighbour_plan(z, 2, 1))
