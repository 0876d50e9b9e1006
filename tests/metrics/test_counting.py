"""Several blocks of items: error bounds of tiles, and ranks as from a table of all exact scores."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from gcahng.metrics import counting, nearest, retrieval, search
from gcahng.metrics.retrieval import _mean
from gcahng.metrics.tiles import BLOCK, TileMaker, Vectors, computed_limits
from gcahng.metrics.unit_vectors import all_scores, full_precision, unit_vectors

nearest_module = import_module("gcahng.metrics.nearest")


def trained(num_items: int, noise: float, channels: int = 24) -> tuple[Tensor, Tensor]:
    """Embeddings around class centres, classes of 1 to 80 items, mixed up."""
    generator = torch.Generator().manual_seed(7)
    labels = (torch.rand(num_items, generator=generator) ** 3 * num_items / 3).to(torch.int64)
    centres = torch.randn(num_items, channels, generator=generator)
    return centres[labels] + noise * torch.randn(num_items, channels, generator=generator), labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "channels"), [(BLOCK, 3), (64, 1), (BLOCK, 498)])
@pytest.mark.parametrize("aligned", [True, False])
def test_tiles_keep_their_bounds(dtype: torch.dtype, count: int, channels: int, aligned: bool) -> None:
    low = dtype == torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, channels, generator=generator)
    # Equal entries: their rounding errors have one sign. 498 ^ -1/2 is nearly halfway between two bfloat16 numbers.
    x = torch.ones_like(x) + 1e-6 * x if aligned else x
    unit = unit_vectors(x)
    vectors, exact = Vectors.of(unit, low=low), all_scores(unit, unit)
    with full_precision():
        tile = TileMaker(unit.device).tile(vectors, vectors, dtype)
    stored = tile.stored_roundoff * tile.scores.double().abs()
    error = (tile.scores.double() - exact).abs()
    assert (error <= tile.row_error.double().unsqueeze(1) + stored).all()
    assert (error <= tile.column_error.double() + stored).all()
    if low and aligned and channels == 498:  # the bound is not idle: the error comes near it
        assert (error / (tile.row_error.double().unsqueeze(1) + stored)).max() > 0.5

    for wanted in (exact[0], exact[:, -1].flip(0), torch.full((count,), -torch.inf).double()):
        limits = computed_limits(tile, wanted, tile.row_error)
        matters = exact >= wanted.unsqueeze(1)
        assert (tile.scores >= limits.unsqueeze(1))[matters].all()
    assert computed_limits(tile, exact[0, :5], tile.row_error)[5:].isinf().all()


def table_ranks(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) first hits and (n, n - 1) hits by rank, from all exact scores."""
    unit = unit_vectors(x)
    scores = all_scores(unit, unit).fill_diagonal_(-torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :-1]
    hits = labels[order] == labels.unsqueeze(1)
    first = torch.where(hits.any(1), hits.int().argmax(1) + 1, 0)
    return first, hits


@pytest.mark.parametrize(("noise", "precision"), [(0.3, "bf16"), (1.5, "bf16"), (30.0, "bf16"), (1.5, "fp32")])
def test_blocks_agree_with_the_whole_table(noise: float, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = trained(BLOCK + 700, noise)
    first, hits = table_ranks(x, labels)
    far_queries = []
    count_far = search.count_far
    monkeypatch.setattr(search, "count_far", lambda *given: far_queries.append(len(given[2])) or count_far(*given))
    got = retrieval(x, labels, ks=(1, 1000), precision_ks=(1, 40), precision=precision)
    assert torch.equal(got.first_hit_rank, first)
    num = hits.sum(1)
    assert torch.equal(got.num_references, num)
    place = torch.arange(1, hits.shape[1] + 1)
    relevant = hits & (place <= num.unsqueeze(1))
    answered = num > 0
    precisions = (relevant.cumsum(1) / place * relevant).sum(1).double() / num
    torch.testing.assert_close(got.query_map_at_r[answered], precisions[answered], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got.query_r_precision[answered], (relevant.sum(1).double() / num)[answered])
    torch.testing.assert_close(got.query_precision_at_k[answered, 1], hits[:, :40].double().mean(1)[answered])
    # Nearly all queries of the last set have first references far down.
    assert (sum(far_queries) > 400) == (noise == 30.0)


def test_crowded_tiles_turn_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores within a hundredth of each other leave most pairs open in bfloat16."""
    x, labels = trained(3 * BLOCK, 0.5)
    x = x * 0.02 + torch.ones(x.shape[1])
    used = []
    tile = TileMaker.tile
    monkeypatch.setattr(TileMaker, "tile", lambda self, *given: used.append(given[2]) or tile(self, *given))
    monkeypatch.setattr(counting, "_MOST_PENDING", 0)
    found = {
        precision: retrieval(
            x[:300], labels[:300], x[300:], labels[300:], ks=(1,), precision_ks=(1000,), precision=precision
        )
        for precision in ("bf16", "fp32")
    }
    assert used == [torch.bfloat16, torch.bfloat16, torch.float32, *([torch.float32] * 3)]
    assert torch.equal(found["bf16"].first_hit_rank, found["fp32"].first_hit_rank)
    low, full = (found[precision].query_precision_at_k.nan_to_num(-1) for precision in ("bf16", "fp32"))
    assert torch.equal(low, full)


def test_embeddings_all_alike_turn_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bound tells such pairs apart: one by one they would take hours for a test set."""
    x, labels = trained(800, 1.0)
    x = 1 + 1e-3 * x
    for module in (counting, search, nearest_module):
        monkeypatch.setattr(module, "BLOCK", 64)
    for module in (counting, nearest_module):
        monkeypatch.setattr(module, "CROWDED", 64)
    monkeypatch.setattr(counting, "_MOST_PENDING", 0)
    used, scored = [], []
    tile, pairs = TileMaker.tile, counting.pair_scores
    monkeypatch.setattr(TileMaker, "tile", lambda self, *given: used.append(given[2]) or tile(self, *given))
    monkeypatch.setattr(counting, "pair_scores", lambda *given: scored.append(len(given[2])) or pairs(*given))
    got = retrieval(x[:60], labels[:60], x[60:], labels[60:], ks=(1,), precision="fp32")
    assert used[:4] == [torch.float32, torch.float32, torch.float64, torch.float64]
    assert sum(scored) < 3 * 60 * 64
    scores = all_scores(unit_vectors(x[:60]), unit_vectors(x[60:]))
    order = scores.sort(dim=1, descending=True, stable=True).indices
    hits = labels[60:][order] == labels[:60].unsqueeze(1)
    assert torch.equal(got.first_hit_rank, torch.where(hits.any(1), hits.int().argmax(1) + 1, 0))
    used.clear()
    assert torch.equal(nearest(x[:60], x[60:], 3, precision="fp32")[1], order[:, :3])
    assert used[-1] == torch.float64


def test_equal_items_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them reach the k-th best score; only k of each query are kept."""
    kept = []
    settle = nearest_module._Pool._settle
    monkeypatch.setattr(nearest_module._Pool, "_settle", lambda self: (settle(self), kept.append(len(self.query)))[0])
    _, indices = nearest(torch.ones(200, 3), torch.ones(2 * BLOCK, 3), 5)
    assert torch.equal(indices, torch.arange(5).expand(200, 5))
    assert max(kept) <= 4 * 5 * 200 + nearest_module.CROWDED


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_nearest_over_several_blocks(precision: str) -> None:
    x, _ = trained(BLOCK + 300, 1.0)
    x[5:900:3] = x[3]  # many equal scores
    unit = unit_vectors(x)
    scores, order = all_scores(unit[:50], unit).sort(dim=1, descending=True, stable=True)
    for k in (1, 60, 1700):
        got_scores, got = nearest(x[:50], x, k, precision=precision, memory_mb=8)
        assert torch.equal(got, order[:, :k])
        assert torch.equal(got_scores, scores[:, :k].float())


def test_means_do_not_depend_on_the_order_of_summation() -> None:
    """Torch adds up in as many parts as it has threads."""
    assert _mean(torch.tensor([1e16, 1.0, -1e16, 1.0], dtype=torch.float64)) == 0.5
