"""Proxy-Anchor: a loop, an independent implementation, extremes, what is refused."""

import importlib.util

import pytest
import torch
from maths_cases import generator
from torch import Tensor
from torch.nn import functional as F

from gcahng.errors import InputError
from gcahng.losses import ProxyAnchorLoss


def case(classes: int = 7, dim: int = 6) -> tuple[ProxyAnchorLoss, Tensor, Tensor]:
    """A loss over more classes than the batch holds, with classes of unequal size."""
    draw = generator(4)
    loss = ProxyAnchorLoss(classes, dim).double()
    with torch.no_grad():
        loss.proxies.copy_(torch.randn(classes, dim, generator=draw, dtype=torch.float64))
    z = torch.randn(9, dim, generator=draw, dtype=torch.float64, requires_grad=True)
    return loss, z, torch.tensor([0, 2, 2, 5, 0, 0, 6, 2, 5])


def by_loops(proxies: Tensor, z: Tensor, labels: list[int], scale: float, margin: float) -> Tensor:
    similarity = [[F.normalize(row, dim=0) @ F.normalize(proxy, dim=0) for proxy in proxies] for row in z]
    positive = negative = torch.zeros((), dtype=z.dtype)
    present = sorted(set(labels))
    for n in range(len(proxies)):
        own = [similarity[i][n] for i, label in enumerate(labels) if label == n]
        rest = [similarity[i][n] for i, label in enumerate(labels) if label != n]
        if own:
            total = sum(torch.exp(-scale * (s - margin)) for s in own)
            positive = positive + torch.log(1 + total) / len(present)
        negative = negative + torch.log(1 + sum(torch.exp(scale * (s + margin)) for s in rest))
    return positive + negative / len(proxies)


@pytest.mark.parametrize(("scale", "margin"), [(32.0, 0.1), (4.0, 0.3)])
def test_equals_a_loop(scale: float, margin: float) -> None:
    loss, z, labels = case()
    loss.scale, loss.margin = scale, margin
    got, want = loss(z, labels), by_loops(loss.proxies, z, labels.tolist(), scale, margin)
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    leaves = [z, loss.proxies]
    for ours, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_defaults_are_the_papers() -> None:
    loss, _, _ = case()
    assert (loss.scale, loss.margin) == (32.0, 0.1)
    many = ProxyAnchorLoss(20_000, 8)
    # Kaiming normal over the fan-out: the variance is 2 / N.
    assert float(many.proxies.detach().var()) == pytest.approx(2 / 20_000, rel=0.05)
    assert many.proxies.requires_grad


@pytest.mark.skipif(
    importlib.util.find_spec("pytorch_metric_learning") is None,
    reason="pytorch-metric-learning is not installed (extra 'test')",
)
def test_equals_pytorch_metric_learning() -> None:
    from pytorch_metric_learning.losses import ProxyAnchorLoss as Peer

    ours, z, labels = case()
    peer = Peer(num_classes=7, embedding_size=6, margin=0.1, alpha=32).double()
    with torch.no_grad():
        peer.proxies.copy_(ours.proxies)
    got, want = ours(z, labels), peer(z, labels)
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-10)
    for a, b in zip(
        torch.autograd.grad(got, [z, ours.proxies]),
        torch.autograd.grad(want, [z, peer.proxies]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_samples_in_any_order() -> None:
    loss, z, labels = case()
    moved = torch.randperm(9, generator=generator(1))
    assert float(loss(z[moved], labels[moved]).detach()) == pytest.approx(float(loss(z, labels).detach()), rel=1e-12)


def test_length_of_embeddings_does_not_matter() -> None:
    loss, z, labels = case()
    assert float(loss(50 * z, labels).detach()) == pytest.approx(float(loss(z, labels).detach()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_of_a_thousand_is_stable(dtype: torch.dtype) -> None:
    loss, z, labels = case()
    loss.scale = 1000.0
    loss = loss.to(dtype)
    z = z.detach().to(dtype).requires_grad_()
    value = loss(z, labels)
    value.backward()
    assert torch.isfinite(value)
    assert float(value.detach()) > 100  # exp(1000) itself would be infinite
    for gradient in (z.grad, loss.proxies.grad):
        assert gradient is not None
        assert torch.isfinite(gradient).all()


def test_a_zero_embedding_and_a_full_class_are_finite() -> None:
    loss, z, _ = case()
    with torch.no_grad():
        z[0] = 0
    for labels in (torch.tensor([0, 2, 2, 5, 0, 0, 6, 2, 5]), torch.zeros(9, dtype=torch.int64)):
        value = loss(z, labels)
        gradients = torch.autograd.grad(value, [z, loss.proxies])
        assert torch.isfinite(value)
        assert all(torch.isfinite(g).all() for g in gradients)


def test_labels_of_any_integer_width() -> None:
    loss, z, labels = case()
    assert torch.equal(loss(z, labels.to(torch.int32)), loss(z, labels))


def test_arguments_that_do_not_fit() -> None:
    loss, z, labels = case()
    with pytest.raises(InputError, match=r"must lie in \[0, 7\), one proxy each: got 0 to 7"):
        loss(z, torch.where(labels == 6, 7, labels))
    with pytest.raises(InputError, match=r"must lie in \[0, 7\), one proxy each: got -1 to 5"):
        loss(z, torch.where(labels == 6, -1, labels))
    with pytest.raises(InputError, match="`candidates` must be None"):
        loss(z, labels, z, labels)
    with pytest.raises(InputError, match="`labels` must have one entry per embedding"):
        loss(z, labels[:3])
    with pytest.raises(InputError, match="`embeddings` must have as many channels as `proxies`: expected 6, got 5"):
        loss(z[:, :5], labels)
    with pytest.raises(InputError, match="`embeddings` is empty: expected at least one sample"):
        loss(z[:0], labels[:0])
    with pytest.raises(InputError, match="integer class numbers"):
        loss(z, labels.double())
    with pytest.raises(InputError, match="`embeddings` must be a floating tensor"):
        loss(z[0], labels)
