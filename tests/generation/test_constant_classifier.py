"""The classifier with constant weights: cross-entropy in slices, its gradient, its arithmetic and its memory."""

import pytest
import torch
from maths_cases import generator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gcahng.generation import ConstantClassifier, constant_classifier

ROWS, DIM, CLASSES = 23, 8, 31


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, labels, weight, bias."""
    draw = generator(2)
    x, weight = (torch.randn(n, DIM, generator=draw, dtype=torch.float64).to(dtype) for n in (ROWS, CLASSES))
    bias = torch.randn(CLASSES, generator=draw, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (ROWS,), generator=draw), weight, bias


def by_autograd(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss of each row, and the gradient of their sum."""
    x = x.clone().requires_grad_()
    losses = F.cross_entropy(F.linear(x, weight, bias), labels, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), grad


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows_at_once", [1, 5, 23, 1000])
def test_slices_equal_one_cross_entropy(rows_at_once: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(constant_classifier.LOGIT_BYTES, "cpu", rows_at_once * CLASSES * 8)
    x, labels, weight, bias = inputs()
    classifier = ConstantClassifier(weight, bias if with_bias else None)
    losses, grad = by_autograd(x, labels, weight, classifier.bias)
    got = classifier.cross_entropy(x, labels, None, gradient=True)
    torch.testing.assert_close(got[0], losses.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got[1], grad, rtol=1e-11, atol=1e-13)
    counted = (torch.arange(ROWS) % 3 > 0).double()
    got = classifier.cross_entropy(x, labels, counted, gradient=True)
    torch.testing.assert_close(got[0], (losses * counted).sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got[1], grad * counted[:, None], rtol=1e-11, atol=1e-13)
    loss, none = classifier.cross_entropy(x, labels, counted, gradient=False)
    assert torch.equal(loss, got[0])
    assert none.shape == (0, DIM)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_large_and_small_logits(scale: float) -> None:
    x, labels, weight, bias = inputs(torch.float32)
    x = x * scale
    losses, grad = by_autograd(x, labels, weight, bias)
    got = ConstantClassifier(weight, bias).cross_entropy(x, labels, None, gradient=True)
    torch.testing.assert_close(got[0], losses.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1], grad, rtol=1e-5, atol=1e-6)


def test_the_products_alone_are_in_bfloat16() -> None:
    x, labels, weight, bias = inputs(torch.float32)
    classifier = ConstantClassifier(weight, bias, torch.bfloat16).lowered()
    assert classifier.weight.dtype == torch.bfloat16
    rounded = F.linear(x.bfloat16(), weight.bfloat16()).float() + bias
    want = F.cross_entropy(rounded, labels, reduction="sum")
    got = classifier.cross_entropy(x, labels, None, gradient=True)
    torch.testing.assert_close(got[0], want, rtol=1e-6, atol=0)
    exact = by_autograd(x, labels, weight, bias)[1]
    assert got[1].dtype == torch.float32
    assert not torch.equal(got[1], exact)
    assert float((got[1] - exact).abs().max() / exact.abs().max()) < 2e-2


def test_two_products_where_a_learning_classifier_takes_three() -> None:
    x, labels, weight, bias = inputs()
    with FlopCounterMode(display=False) as ours:
        ConstantClassifier(weight, bias).cross_entropy(x, labels, None, gradient=True)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with FlopCounterMode(display=False) as theirs:
        F.cross_entropy(F.linear(x, weight, bias), labels).backward()
    product = 2 * ROWS * DIM * CLASSES
    assert ours.get_total_flops() == 2 * product
    assert theirs.get_total_flops() == 3 * product


def test_logits_have_gradient_to_the_rows_alone() -> None:
    x, _, weight, bias = inputs()
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    ConstantClassifier(weight, bias).logits(x).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    assert bias.grad is None
