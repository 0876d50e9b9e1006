"""Losses on synthetic negatives: definitions at their edges (loops stand in tests/generation)."""

import math

import pytest
import torch
from maths_cases import Size, batch_of, generator

from gcahng.errors import InputError
from gcahng.generation import generate_negatives
from gcahng.losses import (
    classification_loss,
    diversity_loss,
    similarity_loss,
    synthetic_n_pair_loss,
)


def test_synthetic_loss_by_hand() -> None:
    # Two classes, two groups, one channel: samples 1, 2 | 3, 4; one synthetic negative each.
    z = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    negatives = torch.tensor([5.0, 6.0, 7.0, 8.0], dtype=torch.float64)
    synthetic = torch.full((4, 2, 1), 1e9, dtype=torch.float64)  # own-class entries must not count
    for i in range(4):
        synthetic[i, 1 - i % 2, 0] = negatives[i]
    positives = [3.0, 4.0, 1.0, 2.0]
    entropy = sum(math.log(1 + math.exp(float(z[i, 0]) * (float(negatives[i]) - positives[i]))) for i in range(4))
    anchors = (1 + 4 + 9 + 16) / 2 / 2
    candidates = (25 + 36 + 49 + 64 + 9 + 16 + 1 + 4) / 4 / 2
    want = entropy / 4 + 0.00075 * (anchors + candidates)
    assert float(synthetic_n_pair_loss(z, synthetic)) == pytest.approx(want, rel=1e-12)


def test_similarity_by_hand() -> None:
    # Cosines with the other class: 0 for the first anchor, -1 for the second; own entries count as 0.
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    synthetic = torch.tensor([[[-9.0, 9.0], [0.0, 5.0]], [[0.0, -3.0], [7.0, 7.0]]], dtype=torch.float64)
    assert float(similarity_loss(z, synthetic)) == pytest.approx((1 + 2) / 4, rel=1e-12)


def test_classification_counts_all_entries() -> None:
    logits = torch.zeros(4, 2, 5, dtype=torch.float64)
    logits[:, 1, 3] = math.log(4)  # 1/2 for the right class, 1/8 for each other
    loss = classification_loss(logits, torch.tensor([2, 3]))
    assert float(loss) == pytest.approx((math.log(5) + math.log(2)) / 2, rel=1e-12)


def test_diversity_by_hand() -> None:
    # Two samples, one channel: rows (0, 1) and (0.2, 0.2); squared deviations 0.5 and 0; B² = 4.
    table = torch.tensor([[[0.0], [1.0]], [[0.2], [0.2]]], dtype=torch.float64)
    assert float(diversity_loss(table)) == pytest.approx(1 - math.sqrt(0.5 / 4), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_diversity_without_spread_has_a_finite_gradient(value: float, dtype: torch.dtype) -> None:
    table = torch.full((6, 6, 3), value, dtype=dtype, requires_grad=True)
    loss = diversity_loss(table)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1, abs=1e-6)
    assert table.grad is not None
    assert torch.isfinite(table.grad).all()


def test_diversity_at_a_spread_of_zero_has_a_zero_gradient() -> None:
    # Halves add up exactly, so that the spread is 0 and no rounding.
    table = torch.full((8, 8, 3), 0.5, dtype=torch.float64, requires_grad=True)
    loss = diversity_loss(table)
    loss.backward()
    assert float(loss.detach()) == 1
    assert table.grad is not None
    assert torch.equal(table.grad, torch.zeros_like(table))


def test_diversity_falls_as_coefficients_differ() -> None:
    table = torch.rand(5, 5, 4, generator=generator(1), dtype=torch.float64)
    flatter = 0.5 + 0.1 * (table - 0.5)
    assert float(diversity_loss(table)) < float(diversity_loss(flatter)) < 1


@pytest.mark.parametrize("function", [synthetic_n_pair_loss, similarity_loss])
def test_samples_in_any_order(function: object) -> None:
    assert callable(function)
    size = Size(4, 3, 5, 1, 1)
    z, labels = batch_of(size)
    table = torch.rand(12, 12, 5, generator=generator(1), dtype=torch.float64)
    weights = torch.rand(3, 2, generator=generator(2), dtype=torch.float64)

    def loss(order: torch.Tensor, given: torch.Tensor | None) -> float:
        synthetic = generate_negatives(z[order], labels[order], table[order][:, order], alpha=1.0, weights=weights)
        return float(function(z[order], synthetic, given))

    sorted_already = torch.arange(12)
    want = loss(sorted_already, None)
    assert loss(sorted_already, labels) == pytest.approx(want, rel=1e-12)
    # Group by group, the classes of each group in another order; then class by class.
    draw = generator(5)
    mixed = torch.cat([4 * g + torch.randperm(4, generator=draw) for g in range(3)])
    by_class = torch.arange(12).view(3, 4).T.flatten()
    for order in (mixed, by_class):
        assert loss(order, labels[order]) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("function", [synthetic_n_pair_loss, similarity_loss])
def test_tables_that_do_not_fit(function: object) -> None:
    assert callable(function)
    z = torch.zeros(4, 3)
    for wrong in (torch.zeros(4, 2), torch.zeros(5, 2, 3), torch.zeros(4, 2, 2)):
        with pytest.raises(InputError, match=r"`synthetic` must have shape \(B, P, D\)"):
            function(z, wrong)
    with pytest.raises(InputError, match=r"class 1 has 1"):
        function(z, torch.zeros(4, 2, 3), torch.tensor([0, 0, 0, 1]))


@pytest.mark.parametrize("function", [synthetic_n_pair_loss, similarity_loss])
def test_tables_with_another_number_of_classes(function: object) -> None:
    assert callable(function)
    z = torch.zeros(4, 3)
    with pytest.raises(InputError, match="one column per class: 4 samples are no multiple of 3 classes"):
        function(z, torch.zeros(4, 3, 3))
    with pytest.raises(InputError, match="one column per class of `labels`: expected 2, got 4"):
        function(z, torch.zeros(4, 4, 3), torch.tensor([0, 1, 0, 1]))


def test_duplicate_images_are_finite() -> None:
    z = torch.zeros(4, 3, requires_grad=True)
    synthetic = torch.zeros(4, 2, 3, requires_grad=True)
    (synthetic_n_pair_loss(z, synthetic) + similarity_loss(z, synthetic)).backward()
    for leaf in (z, synthetic):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
