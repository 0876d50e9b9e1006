"""Cosine scores: bits that depend on the pair alone, and safe norms."""

import pytest
import torch

from gcahng.metrics import retrieval
from gcahng.metrics.scores import (
    TILE_COLUMNS,
    TILE_ROWS,
    full_precision,
    normalise,
    round_up,
    score_rows,
)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_score_does_not_depend_on_its_place_or_on_threads(dtype: torch.dtype, num_threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        for channels in (3, 33, 128):
            query = torch.randn(TILE_ROWS, channels, generator=generator, dtype=dtype)
            item = torch.randn(1, channels, generator=generator, dtype=dtype)
            out = torch.empty(TILE_ROWS, 2 * TILE_COLUMNS, dtype=dtype)
            score_rows(query, item.repeat(2 * TILE_COLUMNS, 1), out)
            assert torch.equal(out, out[:, :1].expand_as(out))
            score_rows(item.repeat(TILE_ROWS, 1), query.repeat(16, 1), out)
            assert torch.equal(out, out[:1].expand_as(out))
    finally:
        torch.set_num_threads(before)


def test_scores_are_cosines_and_padding_is_zero() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = normalise(x, TILE_COLUMNS)
    out = torch.empty(TILE_ROWS, TILE_COLUMNS, dtype=torch.float64)
    score_rows(unit[:TILE_ROWS], unit, out)
    want = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    torch.testing.assert_close(out[:5, :5], want, rtol=0, atol=1e-15)
    assert not out[:, 5:].any()


def test_normalise_keeps_the_direction_of_extreme_rows() -> None:
    x = torch.tensor([[3.0, 4.0], [3e30, 4e30], [3e-38, 4e-38], [0.0, 0.0]])
    unit = normalise(x, 4)
    assert unit.dtype == torch.float32
    torch.testing.assert_close(unit[:3], torch.tensor([[0.6, 0.8]] * 3))
    assert unit[3].tolist() == [0.0, 0.0]


def test_zero_vector_gives_a_finite_result() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [1.0, 0.1]])
    result = retrieval(x, torch.tensor([0, 0, 1, 1]), ks=(1, 3), num_neighbours=3)
    # The zero row scores 0 with everything: after the aligned item, before the opposite one.
    assert result.neighbours is not None
    assert result.neighbours.tolist() == [[3, 1, 2], [0, 2, 3], [1, 3, 0], [0, 1, 2]]
    assert result.recall_at_k == {1: 0.25, 3: 1.0}


def test_half_precision_embeddings_are_scored_in_float32() -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    y = torch.arange(40) // 4
    low, high = (retrieval(x.to(t), y, num_neighbours=9) for t in (torch.bfloat16, torch.float32))
    assert torch.equal(low.neighbours, high.neighbours)


def test_autocast_around_the_call_changes_nothing() -> None:
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    y = torch.arange(300) // 5
    plain = retrieval(x, y, num_neighbours=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = retrieval(x, y, num_neighbours=20)
    assert torch.equal(plain.neighbours, inside.neighbours)
    assert plain.map_at_r == inside.map_at_r


def test_full_precision_restores_the_settings_of_the_process() -> None:
    def fail_inside() -> None:
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            raise RuntimeError("stop")

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        chosen = [backend.fp32_precision for backend in backends]
        assert "ieee" not in chosen
        with pytest.raises(RuntimeError, match="stop"):
            fail_inside()
        assert [backend.fp32_precision for backend in backends] == chosen
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("count", "want"), [(1, 4), (4, 4), (5, 8)])
def test_round_up(count: int, want: int) -> None:
    assert round_up(count, 4) == want
