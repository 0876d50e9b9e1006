"""Embeddings that are constant but for rounding: no edge, no gradient, in float32 too."""

import pytest
import torch

from gcahng.graph import GraphNetwork
from gcahng.graph.features import unit_centred


@pytest.mark.parametrize("level", [0.1, 1.0, 3.3, 1e-4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_embedding_is_zero_with_zero_gradient(level: float, dtype: torch.dtype) -> None:
    z = torch.full((2, 513), level, dtype=dtype, requires_grad=True)
    unit = unit_centred(z)
    assert torch.equal(unit, torch.zeros_like(unit))
    (gradient,) = torch.autograd.grad((unit * torch.randn_like(unit)).sum(), z)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_its_gradient_in_the_graph_stays_of_the_others_size(backend) -> None:
    torch.manual_seed(0)
    graph = GraphNetwork(16, 5, 1, 2, dropout=0.0, backend=backend)
    z = torch.randn(8, 16)
    z[0] = 0.1
    z.requires_grad_()
    out = graph(z, torch.arange(4).repeat(2))
    (out.node_logits.square().sum() + out.pull_coefficients.square().sum()).backward()
    assert z.grad is not None and z.grad.abs().max() < 1e3


def test_a_small_spread_on_a_large_level_still_counts() -> None:
    z = 1.0 + 1e-3 * torch.randn(3, 64)
    assert torch.allclose(unit_centred(z).norm(dim=1), torch.ones(3), atol=1e-5)
