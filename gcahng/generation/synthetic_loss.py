"""J_syn, the synthetic-negative loss, chunk by chunk: neither the synthetic negatives nor a (B, P) table is stored.

Letters: B = P * K samples group-major, P classes, K samples per class, D channels; shapes of chunks as in
`pair_synthesis`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.generation.interpolation import positives
from gcahng.generation.pair_synthesis import ChunkedCoefficients, ChunkSynthesis, CoefficientRows, Way, both
from gcahng.generation.synthesis import PlacedBatch, Synthesis, check_coefficients, place
from gcahng.generation.synthesis_gradient import BatchGradient
from gcahng.graph import identity
from gcahng.graph.coefficients import Coefficients, PairCoefficients, TableCoefficients, UnitCoefficients
from gcahng.graph.pairs import PairChunk, PairPlan, add_ends, ends
from gcahng.graph.precision import without_autocast
from gcahng.losses.n_pair import LENGTH_WEIGHT
from gcahng.losses.synthetic import synthetic_n_pair_loss

NEVER = float("-inf")


def synthetic_loss(
    z: Tensor,
    coefficients: Coefficients,
    synthesis: Synthesis,
    *,
    reduce: Callable[[Tensor], Tensor] = identity,
) -> Tensor:
    """J_syn: every sample once an anchor, its positive against the synthetic negatives of the other classes.

    Cross-entropy over the candidates of an anchor (own class: z_i · z_pos(i), others: z_i · synthetic_{i,p}), mean over
    all anchors, plus 3e-3 * 0.25 * (mean ‖z_i‖² + mean ‖candidate‖²). Chunk by chunk the coefficients are constants.
    A table of them, and `PairCoefficients`, get their gradients; that takes the full (B, B, D) table and one process.

    Args:
        z: (B, D), group-major.
        coefficients: Of the batch.
        synthesis: The metric pass's.
        reduce: Differentiable sum over processes.
    Returns:
        A scalar.
    Raises:
        InputError: Coefficients with gradient that are not all here, or whose plan does not fit the batch.
    """
    check_coefficients(z, coefficients)
    if isinstance(coefficients, TableCoefficients | PairCoefficients):
        return synthetic_n_pair_loss(z, synthesis.all_at_once(z, _whole_table(coefficients)))
    batch = place(z, coefficients.plan, synthesis)
    among_negatives, squares = _Candidates.apply(batch, coefficients, *batch.tensors)
    positive = positives(z, synthesis.num_samples)
    own = (z * positive).sum(1)
    spread = by_process(batch.plan.samples(among_negatives), batch.plan)
    total = torch.logsumexp(torch.cat([reduce(spread), own[None]]), 0)
    length = z.square().sum()
    lengths = length / batch.plan.batch_size + (reduce(squares) + length) / batch.entry_count
    return (total - own).mean() + LENGTH_WEIGHT * lengths


def _whole_table(coefficients: TableCoefficients | PairCoefficients) -> Tensor:
    plan = coefficients.plan
    if not plan.dense or (isinstance(coefficients, PairCoefficients) and plan.share[1] > 1):
        raise InputError(
            "`coefficients` with gradient must cover all pairs of the batch in this process: got a plan of a share or "
            "of a sparse graph. Call the graph with coefficient_gradient=False."
        )
    return coefficients.table()


def by_process(values: Tensor, plan: PairPlan) -> Tensor:
    """(B,) values as one row of a (processes, B) table of zeros, whose sum over the processes holds all rows."""
    rank, ranks = plan.share
    before, after = values.new_zeros(rank, len(values)), values.new_zeros(ranks - 1 - rank, len(values))
    return torch.cat([before, values[None], after])


class _Candidates(torch.autograd.Function):
    """Per position the logsumexp of the scores with its synthetic negatives, and the sum of all their squared lengths.

    Those of the own class are left out; a position without others in this process has -inf.
    """

    @staticmethod
    def forward(
        ctx: Any, batch: PlacedBatch, coefficients: ChunkedCoefficients, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        squares = batch.z.new_zeros(())
        scores: list[Tensor] = []
        for work in _chunks(batch, coefficients):
            for way in work.ways:
                synthetic = work.negatives(way)
                score = (synthetic * way.at_entries(way.anchors)).sum(-1)
                square = synthetic.square_().sum(-1)
                counted = work.counted(way)[1]
                if counted is not None:
                    score, square = score.masked_fill(counted == 0, NEVER), square * counted
                scores.append(score)
                squares += square.sum()
        totals = by_anchor(batch.plan, scores)
        ctx.batch, ctx.coefficients = batch.bare(), coefficients
        ctx.save_for_backward(*tensors, totals, *scores)
        return totals, squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_totals: Tensor, grad_squares: Tensor) -> tuple[Any, ...]:
        *tensors, totals = ctx.saved_tensors[:4]
        scores = iter(ctx.saved_tensors[4:])
        batch: PlacedBatch = ctx.batch.with_tensors(tensors)
        totals = totals.masked_fill(totals == NEVER, 0.0)
        collected = BatchGradient(batch)
        for work in _chunks(batch, ctx.coefficients):
            at_anchor = zip(ends(totals, work.chunk), ends(grad_totals, work.chunk), strict=True)
            at_anchors, grads = [], []
            for way, (total, grad_total) in zip(work.ways, at_anchor, strict=False):
                synthetic = work.negatives(way)
                by_score = (next(scores) - way.at_entries(total)).exp_() * way.at_entries(grad_total)
                at_anchors.append((synthetic * by_score[..., None]).sum(way.axis))
                grads.append(_by_synthetic(work, way, synthetic, by_score, 2 * grad_squares))
            add_ends(collected.z, work.chunk, *both(at_anchors))
            collected.add(work, grads)
        return None, None, *collected.tensors


def _by_synthetic(
    work: ChunkSynthesis, way: Way, synthetic: Tensor, by_score: Tensor, by_half_square: Tensor
) -> Tensor:
    """Gradient of synthetic negatives, written over them."""
    counted = work.counted(way)[1]
    synthetic *= by_half_square if counted is None else (counted * by_half_square)[..., None]
    return synthetic.addcmul_(by_score[..., None], way.at_entries(way.anchors))


def _chunks(batch: PlacedBatch, coefficients: ChunkedCoefficients) -> Iterator[ChunkSynthesis]:
    rows = None if isinstance(coefficients, UnitCoefficients) else CoefficientRows.of(coefficients)
    for part in coefficients.layout.parts:
        yield ChunkSynthesis(batch, part.chunk, (None, None) if rows is None else rows.chunk(part))


def by_anchor(plan: PairPlan, scores: list[Tensor]) -> Tensor:
    """(num_positions,) logsumexp of each anchor's scores."""
    shift = scores[0].new_full((plan.num_blocks, plan.block_size), NEVER)
    for (chunk, axis), score in zip(_ways(plan), scores, strict=True):
        anchors = chunk.first if axis == 2 else chunk.second
        best = score.amax(axis)
        shift.scatter_reduce_(0, anchors[:, None].expand_as(best), best, "amax")
    # Nothing to add up for who has no candidates: keep -inf - -inf away.
    shift = shift.masked_fill(shift == NEVER, 0.0).flatten()
    sums = torch.zeros_like(shift)
    for (chunk, axis), score in zip(_ways(plan), scores, strict=True):
        side = 0 if axis == 2 else 1
        part = (score - ends(shift, chunk)[side].unsqueeze(axis)).exp_().sum(axis)
        add_ends(sums, chunk, *((part, None) if axis == 2 else (None, part)))
    return sums.log_().add_(shift)


def _ways(plan: PairPlan) -> Iterator[tuple[PairChunk, int]]:
    """The directions of each chunk, by the axis of the negatives."""
    for chunk in plan.chunks:
        yield chunk, 2
        if chunk.mirrored:
            yield chunk, 1
