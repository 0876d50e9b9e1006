"""N-pair losses: loops, a hand calculation, batches in any order, explicit candidates, what is refused."""

import math

import pytest
import torch
from maths_cases import Size, batch_of, generator
from torch import Tensor

from gcahng.errors import InputError
from gcahng.losses import NPairLoss, NPairPlusLoss

SIZES = [Size(5, 2, 6, 1, 1), Size(4, 3, 5, 1, 1), Size(3, 4, 4, 1, 1), Size(1, 2, 4, 1, 1)]


def by_loops(z: Tensor, num_samples: int) -> Tensor:
    """NP+ of a group-major batch: anchors are group 0."""
    classes = z.shape[0] // num_samples
    entropy = torch.zeros((), dtype=z.dtype)
    for g in range(1, num_samples):
        for p in range(classes):
            scores = [z[p] @ z[g * classes + q] for q in range(classes)]
            entropy = entropy + torch.log(sum(torch.exp(s - scores[p]) for s in scores)) / classes
    lengths = sum(row @ row for row in z) / classes
    return entropy / (num_samples - 1) + 3e-3 * 0.25 * lengths


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_a_loop(size: Size) -> None:
    z, labels = batch_of(size)
    z.requires_grad_()
    losses = [NPairPlusLoss()] + ([NPairLoss()] if size.num_samples == 2 else [])
    want = by_loops(z, size.num_samples)
    (slope,) = torch.autograd.grad(want, z)
    for loss in losses:
        got = loss(z, labels)
        assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
        (gradient,) = torch.autograd.grad(got, z)
        torch.testing.assert_close(gradient, slope, rtol=1e-11, atol=1e-13)


def test_by_hand() -> None:
    # Scores of anchor 1 with both positives: 2 and 0; of anchor 2: 0 and 3. Squared lengths 1 + 4 + 9 + 1.
    z = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    loss = NPairLoss()(z, torch.tensor([4, 7, 4, 7]))
    entropy = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-3))) / 2
    assert float(loss) == pytest.approx(entropy + 0.00075 * (1 + 9 + 4 + 1) / 2, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_samples_in_any_order(seed: int) -> None:
    # Classes in another order, samples of each class in their own: the loss of the sorted batch.
    size = Size(4, 3, 5, 1, 1)
    z, labels = batch_of(size, seed)
    class_of = torch.arange(size.batch) % 4
    keys = torch.rand(size.batch, generator=generator(seed))
    # Within a class the keys rise with the group, so that stable sorting restores the groups.
    for c in range(4):
        keys[class_of == c] = keys[class_of == c].sort().values
    moved = keys.argsort()
    got = NPairPlusLoss()(z[moved], labels[moved])
    assert float(got) == pytest.approx(float(NPairPlusLoss()(z, labels)), rel=1e-12)


def test_the_first_sample_of_each_class_is_its_anchor() -> None:
    z, labels = batch_of(Size(4, 3, 5, 1, 1))
    z.requires_grad_()
    exchanged = torch.cat([torch.arange(4, 8), torch.arange(4), torch.arange(8, 12)])
    base, other = NPairPlusLoss()(z, labels), NPairPlusLoss()(z[exchanged], labels[exchanged])
    assert abs(float((base - other).detach())) > 1e-3


def test_explicit_candidates_are_compared_with_every_anchor() -> None:
    draw = generator(2)
    anchors = torch.randn(5, 4, generator=draw, dtype=torch.float64)
    labels = torch.tensor([3, 1, 1, 8, 3])
    candidates = torch.randn(8, 4, generator=draw, dtype=torch.float64)
    candidate_labels = torch.tensor([8, 8, 1, 3, 5, 1, 3, 5])
    got = NPairPlusLoss()(anchors, labels, candidates, candidate_labels)
    groups = ([0, 2, 3, 4], [1, 5, 6, 7])  # first and second sample of classes 8, 1, 3, 5
    entropy = 0.0
    for members in groups:
        classes = [int(candidate_labels[m]) for m in members]
        for anchor, label in zip(anchors, labels.tolist(), strict=True):
            scores = [float(anchor @ candidates[m]) for m in members]
            own = scores[classes.index(label)]
            entropy += math.log(sum(math.exp(s - own) for s in scores)) / 10
    lengths = float(anchors.square().sum()) / 5 + float(candidates.square().sum()) / 4
    assert float(got) == pytest.approx(entropy + 0.00075 * lengths, rel=1e-12)


def test_a_split_batch_as_candidates_is_the_whole_batch() -> None:
    z, labels = batch_of(Size(4, 3, 5, 1, 1))
    got = NPairPlusLoss()(z[:4], labels[:4], z[4:], labels[4:])
    assert float(got) == pytest.approx(float(NPairPlusLoss()(z, labels)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_embeddings_stay_finite(dtype: torch.dtype) -> None:
    z, labels = batch_of(Size(5, 2, 6, 1, 1))
    z = (1000 * z).to(dtype).requires_grad_()
    loss = NPairLoss()(z, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert float(loss.detach()) == pytest.approx(float(NPairLoss()(z.double(), labels).detach()))


def test_duplicate_images_stay_finite() -> None:
    z = torch.ones(6, 4, requires_grad=True)
    NPairPlusLoss()(z, torch.tensor([0, 1, 2] * 2)).backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_a_class_with_fewer_samples_is_listed() -> None:
    with pytest.raises(InputError, match=r"most classes have 2 samples, but class 7 has 1"):
        NPairPlusLoss()(torch.zeros(5, 3), torch.tensor([1, 1, 7, 2, 2]))
    candidates = torch.zeros(3, 3)
    with pytest.raises(InputError, match=r"but class 2 has 1"):
        NPairPlusLoss()(
            torch.zeros(2, 3), torch.tensor([1, 2]),
            torch.cat([candidates, candidates[:2]]), torch.tensor([1, 1, 2, 5, 5]),
        )  # fmt: skip


def test_one_sample_per_class_is_refused() -> None:
    with pytest.raises(InputError, match="every class at least twice: got K = 1"):
        NPairPlusLoss()(torch.zeros(3, 2), torch.arange(3))


def test_the_original_wants_two_samples() -> None:
    labels = torch.tensor([0, 1] * 3)
    with pytest.raises(InputError, match=r"exactly twice .* got K = 3\. Use NPairPlusLoss"):
        NPairLoss()(torch.zeros(6, 2), labels)
    NPairPlusLoss()(torch.zeros(6, 2), labels)


def test_arguments_that_do_not_fit() -> None:
    z, labels = batch_of(Size(2, 2, 4, 1, 1))
    loss = NPairLoss()
    with pytest.raises(InputError, match=r"`embeddings` must be a floating tensor"):
        loss(z[0], labels)
    with pytest.raises(InputError, match=r"`labels` must have one entry per embedding"):
        loss(z, labels[:3])
    with pytest.raises(InputError, match="`candidate_labels` is missing"):
        loss(z, labels, z)
    with pytest.raises(InputError, match=r"`candidates` must be a floating tensor"):
        loss(z, labels, z.long(), labels)
    with pytest.raises(InputError, match=r"`candidate_labels` must have one entry per embedding"):
        loss(z, labels, z, labels[:3])
    with pytest.raises(InputError, match="`candidates` must have as many channels as `embeddings`: expected 4, got 3"):
        loss(z, labels, z[:, :3], labels)
    with pytest.raises(InputError, match="`embeddings` must be finite: 1 of 4"):
        loss(z.index_fill(0, torch.tensor([2]), float("nan")), labels)
    with pytest.raises(InputError, match=r"class of every anchor: missing \[99\]"):
        loss(z, torch.where(labels == labels[0], 99, labels), z, labels)
    with pytest.raises(InputError, match=r"`labels` is empty"):
        loss(z[:0], labels[:0])
