"""Retrieval against a plain loop, on data with ties, duplicates, long tails and tiny sets."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gcahng.metrics import RetrievalResult, nearest, retrieval
from gcahng.metrics.tiles import BLOCK

KS = (1, 2, 4, 8)


def loop_ranking(query: Tensor, gallery: Tensor, excluded: list[int | None]) -> list[list[int]]:
    """Gallery indices per query by (higher cosine, lower index), one pair at a time."""
    unit_query, unit_gallery = (
        [(row / max(math.sqrt(float(row @ row)), 1e-12)).tolist() for row in side.to(torch.float64)]
        for side in (query, gallery)
    )
    result = []
    for own, row in zip(excluded, unit_query, strict=True):
        cosine = [sum(a * b for a, b in zip(row, other, strict=True)) for other in unit_gallery]
        order = sorted(range(len(cosine)), key=lambda index: (-cosine[index], index))
        result.append([index for index in order if index != own])
    return result


def loop_metrics(
    ranked: list[list[int]], query_labels: Tensor, gallery_labels: Tensor
) -> list[tuple[int, int, float, float]]:
    """(R, first hit, R-Precision, AP@R) of each query; (0, 0, nan, nan) without a reference."""
    result = []
    for order, label in zip(ranked, query_labels.tolist(), strict=True):
        hits = [int(gallery_labels[index]) == label for index in order]
        total = sum(hits)
        if total == 0:
            result.append((0, 0, math.nan, math.nan))
            continue
        precision = [sum(hits[: r + 1]) / (r + 1) for r in range(total) if hits[r]]
        result.append((total, hits.index(True) + 1, sum(hits[:total]) / total, sum(precision) / total))
    return result


def assert_matches_loop(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
) -> None:
    is_self = gallery is None
    others = query if gallery is None else gallery
    other_labels = query_labels if gallery_labels is None else gallery_labels
    num_candidates = len(others) - is_self
    excluded = [index if is_self else None for index in range(len(query))]
    ranked = loop_ranking(query, others, excluded)
    want = loop_metrics(ranked, query_labels, other_labels)

    ks = tuple(k for k in KS if k <= num_candidates) + (num_candidates,)
    for precision, memory_mb in (("bf16", 512), ("fp32", 512), ("bf16", 1)):
        got = retrieval(
            query,
            query_labels,
            gallery,
            gallery_labels,
            ks,
            precision_ks=ks,
            num_neighbours=num_candidates,
            precision=precision,
            memory_mb=memory_mb,
        )
        assert got.neighbours is not None
        assert got.neighbours.tolist() == ranked
        assert_values(got, want)
        assert_precisions(got, ranked, other_labels, ks)

        # Without neighbours and precisions the depth is R alone.
        shallow = retrieval(query, query_labels, gallery, gallery_labels, ks, precision=precision)
        assert shallow.neighbours is None
        assert shallow.recall_at_k == got.recall_at_k
        assert_values(shallow, want)


def assert_precisions(
    got: RetrievalResult, ranked: list[list[int]], gallery_labels: Tensor, ks: tuple[int, ...]
) -> None:
    labels, answered = got.query_labels.tolist(), []
    for query, order in enumerate(ranked):
        hits = [int(gallery_labels[index]) == labels[query] for index in order]
        want = [sum(hits[:k]) / k if any(hits) else math.nan for k in ks]
        assert got.query_precision_at_k[query].tolist() == pytest.approx(want, nan_ok=True)
        answered += [want] if any(hits) else []
    means = [sum(column) / len(answered) for column in zip(*answered, strict=True)]
    assert list(got.precision_at_k) == list(dict.fromkeys(ks))
    assert [got.precision_at_k[k] for k in ks] == pytest.approx(means)


def assert_values(got: RetrievalResult, want: list[tuple[int, int, float, float]]) -> None:
    """Compare single queries and means with the loop's (R, first hit, RP, AP@R)."""
    answered = [row for row in want if row[0]]
    assert got.num_references.tolist() == [row[0] for row in want]
    assert got.first_hit_rank.tolist() == [row[1] for row in want]
    assert got.query_r_precision.tolist() == pytest.approx([r[2] for r in want], nan_ok=True)
    assert got.query_map_at_r.tolist() == pytest.approx([r[3] for r in want], nan_ok=True)
    assert got.num_queries == len(want)
    assert got.without_reference.tolist() == [i for i, row in enumerate(want) if not row[0]]
    assert got.num_without_reference == len(want) - len(answered)
    assert got.r_precision == pytest.approx(sum(r[2] for r in answered) / len(answered))
    assert got.mrr == pytest.approx(sum(1 / r[1] for r in answered) / len(answered))
    assert got.map_at_r == pytest.approx(sum(r[3] for r in answered) / len(answered))
    for k, recall in got.recall_at_k.items():
        assert recall == pytest.approx(sum(row[1] <= k for row in answered) / len(answered))


def with_exact_ties(num_items: int, generator: torch.Generator) -> Tensor:
    """Rows of four entries +-1 in six channels: every cosine is an exact multiple of 1/4."""
    sign = torch.randint(0, 2, (num_items, 6), generator=generator) * 2 - 1
    order = torch.rand(num_items, 6, generator=generator).argsort(dim=1)
    return (sign * (order < 4)).to(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_self_retrieval_on_random_data(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 5, generator=generator, dtype=dtype)
    assert_matches_loop(x, torch.randint(0, 12, (60,), generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_query_and_gallery_on_random_data(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 5, generator=generator, dtype=dtype)
    y = torch.randint(0, 9, (30,), generator=generator)
    g = torch.randn(70, 5, generator=generator, dtype=dtype)
    assert_matches_loop(x, y, g, torch.randint(1, 12, (70,), generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_equal_scores_are_ordered_by_gallery_index(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = with_exact_ties(90, generator).to(dtype)
    y = torch.randint(0, 15, (90,), generator=generator)
    assert_matches_loop(x, y)
    assert_matches_loop(x[:40], y[:40], x[40:], y[40:])


def test_one_embedding_for_all_ranks_by_index() -> None:
    y = torch.arange(40) % 7
    assert_matches_loop(torch.ones(40, 3), y)
    assert_matches_loop(torch.zeros(40, 3), y)


def test_duplicate_images_stay_and_only_the_query_itself_is_excluded() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    y = torch.tensor([0, 1, 0, 1])
    result = retrieval(x, y, ks=(1, 2, 3), num_neighbours=3)
    assert result.neighbours is not None
    assert result.neighbours.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert result.first_hit_rank.tolist() == [2, 3, 1, 2]


def test_long_tail_where_r_exceeds_every_k() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [70, 20, 6, 3, 2, 2, 1, 1, 1]
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    y = y[torch.randperm(len(y), generator=generator)] - 4  # negative classes are classes too
    assert_matches_loop(torch.randn(len(y), 4, generator=generator), y)
    assert_matches_loop(with_exact_ties(len(y), generator), y)


@pytest.mark.parametrize("num_items", [2, 3, 5])
def test_tiny_sets(num_items: int) -> None:
    x = torch.randn(num_items, 3, generator=torch.Generator().manual_seed(num_items))
    assert_matches_loop(x, torch.tensor([5, 5, 6, 6, 7])[:num_items])
    assert_matches_loop(x[:1], torch.tensor([5]), x, torch.tensor([5, 5, 6, 6, 7])[:num_items])


def test_neighbours_have_their_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    got = retrieval(x, torch.arange(50) // 2, num_neighbours=5)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    assert got.neighbours is not None and got.neighbour_scores is not None
    torch.testing.assert_close(
        got.neighbour_scores.double(), (unit @ unit.t()).gather(1, got.neighbours), rtol=0, atol=2**-23
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nearest_excludes_by_index_and_agrees_with_self_retrieval(dtype: torch.dtype) -> None:
    x = torch.randn(700, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = retrieval(x, torch.arange(700) // 2, num_neighbours=30)
    scores, indices = nearest(x, x, 30, exclude=torch.arange(700), memory_mb=1)
    assert torch.equal(got.neighbours, indices)
    assert torch.equal(got.neighbour_scores, scores)


def test_queries_without_reference_are_listed_and_left_out_of_the_means() -> None:
    x = torch.eye(5)[[0, 0, 1, 2, 3]]
    result = retrieval(x, torch.tensor([0, 0, 1, 2, 3]), ks=(1,))
    assert result.num_queries == 5
    assert result.num_without_reference == 3
    assert result.without_reference.tolist() == [2, 3, 4]
    assert result.recall_at_k == {1: 1.0}
    assert result.map_at_r == result.r_precision == 1.0
    assert result.query_map_at_r[2:].isnan().all()


def test_large_int64_labels_stay_apart() -> None:
    """Neighbouring classes above 2**53 are one number in float64."""
    big = 2**60
    x = torch.eye(4)[[0, 0, 1, 1]]
    result = retrieval(x, torch.tensor([big, big + 1, big, big + 1]), ks=(1,))
    assert result.recall_at_k == {1: 0.0}


def test_result_does_not_require_grad_and_leaves_the_input_alone() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = x.detach().clone()
    result = retrieval(x, torch.arange(8) // 2, ks=(1,))
    assert not result.query_map_at_r.requires_grad
    assert torch.equal(x.detach(), before)


class LargestTensor(TorchDispatchMode):
    """Notes the entries of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple) else (result,):
            if isinstance(item, Tensor):
                self.entries = max(self.entries, item.numel())
        return result


@pytest.mark.parametrize("num_classes", [1, 50, 900])
def test_no_table_of_all_pairs(num_classes: int) -> None:
    num_items = 2 * BLOCK - 1000
    x = torch.randn(num_items, 4, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        retrieval(x, torch.arange(num_items) % num_classes, memory_mb=64)
    assert BLOCK**2 <= largest.entries < 1.1 * BLOCK**2
