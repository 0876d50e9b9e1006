"""Synthetic negatives of chunks, by hand-made coefficients per direction: values and gradients."""

import pytest
import torch
from generation_cases import Case
from maths_cases import SIZES, Size, generator, plan_of
from torch import Tensor

from gcahng.generation.pair_synthesis import ChunkSynthesis, Pulls, both
from gcahng.generation.synthesis import PlacedBatch, place
from gcahng.generation.synthesis_gradient import BatchGradient
from gcahng.graph.pairs import PairChunk

CASES = [Case(size, normalised=normalised) for size in SIZES for normalised in (False, True)]
CASES += [Case(SIZES[1], duplicates=True)]
CASES += [Case(SIZES[n], normalised=n == 2, per_block=m) for n, m in ((1, 2), (2, 4), (4, 3), (5, 4))]
EVERY_CASE = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.size}-{c.normalised}-{c.duplicates}-{c.per_block}"
)


def table_of(size: Size) -> Tensor:
    """(B, B, D) coefficients whose two directions differ."""
    return torch.rand(size.batch, size.batch, size.dim, generator=generator(7), dtype=torch.float64)


def directed(batch: PlacedBatch, chunk: PairChunk, table: Tensor) -> Pulls:
    """A table's coefficients of a chunk's edges in both directions."""
    samples = batch.plan.order.view(-1, chunk.block_size)
    first, second = samples[chunk.first][:, :, None], samples[chunk.second][:, None, :]
    return table[first, second], table[second, first] if chunk.mirrored else None


def entries(batch: PlacedBatch, chunk: PairChunk) -> list[tuple[Tensor, Tensor]]:
    """Sample numbers of anchors and class numbers of a chunk's entries, (n, b, m) and (n, m, b) each."""
    anchors = batch.plan.order.view(-1, chunk.block_size)
    classes = torch.arange(batch.plan.num_blocks * batch.block_classes).view(-1, batch.block_classes)
    found = [(anchors[chunk.first][:, :, None], classes[chunk.second][:, None, :])]
    if chunk.mirrored:
        found.append((anchors[chunk.second][:, None, :], classes[chunk.first][:, :, None]))
    return [tuple(torch.broadcast_tensors(*pair)) for pair in found]  # type: ignore[misc]


@EVERY_CASE
def test_every_entry_comes_once_and_equals_the_table(case: Case) -> None:
    size, (z, _) = case.size, case.batch()
    table = table_of(size)
    want = case.synthesis().all_at_once(z, table)
    batch = place(z, case.plan(), case.synthesis())
    seen = torch.zeros(size.batch, size.num_classes, dtype=torch.int64)
    for chunk in batch.plan.chunks:
        work = ChunkSynthesis(batch, chunk, directed(batch, chunk, table))
        for way, (anchors, classes) in zip(work.ways, entries(batch, chunk), strict=True):
            got = work.negatives(way)
            real, other = (
                torch.ones(got.shape[:-1]) if mask is None else mask.expand(got.shape[:-1])
                for mask in work.counted(way)
            )
            kept = real > 0
            torch.testing.assert_close(got[kept], want[anchors[kept], classes[kept]], rtol=1e-12, atol=1e-13)
            seen.index_put_((anchors[kept], classes[kept]), torch.ones_like(seen[0, 0]), accumulate=True)
            assert torch.equal(other > 0, kept & (anchors % size.num_classes != classes))
    assert torch.equal(seen, torch.ones_like(seen))


@EVERY_CASE
def test_gradients_equal_those_of_the_table(case: Case) -> None:
    size, (z, _) = case.size, case.batch()
    table = table_of(size)
    mix = torch.randn(size.batch, size.num_classes, size.dim, generator=generator(8), dtype=torch.float64)
    leaves = z.clone().requires_grad_(), table.clone().requires_grad_()
    want = torch.autograd.grad((case.synthesis().all_at_once(*leaves) * mix).sum(), leaves)
    z.requires_grad_()
    batch = place(z, case.plan(), case.synthesis())
    collected, by_table = BatchGradient(batch), torch.zeros_like(table)
    with torch.no_grad():
        for chunk in batch.plan.chunks:
            work = ChunkSynthesis(batch, chunk, directed(batch, chunk, table))
            grads = []
            for way, (anchors, classes) in zip(work.ways, entries(batch, chunk), strict=True):
                real = work.counted(way)[0]
                grad = mix[anchors, classes.clamp_max(size.num_classes - 1)]
                grads.append(grad if real is None else grad * real[..., None])
            collected.add(work, grads)
            _collect(by_table, batch, chunk, work.coefficient_gradients(grads))
    pairs = [(t, g) for t, g in zip(batch.tensors, collected.tensors, strict=True) if t is not None]
    (got,) = torch.autograd.grad([t for t, _ in pairs], z, [g for _, g in pairs])
    torch.testing.assert_close(got, want[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(by_table, want[1], rtol=1e-9, atol=1e-12)


def _collect(table: Tensor, batch: PlacedBatch, chunk: PairChunk, grads: Pulls) -> None:
    samples = batch.plan.order.view(-1, chunk.block_size)
    first, second = torch.broadcast_tensors(samples[chunk.first][:, :, None], samples[chunk.second][:, None, :])
    for index, grad in zip(((first, second), (second, first)), grads, strict=True):
        if grad is not None:
            table.index_put_(index, grad, accumulate=True)


def test_coefficients_of_both_directions_in_one() -> None:
    """One tensor for both directions gets the sum of what two of them get."""
    case = Case(SIZES[2])
    batch = place(case.batch()[0], plan_of(case.size), case.synthesis())
    chunk = batch.plan.chunks[-1]
    assert chunk.mirrored
    one = directed(batch, chunk, table_of(case.size))[0]
    assert one is not None
    shared, apart = (ChunkSynthesis(batch, chunk, pulls) for pulls in ((one, one), (one, one.clone())))
    grads = [torch.randn(shared.negatives(w).shape, dtype=torch.float64, generator=generator(1)) for w in shared.ways]
    total, none = shared.coefficient_gradients(grads)
    first, second = apart.coefficient_gradients(grads)
    assert none is None
    assert second is not None
    torch.testing.assert_close(total, first + second, rtol=1e-13, atol=1e-14)
    found = [BatchGradient(batch), BatchGradient(batch)]
    for collected, work in zip(found, (shared, apart), strict=True):
        collected.add(work, grads)
    torch.testing.assert_close(found[0].z, found[1].z, rtol=1e-13, atol=1e-13)


def test_nearly_equal_distances_are_not_told_apart() -> None:
    """A negative as far as the positive, up to rounding, is taken as it is."""
    size = Size(2, 2, 64, 1, 1)
    draw = torch.randn(3, 64, generator=generator(3), dtype=torch.float64)
    # The second class holds the positive of sample 0 moved by less than rounding shows in a distance.
    z = torch.stack([draw[0], draw[1], draw[2], draw[1] * (1 + 1e-16)])
    z[1] = z[2]
    batch = place(z, plan_of(size), Case(size).synthesis())
    for chunk in batch.plan.chunks:
        work = ChunkSynthesis(batch, chunk, directed(batch, chunk, table_of(size)))
        samples = batch.plan.order.view(-1, chunk.block_size)
        anchors, negatives = samples[chunk.first][0], samples[chunk.second][0]
        farther = work.ways[0].farther[0]
        assert not farther[anchors == 0][:, (negatives == 1) | (negatives == 2)].any()


def test_one_or_two_values() -> None:
    one, other = torch.zeros(1), torch.ones(1)
    assert both([one]) == (one, None)
    assert both([one, other]) == (one, other)
