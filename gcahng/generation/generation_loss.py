"""J_gen, the loss of the pull coefficients, chunk by chunk, as one operation over what they are read from.

Letters: B = P * K samples group-major, P classes, K samples per class, D channels, N training classes; shapes of chunks
as in `pair_synthesis`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.generation.constant_classifier import ConstantClassifier
from gcahng.generation.diversity import Spread
from gcahng.generation.pair_synthesis import ChunkedCoefficients, ChunkSynthesis, CoefficientRows, Pulls, Way, both
from gcahng.generation.synthesis import PlacedBatch, Synthesis, check_coefficients, place
from gcahng.graph import identity
from gcahng.graph.coefficients import Coefficients, PairCoefficients, TableCoefficients, UnitCoefficients
from gcahng.graph.edge_layout import ChunkRows
from gcahng.graph.precision import without_autocast
from gcahng.graph.read_out import ReadOutGradient
from gcahng.layout import check_labels
from gcahng.losses.synthetic import classification_loss, diversity_loss, similarity_loss

# As torch's cosine_similarity: no length counts as less.
SMALLEST_LENGTH = 1e-8


@dataclass(frozen=True)
class LossFactors:
    """What J_cls, J_sim and J_div are multiplied with in J_gen."""

    classification: float
    similarity: float
    diversity: float


@dataclass(frozen=True)
class GenerationLoss:
    """J_gen and its parts.

    Attributes:
        total: 1/2 (c J_cls + s J_sim + d J_div); the only one with gradient.
        classification: J_cls, mean cross-entropy over all entries, the own-class ones included.
        similarity: J_sim, mean of 1 - cosine of anchor and synthetic negative, own-class entries counting as 0.
        diversity: J_div; None where all coefficients are 1.
    """

    total: Tensor
    classification: Tensor
    similarity: Tensor
    diversity: Tensor | None


def generation_loss(
    z: Tensor,
    coefficients: Coefficients,
    synthesis: Synthesis,
    classifier: ConstantClassifier,
    class_labels: Tensor,
    factors: LossFactors,
    *,
    reduce: Callable[[Tensor], Tensor] = identity,
) -> GenerationLoss:
    """J_gen of a batch; embeddings and classifier are constants.

    Args:
        z: (B, D), group-major.
        coefficients: Of the batch; gradient flows to `PairCoefficients` and to a table.
        synthesis: The generation pass's.
        classifier: Judges the synthetic negatives.
        class_labels: (P,) int64 training labels of the batch's classes.
        factors: Of the parts.
        reduce: Differentiable sum over processes.
    Returns:
        J_gen and its parts, scalars.
    Raises:
        InputError: Labels, classifier, mixing weights or the coefficients' plan do not fit the batch.
    """
    z = z.detach()
    check_coefficients(z, coefficients)
    _check(z, synthesis, classifier, class_labels)
    if isinstance(coefficients, TableCoefficients):
        return _of_table(z, coefficients, synthesis, classifier, class_labels, factors)
    with torch.no_grad():
        batch = place(z, coefficients.plan, synthesis)
    call = _Call(batch, coefficients, classifier.lowered(), class_labels, factors, reduce)
    if isinstance(coefficients, PairCoefficients) and torch.is_grad_enabled():
        losses = _WithGradient.apply(call, *coefficients.read_out.tensors)
        return GenerationLoss(*losses)
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        return _measure(call, None)


def _check(z: Tensor, synthesis: Synthesis, classifier: ConstantClassifier, class_labels: Tensor) -> None:
    num_classes = z.shape[0] // synthesis.num_samples
    check_labels(class_labels, class_labels.numel(), "class_labels")
    if class_labels.shape != (num_classes,):
        raise InputError(
            f"`class_labels` must have one entry per class of the batch: expected shape ({num_classes},), got "
            f"{tuple(class_labels.shape)}. Pass `class_labels` of `gcahng.layout.group_major(labels)`."
        )
    if not isinstance(classifier, ConstantClassifier):
        raise InputError(
            f"`classifier` must be a ConstantClassifier: got {type(classifier).__name__}. For a linear layer write "
            "`ConstantClassifier(layer.weight, layer.bias)`."
        )
    shape = tuple(classifier.weight.shape)
    outputs = shape[0]
    if shape[1:] != (z.shape[1],):
        raise InputError(f"`classifier.weight` must have shape (N, D) with D = {z.shape[1]}: got {shape}.")
    _check_values(class_labels, outputs)


def _check_values(class_labels: Tensor, outputs: int) -> None:
    if class_labels.device.type != "cpu":
        # Looking would wait for the device.
        return
    values = class_labels.numpy()
    if not 0 <= values.min() <= values.max() < outputs:
        raise InputError(
            f"`class_labels` must lie in 0 ... {outputs - 1}, the classifier's outputs: got {values.min()} to "
            f"{values.max()}. Number the training classes from 0."
        )


def _of_table(
    z: Tensor,
    coefficients: TableCoefficients,
    synthesis: Synthesis,
    classifier: ConstantClassifier,
    class_labels: Tensor,
    factors: LossFactors,
) -> GenerationLoss:
    table = coefficients.table()
    synthetic = synthesis.all_at_once(z, table)
    classification = classification_loss(classifier.logits(synthetic), class_labels)
    similarity, diversity = similarity_loss(z, synthetic), diversity_loss(table)
    total = _total(factors, classification, similarity, diversity)
    return GenerationLoss(total, classification.detach(), similarity.detach(), diversity.detach())


def _total(factors: LossFactors, classification: Tensor, similarity: Tensor, diversity: Tensor | None) -> Tensor:
    total = factors.classification * classification + factors.similarity * similarity
    return 0.5 * (total if diversity is None else total + factors.diversity * diversity)


@dataclass(frozen=True)
class _Call:
    """What one evaluation takes."""

    batch: PlacedBatch
    coefficients: ChunkedCoefficients
    classifier: ConstantClassifier
    class_labels: Tensor
    factors: LossFactors
    reduce: Callable[[Tensor], Tensor]


class _WithGradient(torch.autograd.Function):
    """The losses; the gradient is made beside them and only multiplied in the backward pass."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(call.coefficients, PairCoefficients)
        read_out = call.coefficients.read_out
        buffer = call.coefficients.logits()
        gradient = ReadOutGradient(read_out, buffer)
        losses = _measure(call, gradient)
        ctx.reduce = call.reduce
        ctx.save_for_backward(*gradient.finish(call.reduce))
        assert losses.diversity is not None
        ctx.mark_non_differentiable(losses.classification, losses.similarity, losses.diversity)
        return losses.total, losses.classification, losses.similarity, losses.diversity

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Any, ...]:
        if ctx.reduce is None:
            raise RuntimeError("The generation loss passes its gradient back once: it is written over what it needs.")
        scale = ctx.reduce(grad_total)
        ctx.reduce = None
        # In place: the first one is as large as the edges.
        return None, *(grad.mul_(scale) for grad in ctx.saved_tensors)


def _measure(call: _Call, gradient: ReadOutGradient | None) -> GenerationLoss:
    """The losses; with `gradient`, its buffer is overwritten and the first sweep of it done."""
    batch, coefficients = call.batch, call.coefficients
    spread = rows = None
    if not isinstance(coefficients, UnitCoefficients):
        if gradient is not None and isinstance(coefficients, PairCoefficients):
            rows = CoefficientRows.written_over(coefficients, gradient.buffer)
        else:
            rows = CoefficientRows.of(coefficients)
        spread = Spread.of(coefficients, rows, call.reduce)
    sums = batch.z.new_zeros(2)
    for part in coefficients.layout.parts:
        pulls = (None, None) if rows is None else rows.chunk(part)
        work = ChunkSynthesis(batch, part.chunk, pulls)
        grads = _add_chunk(call, work, sums, gradient is not None)
        if gradient is not None:
            assert spread is not None
            by_pulls = work.coefficient_gradients(grads)
            spread.add_gradient(part.chunk, pulls, by_pulls, 0.5 * call.factors.diversity)
            _write(call, gradient, part, pulls, by_pulls)
    if gradient is not None:
        for part in coefficients.layout.all_rows():
            gradient.add_weights(part)
    classification, similarity = (call.reduce(sums) / batch.entry_count).unbind()
    diversity = None if spread is None else spread.loss()
    total = _total(call.factors, classification, similarity, diversity)
    return GenerationLoss(total, classification, similarity, diversity)


def _add_chunk(call: _Call, work: ChunkSynthesis, sums: Tensor, gradient: bool) -> list[Tensor]:
    """Add the chunk's classification and similarity to `sums`; gradients of its synthetic negatives."""
    grads = []
    for way in work.ways:
        synthetic = work.negatives(way)
        real, other = work.counted(way)
        labels = work.entry_labels(way, call.class_labels).expand(synthetic.shape[:-1])
        rows = None if real is None else real.expand(labels.shape).reshape(-1)
        loss, grad = call.classifier.cross_entropy(
            synthetic.view(-1, synthetic.shape[-1]), labels.reshape(-1), rows, gradient=gradient
        )
        sums[0] += loss
        away, by_anchor, by_synthetic = _cosines(way, synthetic, other)
        sums[1] += away.sum()
        if gradient:
            grad = grad.view(synthetic.shape).mul_(0.5 * call.factors.classification / call.batch.entry_count)
            factor = 0.5 * call.factors.similarity / call.batch.entry_count
            grad.addcmul_(by_anchor[..., None], way.at_entries(way.anchors), value=-factor)
            grads.append(grad.addcmul_(by_synthetic[..., None], synthetic, value=factor))
    return grads


def _cosines(way: Way, synthetic: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """1 - cosine of anchors and entries, and the factors of -anchor and of entry in its gradient, shaped as entries."""
    length = torch.linalg.vector_norm(synthetic, dim=-1)
    floored = length.clamp_min(SMALLEST_LENGTH)
    anchor_length = torch.linalg.vector_norm(way.anchors, dim=-1).clamp_min(SMALLEST_LENGTH)
    by_anchor = 1 / (floored * way.at_entries(anchor_length))
    cosine = (synthetic * way.at_entries(way.anchors)).sum(-1) * by_anchor
    away = 1 - cosine
    by_synthetic = torch.where(length > SMALLEST_LENGTH, cosine / floored.square(), 0.0)
    if counted is None:
        return away, by_anchor, by_synthetic
    return away * counted, by_anchor * counted, by_synthetic * counted


def _write(call: _Call, gradient: ReadOutGradient, part: ChunkRows, pulls: Pulls, by_pulls: Pulls) -> None:
    """Write the gradients of a chunk's logits over what they were."""
    layout = gradient.read_out.layout
    grads = []
    for pull, grad in zip(pulls, by_pulls, strict=True):
        if pull is not None and grad is not None:
            grads.append(torch.ops.aten.sigmoid_backward(grad, pull))
    real = layout.masks(part, call.batch.z.dtype)[0]
    if real is not None:
        grads = [grad.mul_(real[..., None]) for grad in grads]
    layout.add_directions(part, *both(grads), gradient.buffer)
