"""Unit vectors on the grid: scores without rounding, safe norms, settings put back."""

from fractions import Fraction

import pytest
import torch

from gcahng.metrics import retrieval
from gcahng.metrics.unit_vectors import GRID, LARGEST_NORM, all_scores, full_precision, pair_scores, unit_vectors


@pytest.mark.parametrize("channels", [1, 3, 64, 2048])
def test_scores_are_exact_whatever_the_order_of_summation(channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    unit = unit_vectors(torch.randn(40, channels, generator=generator))
    row, column = torch.randint(40, (2, 700), generator=generator)
    listed = pair_scores(unit, unit, row, column)
    order = torch.randperm(channels, generator=generator)
    assert torch.equal(listed, all_scores(unit, unit)[row, column])
    assert torch.equal(listed, pair_scores(unit[:, order], unit[:, order], column, row))
    for place in range(0, 700, 100):
        pair = zip(unit[row[place]].tolist(), unit[column[place]].tolist(), strict=True)
        assert Fraction(listed[place].item()) == sum(Fraction(a) * Fraction(b) for a, b in pair)


def test_vectors_are_on_the_grid_and_of_length_one() -> None:
    x = torch.randn(500, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:9] = torch.eye(300, dtype=torch.float64)[:9]
    unit = unit_vectors(x, 512)
    assert unit.dtype == torch.float32
    assert not unit[500:].any()
    assert torch.equal(unit.double() / GRID, (unit.double() / GRID).round())
    want = torch.nn.functional.normalize(x, dim=1)
    # Half a step of the grid, and half a unit of float32 where that is coarser: entries of 1/4 and above.
    torch.testing.assert_close(unit[:500].double(), want, rtol=2**-24, atol=2**-27)
    assert unit.double().norm(dim=1).max() < LARGEST_NORM


def test_scores_are_cosines() -> None:
    x = torch.randn(60, 512, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.cosine_similarity(x.double()[:, None], x.double()[None], dim=-1)
    unit = unit_vectors(x)
    # About 2^-27 / sqrt(3) for each of the two vectors; six times that is beyond chance.
    torch.testing.assert_close(all_scores(unit, unit), want, rtol=0, atol=4e-8)


def test_the_direction_of_extreme_rows_is_kept() -> None:
    x = torch.tensor([[3.0, 4.0], [3e30, 4e30], [3e-38, 4e-38], [0.0, 0.0]])
    unit = unit_vectors(x)
    torch.testing.assert_close(unit[:3], torch.tensor([[0.6, 0.8]] * 3))
    assert unit[3].tolist() == [0.0, 0.0]


def test_multiples_of_one_vector_tie_exactly() -> None:
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    unit = unit_vectors(torch.cat([x * factor for factor in (1, 2, 0.125, 1024)]))
    assert torch.equal(unit, unit[:1].expand_as(unit))


def test_zero_vector_gives_a_finite_result() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [1.0, 0.1]])
    result = retrieval(x, torch.tensor([0, 0, 1, 1]), ks=(1, 3), num_neighbours=3)
    # The zero row scores 0 with everything: after the aligned item, before the opposite one.
    assert result.neighbours is not None
    assert result.neighbours.tolist() == [[3, 1, 2], [0, 2, 3], [1, 3, 0], [0, 1, 2]]
    assert result.recall_at_k == {1: 0.25, 3: 1.0}


def test_half_precision_embeddings_are_scored_exactly() -> None:
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
    matmul = torch.backends.cuda.matmul

    def fail_inside() -> None:
        with full_precision():
            assert matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert not matmul.allow_bf16_reduced_precision_reduction
            raise RuntimeError("stop")

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        backends = (matmul, torch.backends.mkldnn.matmul)
        chosen = [backend.fp32_precision for backend in backends]
        assert "ieee" not in chosen
        with pytest.raises(RuntimeError, match="stop"):
            fail_inside()
        assert [backend.fp32_precision for backend in backends] == chosen
        assert matmul.allow_bf16_reduced_precision_reduction
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
