"""Each inner loop of the edge stage against autograd of the plain formula."""

import pytest
import torch
from maths_cases import generator
from torch import Tensor
from torch.nn import functional as F

from gcahng.graph.kernels import EagerKernels, HiddenWeights, NormWeights
from gcahng.graph.kernels.eager import column_sums, row_statistics

KERNELS = EagerKernels()
DIM, WIDTH = 6, 24
# (n, b): a usual chunk, single edges, one pair, no pair at all.
CHUNKS = pytest.mark.parametrize(("n", "b"), [(3, 4), (5, 1), (1, 2), (0, 3), (0, 1)])
GELU = pytest.mark.parametrize("gelu", [True, False])


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype).requires_grad_()


def norm_weights(dim: int = DIM, *, gelu: bool) -> NormWeights:
    return NormWeights(draw(dim, seed=1), draw(dim, seed=2), gelu, 1e-5)


def detached(norm: NormWeights) -> NormWeights:
    return NormWeights(norm.weight.detach(), norm.bias.detach(), norm.gelu, norm.eps)


def plain_norm(x: Tensor, norm: NormWeights) -> Tensor:
    return F.layer_norm(F.gelu(x) if norm.gelu else x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def check(got: tuple[Tensor, ...], output: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    """Written-out gradients against autograd's."""
    want = torch.autograd.grad(output, inputs, grad)
    for found, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@CHUNKS
@GELU
def test_normalise(n: int, b: int, gelu: bool) -> None:
    norm = norm_weights(gelu=gelu)
    x = draw(n, b, b, DIM, seed=3)
    output = plain_norm(x, norm)
    plain = detached(norm)
    torch.testing.assert_close(KERNELS.normalise(x.detach(), plain), output.detach(), rtol=1e-13, atol=1e-13)
    grad = draw(n, b, b, DIM, seed=4).detach()
    check(KERNELS.normalise_backward(x.detach(), grad, plain), output, (x, norm.weight, norm.bias), grad)


@CHUNKS
@GELU
@pytest.mark.parametrize("products", [True, False])
def test_mix(n: int, b: int, gelu: bool, products: bool) -> None:
    norm = norm_weights(gelu=gelu)
    first, second = draw(n, b, DIM, seed=5), draw(n, b, DIM, seed=6)
    values = (draw(n, b, DIM, seed=7), draw(n, b, DIM, seed=8))
    weights = (draw(n, b, b, seed=9), draw(n, b, b, seed=10))
    edges = (first[:, :, None] * second[:, None, :]).detach() if products else draw(n, b, b, DIM, seed=11).detach()
    edges.requires_grad_()
    attended = edges + weights[0][..., None] * values[0][:, :, None] + weights[1][..., None] * values[1][:, None]
    output = plain_norm(attended, norm)
    plain = [tuple(t.detach() for t in pair) for pair in ((first, second), values, weights)]
    if products:
        got = KERNELS.product_mix(plain[0], plain[1], plain[2], detached(norm))  # type: ignore[arg-type]
    else:
        got = KERNELS.mix(edges.detach(), plain[1], plain[2], detached(norm))  # type: ignore[arg-type]
    torch.testing.assert_close(got, output.detach(), rtol=1e-12, atol=1e-12)
    grad = draw(n, b, b, DIM, seed=12).detach()
    back = KERNELS.mix_backward(edges.detach(), plain[1], plain[2], detached(norm), grad)  # type: ignore[arg-type]
    found = (back.edges, *back.values, *back.weights, back.norm_weight, back.norm_bias)
    check(found, output, (edges, *values, *weights, norm.weight, norm.bias), grad)


def test_mixing_leaves_its_arguments_alone() -> None:
    norm = detached(norm_weights(gelu=True))
    edges = draw(2, 3, 3, DIM, seed=1).detach()
    values = draw(2, 3, DIM, seed=2).detach(), draw(2, 3, DIM, seed=3).detach()
    weights = draw(2, 3, 3, seed=4).detach(), draw(2, 3, 3, seed=5).detach()
    grad = draw(2, 3, 3, DIM, seed=6).detach()
    arguments = [edges, *values, *weights, norm.weight, norm.bias, grad]
    before = [t.clone() for t in arguments]
    KERNELS.mix(edges, values, weights, norm)
    KERNELS.mix_backward(edges, values, weights, norm, grad)
    KERNELS.normalise_backward(edges, grad, norm)
    assert all(torch.equal(t, old) for t, old in zip(arguments, before, strict=True))


def masks_of(n: int, b: int, kind: str) -> tuple[Tensor | None, Tensor | None]:
    def mask(seed: int) -> Tensor:
        return (torch.rand(n, b, b, generator=generator(seed)) < 0.6).double()

    return mask(1) if kind in ("first", "both") else None, mask(2) if kind in ("second", "both") else None


def plain_messages(
    edges: Tensor, weight: Tensor, bias: Tensor, masks: tuple[Tensor | None, Tensor | None], *, mirrored: bool
) -> tuple[Tensor, ...]:
    message = F.gelu(F.linear(edges, weight, bias))
    sums = []
    for mask, dim in zip(masks, (2, 1), strict=True):
        sums.append((message if mask is None else message * mask[..., None]).sum(dim))
    return tuple(sums) if mirrored else (sums[0],)


@CHUNKS
@pytest.mark.parametrize("kind", ["none", "first", "second", "both"])
@pytest.mark.parametrize("mirrored", [True, False])
def test_messages(n: int, b: int, kind: str, mirrored: bool) -> None:
    weight, bias = draw(DIM, DIM, seed=1), draw(DIM, seed=2)
    factors = draw(n, b, DIM, seed=5).detach(), draw(n, b, DIM, seed=6).detach()
    edges = factors[0][:, :, None] * factors[1][:, None, :]
    masks = masks_of(n, b, kind)
    inner = F.linear(edges.flatten(0, 2), weight, bias)
    want = plain_messages(edges, weight, bias, masks, mirrored=mirrored)
    fixed = (weight.detach(), bias.detach(), masks, None)
    for got in (
        KERNELS.messages(edges, *fixed, mirrored=mirrored),
        KERNELS.product_messages(factors, *fixed, mirrored=mirrored),
    ):
        assert got[0] is not None
        assert (got[2] is None) != mirrored
        sums = (got[1],) if got[2] is None else (got[1], got[2])
        for found, wanted in zip((got[0], *sums), (inner, *want), strict=True):
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-12)
    # Backward ends before the Linear: autograd from there.
    start = inner.detach().requires_grad_()
    message = F.gelu(start).view(edges.shape)
    sums = [
        (message if mask is None else message * mask[..., None]).sum(dim)
        for mask, dim in zip(masks, (2, 1), strict=True)
    ]
    grads = draw(n, b, DIM, seed=7).detach(), draw(n, b, DIM, seed=8).detach() if mirrored else None
    wanted = torch.autograd.grad(sums[0], start, grads[0], retain_graph=True)[0]
    if grads[1] is not None:
        wanted = wanted + torch.autograd.grad(sums[1], start, grads[1])[0]
    for kept in (start.detach(), None):
        found = KERNELS.messages_backward(edges, kept, *fixed, grads)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def hidden_weights(seed: int = 30, dtype: torch.dtype = torch.float64) -> HiddenWeights:
    return HiddenWeights(
        draw(WIDTH, DIM, seed=seed, dtype=dtype),
        draw(WIDTH, seed=seed + 1, dtype=dtype),
        draw(DIM, WIDTH, seed=seed + 2, dtype=dtype),
        draw(DIM, seed=seed + 3, dtype=dtype),
        1e-5,
    )


def row_moments(h: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row; torch.var_mean warns where there are no rows."""
    mean = h.mean(1, keepdim=True)
    return mean, (h - mean).square().mean(1, keepdim=True)


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_hidden(rows: int) -> None:
    weights = hidden_weights()
    x = draw(rows, DIM, seed=3)
    inner = F.linear(x, weights.weight_in, weights.bias_in)
    h = F.gelu(inner)
    with torch.no_grad():
        got = KERNELS.hidden(x, weights, None)
    assert got[0] is not None
    mean, variance = row_moments(h)
    for found, wanted in zip(got, (inner, h, mean, torch.rsqrt(variance + 1e-5)), strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("keep", [True, False])
def test_hidden_backward(rows: int, keep: bool) -> None:
    """The three arguments it takes are those of raw = (h weight_outᵀ) rstd + shift; autograd goes the whole way."""
    weights = hidden_weights()
    x = draw(rows, DIM, seed=3).detach()
    inner = F.linear(x, weights.weight_in, weights.bias_in).detach().requires_grad_()
    h = F.gelu(inner)
    mean, variance = row_moments(h)
    rstd = torch.rsqrt(variance + weights.eps)
    product = (h @ weights.weight_out.T) * rstd
    grad = draw(rows, DIM, seed=5).detach()
    row = (grad * product.detach()).sum(1, keepdim=True) * rstd.detach().square() / WIDTH
    with torch.no_grad():
        got = KERNELS.hidden_backward(
            x, inner.detach() if keep else None, grad * rstd, row, mean.detach(), weights, None
        )
    (wanted,) = torch.autograd.grad(product, inner, grad)
    torch.testing.assert_close(got[0], wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got[1], h.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[2], wanted.sum(0), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_lower_precision_is_that_of_operands_alone(low: torch.dtype) -> None:
    """Statistics and sums come in float32, and are nearer to float64 than `low` could hold them."""
    weights = hidden_weights(dtype=torch.float32)
    lowered = HiddenWeights(
        weights.weight_in.detach().to(low),
        weights.bias_in.detach(),
        weights.weight_out.detach().to(low),
        weights.shift.detach(),
        weights.eps,
    )
    x = draw(40, DIM, seed=3, dtype=torch.float32).detach()
    inner, h, mean, rstd = KERNELS.hidden(x, lowered, low)
    assert inner is not None
    assert (inner.dtype, h.dtype, mean.dtype, rstd.dtype) == (low, low, torch.float32, torch.float32)
    variance, wanted = torch.var_mean(h.double(), 1, correction=0, keepdim=True)
    torch.testing.assert_close(mean.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), torch.rsqrt(variance + 1e-5), rtol=1e-5, atol=0)
    exact = F.gelu(F.linear(x.double(), weights.weight_in.detach().double(), weights.bias_in.detach().double()))
    assert float((h.double() - exact).norm() / exact.norm()) < (2e-2 if low == torch.bfloat16 else 2e-3)
    edges = draw(3, 2, 2, DIM, seed=8, dtype=torch.float32).detach()
    square = draw(DIM, DIM, seed=9, dtype=torch.float32).detach()
    found = KERNELS.messages(edges, square.to(low), weights.shift.detach(), (None, None), low, mirrored=True)
    assert found[0] is not None
    assert found[2] is not None
    assert (found[0].dtype, found[1].dtype, found[2].dtype) == (low, torch.float32, torch.float32)
    back = KERNELS.messages_backward(
        edges, None, square.to(low), weights.shift.detach(), (None, None), low, (found[1], found[2])
    )
    assert back.dtype == low


@pytest.mark.parametrize(("offset", "dtype"), [(0.0, torch.float32), (3.0, torch.float32), (3.0, torch.float64)])
def test_row_statistics_with_a_mean_above_the_spread(offset: float, dtype: torch.dtype) -> None:
    h = (offset + 0.3 * draw(50, 512, seed=1).detach()).to(dtype)
    mean, rstd = row_statistics(h, dtype, 1e-5)
    variance, want = torch.var_mean(h.double(), 1, correction=0, keepdim=True)
    # mean² / variance digits are lost, 100 here: far from the errors of the products around.
    tolerance = 3e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(mean.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(rstd.double(), torch.rsqrt(variance + 1e-5), rtol=tolerance, atol=0)


def test_row_statistics_of_constant_rows_are_finite() -> None:
    for value in (0.0, 1.0, 1e4, -7.7e3):
        mean, rstd = row_statistics(torch.full((2, 96), value), torch.float32, 1e-5)
        assert mean.flatten().tolist() == pytest.approx([value] * 2, rel=1e-6)
        assert bool((rstd <= 317).all())  # 1 / sqrt(1e-5): rounding never makes a variance negative
        assert bool((rstd > 0).all())


@pytest.mark.parametrize("rows", [0, 1, 3000])
def test_column_sums(rows: int) -> None:
    x = draw(rows, 5, seed=1).detach()
    torch.testing.assert_close(column_sums(x, torch.float64), x.sum(0))
    low = x.bfloat16()
    got = column_sums(low, torch.float32)
    assert got.dtype == torch.float32
    # At most the rounding of the result itself: terms of a long sum are not lost.
    torch.testing.assert_close(got.double(), low.double().sum(0), rtol=2**-8, atol=1e-2)
    ones = torch.ones(rows, 5, dtype=torch.bfloat16)
    assert column_sums(ones, torch.float32).tolist() == pytest.approx([rows] * 5, rel=2**-8)
