"""Synthetic negatives: the loop of the method, its properties, batches in any order, errors."""

import math

import pytest
import torch
from generation_loops import synthetic_negatives
from maths_cases import Size, batch_of, generator
from torch import Tensor

from gcahng.errors import InputError
from gcahng.generation import Interpolation, generate_negatives
from gcahng.generation.interpolation import positives

SIZES = [Size(2, 2, 4, 1, 1), Size(5, 2, 6, 1, 1), Size(4, 3, 5, 1, 1), Size(3, 4, 4, 1, 1)]


def drawn(size: Size, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, labels, coefficients in (0, 1), mixing weights."""
    z, labels = batch_of(size, seed)
    draw = generator(seed + 100)
    table = torch.rand(size.batch, size.batch, size.dim, generator=draw, dtype=torch.float64)
    weights = torch.rand(size.num_samples, size.num_samples - 1, generator=draw).double()
    return z, labels, table, weights


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("given", [True, False], ids=["channel", "single"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_a_loop(size: Size, given: bool, normalised: bool) -> None:
    z, labels, table, weights = drawn(size)
    coefficients = table if given else None
    for leaf in (z, table):
        leaf.requires_grad_()
    got = generate_negatives(
        z,
        labels,
        coefficients,
        alpha=3.0,
        mean_metric_loss=2.5,
        weights=weights,
        normalised_distance=normalised,
    )
    want = synthetic_negatives(z, labels.tolist(), coefficients, weights, 3.0, 2.5, normalised_distance=normalised)
    assert got.shape == (size.batch, size.num_classes, size.dim)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    mix = torch.randn(got.shape, generator=generator(3), dtype=torch.float64)
    leaves = [z, table] if given else [z]
    for ours, theirs in zip(
        torch.autograd.grad((got * mix).sum(), leaves),
        torch.autograd.grad((want * mix).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(4))
def test_samples_in_any_order(seed: int) -> None:
    size = Size(4, 3, 6, 1, 1)
    z, labels, table, weights = drawn(size, seed)
    moved = torch.randperm(size.batch, generator=generator(seed))
    z, labels, table = z[moved], labels[moved], table[moved][:, moved]
    got = generate_negatives(z, labels, table, alpha=1.0, mean_metric_loss=1.0, weights=weights)
    want = synthetic_negatives(z, labels.tolist(), table, weights, 1.0, 1.0)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_by_hand() -> None:
    # One channel. Anchor 0, positive 1 (d+ = 1), negatives 4 and 6 (d- = 4 and 6), factor exp(-1).
    z = torch.tensor([[0.0], [4.0], [1.0], [6.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1])
    table = torch.full((4, 4, 1), 0.5, dtype=torch.float64)
    weights = torch.tensor([[0.25], [0.0]], dtype=torch.float64)
    got = generate_negatives(z, labels, table, alpha=2.0, mean_metric_loss=2.0, weights=weights)
    pull = 0.5 * math.exp(-1)
    to_four, to_six = 1 + 3 * pull, 1 + 5 * pull
    assert float(got[0, 1, 0]) == pytest.approx(to_six + 0.25 * (to_four - to_six), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_each_channel_lies_between_the_nearest_allowed_point_and_the_negative(seed: int) -> None:
    """K = 2 with weight 0: the second group's negative alone, so one interpolation can be looked at."""
    size = Size(5, 2, 6, 1, 1)
    z, labels, table, _ = drawn(size, seed)
    weights = torch.zeros(2, 1, dtype=torch.float64)
    got = generate_negatives(z, labels, table, alpha=1.0, mean_metric_loss=2.0, weights=weights)
    negatives = z[size.num_classes :].expand(size.batch, -1, -1)
    anchors = z[:, None]
    near = (z - positives(z, 2) + 1e-6).norm(dim=1)[:, None]
    far = (anchors - negatives + 1e-6).norm(dim=2)
    pulled = far > near
    assert bool(pulled.any())
    assert not bool(pulled.all())
    # Nearer than the positive: the negative, up to the rounding of z_i + (z_j - z_i).
    torch.testing.assert_close(got[~pulled], negatives[~pulled], rtol=0, atol=1e-14)
    share = ((got - anchors) / (negatives - anchors))[pulled]
    nearest = (near / far)[pulled][:, None]
    assert bool((share >= nearest - 1e-9).all())
    assert bool((share <= 1 + 1e-9).all())


def one_group(coefficient: float, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Synthetic negatives from the second group alone, anchors, and that group."""
    size = Size(5, 2, 6, 1, 1)
    z, labels, table, _ = drawn(size)
    got = generate_negatives(
        z,
        labels,
        torch.full_like(table, coefficient),
        alpha=alpha,
        mean_metric_loss=1.0,
        weights=torch.zeros(2, 1),
    )
    return got, z, z[5:].expand(10, -1, -1)


def test_no_pull_gives_the_negative_itself() -> None:
    got, _, negatives = one_group(1.0, 0.0)
    torch.testing.assert_close(got, negatives, rtol=0, atol=1e-14)


def test_full_pull_stops_at_the_positive_distance() -> None:
    for coefficient, alpha in ((0.0, 1.0), (1.0, 1e4)):
        got, z, negatives = one_group(coefficient, alpha)
        near = (z - positives(z, 2) + 1e-6).norm(dim=1)[:, None]
        far = (z[:, None] - negatives + 1e-6).norm(dim=2)
        share = (near / far).clamp_max(1)[..., None]
        torch.testing.assert_close(got, z[:, None] + share * (negatives - z[:, None]), rtol=0, atol=1e-12)
        # As far as the positive, up to the 1e-6 of the distance.
        reached = (got - z[:, None]).norm(dim=2)
        assert bool((reached >= torch.minimum(near, far) - 1e-5).all())


def test_harder_as_the_loss_falls() -> None:
    z, labels, table, weights = drawn(Size(5, 2, 6, 1, 1))
    distances = []
    for loss in (1e6, 10.0, 1.0, 0.1):
        got = generate_negatives(z, labels, table, alpha=2.0, mean_metric_loss=loss, weights=weights)
        distances.append(float((got - z[:, None]).norm(dim=2).mean()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1.2 * distances[-1]


def test_the_pull_factor() -> None:
    assert Interpolation(5.0).factor == pytest.approx(1, abs=1e-5)  # first epoch: mean loss 1e6
    assert Interpolation(5.0, 2.5).factor == pytest.approx(math.exp(-2))
    assert Interpolation(0.0, 0.0).factor == 1
    assert Interpolation(1.0, 0.0).factor == pytest.approx(0)  # floored at 1e-6, not divided by 0
    assert Interpolation(1.0, -3.0).factor == pytest.approx(0)


def test_duplicate_images_have_finite_values_and_gradients() -> None:
    size = Size(4, 2, 6, 1, 1)
    z, labels, table, weights = drawn(size)
    z[1] = z[0]  # a negative equal to its anchor
    z[6] = z[2]  # a positive equal to its anchor
    for leaf in (z, table):
        leaf.requires_grad_()
    for normalised in (False, True):
        got = generate_negatives(z, labels, table, alpha=1.0, weights=weights, normalised_distance=normalised)
        want = synthetic_negatives(z, labels.tolist(), table, weights, 1.0, 1e6, normalised_distance=normalised)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
        for gradient in torch.autograd.grad(got.square().sum(), [z, table]):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("value", [0.0, -1e-6])
def test_all_images_alike_are_finite(value: float) -> None:
    # Every distance is 0 but for the 1e-6 in it.
    z = torch.full((6, 4), value, requires_grad=True)
    labels = torch.tensor([0, 1, 2] * 2)
    got = generate_negatives(z, labels, torch.full((6, 6, 4), 0.5), alpha=1.0)
    (gradient,) = torch.autograd.grad(got.sum(), z)
    assert torch.isfinite(got).all()
    assert torch.isfinite(gradient).all()


def test_weights_are_drawn_when_none_are_given() -> None:
    z, labels, table, _ = drawn(Size(4, 3, 5, 1, 1))
    torch.manual_seed(1)
    first, second = (generate_negatives(z, labels, table, alpha=1.0) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, generate_negatives(z, labels, table, alpha=1.0))
    assert not torch.allclose(first, second)


def test_one_sample_per_class_is_refused() -> None:
    with pytest.raises(InputError, match="an anchor needs a positive, got K = 1"):
        generate_negatives(torch.zeros(3, 4), torch.arange(3), None, alpha=1.0)


def test_arguments_that_do_not_fit() -> None:
    z, labels, table, weights = drawn(Size(4, 2, 6, 1, 1))
    with pytest.raises(InputError, match=r"shape \(B, B, D\) = \(8, 8, 6\): got \(8, 8, 5\)"):
        generate_negatives(z, labels, table[..., :5], alpha=1.0)
    with pytest.raises(InputError, match=r"shape \(K, K-1\) = \(2, 1\): got \(3, 2\)"):
        generate_negatives(z, labels, table, alpha=1.0, weights=torch.zeros(3, 2))
    with pytest.raises(InputError, match="`alpha` must be a finite number >= 0: got -1"):
        generate_negatives(z, labels, table, alpha=-1.0)
    with pytest.raises(InputError, match="`alpha` must be a finite number >= 0: got inf"):
        generate_negatives(z, labels, table, alpha=math.inf)
    with pytest.raises(InputError, match="`mean_metric_loss` is not a number"):
        generate_negatives(z, labels, table, alpha=1.0, mean_metric_loss=math.nan)
    with pytest.raises(InputError, match=r"class \d+ has 1"):
        generate_negatives(z[:7], labels[:7], None, alpha=1.0)
    with pytest.raises(InputError, match="`z` must be a floating tensor"):
        generate_negatives(z.long(), labels, None, alpha=1.0)
