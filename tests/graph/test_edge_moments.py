"""Streamed moments: those of torch.var_mean over all ordered edges, also with large means and over processes."""

import pytest
import torch
from maths_cases import generator
from share_threads import Group
from torch import Tensor

from gcahng.graph import identity
from gcahng.graph.edge_moments import EdgeMoments

DIM = 5


def edges(rows: int, mean: float = 0.0, spread: float = 1.0, seed: int = 0) -> Tensor:
    return mean + spread * torch.randn(rows, DIM, generator=generator(seed), dtype=torch.float64)


def streamed(pieces: list[tuple[Tensor, Tensor | float]], dtype: torch.dtype = torch.float64) -> EdgeMoments:
    moments = EdgeMoments.zeros(torch.zeros(DIM, dtype=dtype))
    for values, weights in pieces:
        moments.add(values, weights)
    return moments


def repeated(pieces: list[tuple[Tensor, Tensor | float]]) -> Tensor:
    """Each row as often as its weight says."""
    counts = [w if isinstance(w, Tensor) else torch.full((v.shape[0],), w) for v, w in pieces]
    return torch.cat([v.repeat_interleave(c.flatten().long(), 0) for (v, _), c in zip(pieces, counts, strict=True)])


def mixed_pieces() -> list[tuple[Tensor, Tensor | float]]:
    """Both kinds of weights, padding, an empty chunk, a chunk of padding alone, one row."""
    mask = torch.tensor([0.0, 1.0, 2.0, 1.0]).double().repeat(5)
    return [
        (edges(11, 3.0, seed=1), 2.0),
        (edges(20, -1.0, 0.1, seed=2), mask.view(5, 2, 2)),
        (edges(0), 1.0),
        (edges(6, 100.0, seed=3), torch.zeros(6).double()),
        (edges(1, 7.0, seed=4), 1.0),
        (edges(0), torch.zeros(0, 2, 2).double()),
        (edges(9, 0.0, 5.0, seed=5), 1.0),
    ]


def test_weighted_chunks_give_the_moments_of_all_edges() -> None:
    pieces = mixed_pieces()
    everything = repeated(pieces)
    moments = streamed(pieces)
    count = everything.shape[0]
    assert float(moments.count) == count
    mean, variance = moments.over(identity, count)
    want_variance, want_mean = torch.var_mean(everything, 0, correction=0)
    torch.testing.assert_close(mean, want_mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(variance, want_variance, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_a_large_mean_costs_no_digits_of_the_spread(chunk: int) -> None:
    # In float32 a difference of mean squares would be off by factors of a thousand: 1e4² holds digits down to 8 only.
    exact = edges(1000, 1e4, 0.1)
    single = exact.float()
    moments = streamed([(part, 2.0) for part in single.split(chunk)], torch.float32)
    mean, variance = moments.over(identity, 2000)
    want_variance, want_mean = torch.var_mean(single.double(), 0, correction=0)
    torch.testing.assert_close(mean.double(), want_mean, rtol=1e-6, atol=0)
    # The rounding of the means themselves, 5e-4 at 1e4, is all that may come in.
    assert float(((variance.double() - want_variance) / want_variance).abs().max()) < 5e-3


def test_float32_is_near_float64_over_many_chunks() -> None:
    exact = edges(20_000, 0.5)
    moments = streamed([(part, 2.0) for part in exact.float().split(64)], torch.float32)
    mean, variance = moments.over(identity, 40_000)
    want_variance, want_mean = torch.var_mean(exact, 0, correction=0)
    torch.testing.assert_close(mean.double(), want_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), want_variance, rtol=2e-6, atol=0)


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_processes_together_give_the_moments_of_all_edges(ranks: int) -> None:
    pieces = mixed_pieces()
    everything = repeated(pieces)
    group = Group(ranks)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        # With nine processes two have no chunk at all.
        return streamed(pieces[rank::ranks]).over(group.reducer(rank), everything.shape[0])

    want_variance, want_mean = torch.var_mean(everything, 0, correction=0)
    for mean, variance in group.run(work):
        torch.testing.assert_close(mean, want_mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(variance, want_variance, rtol=1e-12, atol=1e-12)


def test_moments_carry_no_gradient() -> None:
    like = torch.ones(DIM, dtype=torch.float64, requires_grad=True)
    moments = EdgeMoments.zeros(like)
    moments.add(edges(4), 1.0)
    mean, variance = moments.over(identity, 4)
    assert not mean.requires_grad
    assert not variance.requires_grad
