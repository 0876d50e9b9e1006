"""Random weighting: shares of the negative groups in one fused synthetic negative."""

import pytest
import torch

from gcahng.errors import InputError
from gcahng.generation import fusion_shares
from gcahng.random import picking_weights


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 6])
def test_shares_equal_the_running_fusion(num_samples: int) -> None:
    draw = torch.Generator().manual_seed(num_samples)
    weights = torch.rand(num_samples, num_samples - 1, generator=draw, dtype=torch.float64)
    points = torch.randn(num_samples, 5, generator=draw, dtype=torch.float64)
    shares = fusion_shares(weights)
    for anchor_group in range(num_samples):
        fused = points[0]
        for g in range(1, num_samples):
            fused = points[g] + weights[anchor_group, g - 1] * (fused - points[g])
        torch.testing.assert_close(shares[anchor_group] @ points, fused, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(shares.sum(1), torch.ones(num_samples, dtype=torch.float64))
    assert float(shares.min()) >= 0


def test_weights_of_one_and_zero_pick_a_group() -> None:
    # Weight 1 keeps what was fused so far, weight 0 takes the new group alone.
    weights = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert fusion_shares(weights).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("num_samples", [2, 3, 6])
def test_picking_weights_give_shares_of_one_group(num_samples: int) -> None:
    found = torch.zeros(num_samples, num_samples)
    for step in range(60):
        weights = picking_weights(num_samples, seed=1, step=step, phase="generation", dtype=torch.float64)
        shares = fusion_shares(weights)
        assert shares.sort(1).values.tolist() == [[0.0] * (num_samples - 1) + [1.0]] * num_samples
        points = torch.randn(num_samples, generator=torch.Generator().manual_seed(step), dtype=torch.float64).tolist()
        for anchor_group, row in enumerate(weights.tolist()):
            fused = points[0]
            for weight, point in zip(row, points[1:], strict=True):
                fused = point + weight * (fused - point)
            assert fused == pytest.approx(points[int(shares[anchor_group].argmax())], rel=1e-12)
        found += shares
    assert bool((found > 0).all())


def test_fusion_by_hand() -> None:
    # w1 = 0.5, w2 = 0.25: f = 0.75 s2 + 0.25 (0.5 s1 + 0.5 s0).
    weights = torch.tensor([[0.5, 0.25]] * 3)
    assert fusion_shares(weights)[0].tolist() == [0.125, 0.125, 0.75]


@pytest.mark.parametrize("shape", [(3, 3), (2, 2), (3,), (2, 3), (1, 2, 1)])
def test_weights_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    listed = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InputError, match=rf"`weights` must have shape \(K, K-1\): got {listed}"):
        fusion_shares(torch.zeros(shape))
