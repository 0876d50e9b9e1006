"""Loss sums over blocks of synthetic negatives: partial sums of one process, for the caller to reduce.

Letters: B = P * K samples group-major, P classes, K samples per class, D channels, N training classes; n ordered
block pairs of b samples and m classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.generation.block_synthesis import BatchSynthesis, SyntheticBlock
from gcahng.graph import Coefficients, PairPlan


@dataclass(frozen=True)
class SyntheticScores:
    """What the synthetic-negative loss needs of all synthetic negatives.

    Attributes:
        scores: (B, P) z_i · synthetic_{i,p}; the own-class column is 0.
        square_sum: Sum of the squared lengths of all synthetic negatives of other classes.
    """

    scores: Tensor
    square_sum: Tensor


@dataclass(frozen=True)
class GenerationSums:
    """Sums over all B * P entries.

    Attributes:
        classification: Cross-entropy of the classifier on every entry, the own-class ones included.
        similarity: 1 - cosine of anchor and synthetic negative, own-class entries left out.
    """

    classification: Tensor
    similarity: Tensor


def _classes(batch: BatchSynthesis, block: SyntheticBlock) -> tuple[Tensor, Tensor, Tensor]:
    """Class numbers of anchors (n, b, 1) and of entries (n, 1, m), and which entries are no padding (n, b, m)."""
    per_block = batch.plan.block_size // batch.num_samples
    device = block.anchors.device
    inside = torch.arange(batch.plan.block_size, device=device) // batch.num_samples
    anchor_class = block.anchors[:, None] * per_block + inside
    entry_class = block.classes[:, None] * per_block + torch.arange(per_block, device=device)
    real = (anchor_class < batch.num_classes)[:, :, None] & (entry_class < batch.num_classes)[:, None, :]
    return anchor_class[:, :, None], entry_class[:, None, :], real


def synthetic_scores(batch: BatchSynthesis, coefficients: Coefficients) -> SyntheticScores:
    """Partial (B, P) scores and squared lengths over this process's block pairs."""
    plan = batch.plan
    per_block = plan.block_size // batch.num_samples
    table = batch.z.new_zeros(plan.num_blocks, plan.num_blocks, plan.block_size, per_block)
    squares = batch.z.new_zeros(())
    for block in batch.blocks(coefficients):
        anchor_class, entry_class, real = _classes(batch, block)
        counted = real & (anchor_class != entry_class)
        scores = (block.values * batch.z[block.anchors][:, :, None]).sum(-1)
        table = table.index_put((block.anchors, block.classes), scores * counted)
        squares = squares + (block.values.square().sum(-1) * counted).sum()
    rows = table.transpose(1, 2).flatten(2)[..., : batch.num_classes]
    return SyntheticScores(plan.samples(rows), squares)


def generation_sums(
    batch: BatchSynthesis,
    coefficients: Coefficients,
    class_labels: Tensor,
    classify: Callable[[Tensor], Tensor],
) -> GenerationSums:
    """Partial classification and similarity sums over this process's block pairs.

    Args:
        class_labels: (P,) training labels of the batch's classes.
        classify: Logits (rows, N) of (rows, D); its weights should be constants, since this pass does not step them.
    """
    classification = batch.z.new_zeros(())
    similarity = batch.z.new_zeros(())
    for block in batch.blocks(coefficients):
        anchor_class, entry_class, real = _classes(batch, block)
        target = class_labels[entry_class.clamp_max(batch.num_classes - 1)].expand(real.shape)
        # -100 is cross_entropy's mark for rows that do not count: padding.
        target = torch.where(real, target, -100)
        logits = classify(block.values.flatten(0, 2))
        classification = classification + F.cross_entropy(logits, target.flatten(), reduction="sum")
        anchors = batch.z[block.anchors][:, :, None]
        away = 1 - F.cosine_similarity(anchors, block.values, dim=-1)
        similarity = similarity + (away * (real & (anchor_class != entry_class))).sum()
    return GenerationSums(classification, similarity)


def coefficient_row_sums(coefficients: Coefficients, plan: PairPlan) -> Tensor:
    """Partial sums over the negatives of each anchor's coefficients: (B, D)."""
    valid = plan.valid_blocks(next(coefficients.ordered()).values.dtype) if plan.valid is not None else None
    sums: Tensor | None = None
    for block in coefficients.ordered():
        values = block.values if valid is None else block.values * valid[block.negatives][:, None, :, None]
        if sums is None:
            sums = values.new_zeros(plan.num_blocks, plan.block_size, values.shape[-1])
        sums = sums.index_add(0, block.anchors, values.sum(2))
    assert sums is not None, "a plan without block pairs"
    return plan.samples(sums)


def coefficient_spread(coefficients: Coefficients, row_mean: Tensor, plan: PairPlan) -> Tensor:
    """Partial sum over all ordered pairs and channels of (lambda - its anchor's mean)²: a scalar.

    Args:
        row_mean: (B, D) mean over all negatives, already reduced over the processes.
    """
    means = plan.blocks(row_mean)
    valid = plan.valid_blocks(row_mean.dtype)
    total = row_mean.new_zeros(())
    for block in coefficients.ordered():
        squares = (block.values - means[block.anchors][:, :, None]).square().sum(-1)
        if valid is not None:
            squares = squares * valid[block.anchors][:, :, None] * valid[block.negatives][:, None, :]
        total = total + squares.sum()
    return total
