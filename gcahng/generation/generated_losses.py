"""The losses on what a generator makes of interpolated embeddings: J_syn, and the generator's own.

HDML is Zheng et al., "Hardness-Aware Deep Metric Learning", CVPR 2019; the "released code" its authors',
github.com/wzzheng/HDML. GCA-HNG (IJCV 2024, section 4.6, table 8) compares with it. See `docs/generator.md`.

Letters: B = P * K samples group-major, P classes, K samples per class, D channels of embeddings, C of features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcahng.generation.constant_classifier import ConstantClassifier
from gcahng.generation.interpolation import positives
from gcahng.generation.row_map import RowMap
from gcahng.generation.single_pull import SinglePull
from gcahng.generation.synthesis import Synthesis
from gcahng.graph import identity
from gcahng.losses.n_pair import LENGTH_WEIGHT

# Both from the released code: `FLAGS.py` has _lambda = 0.5 and Softmax_factor = 1e4, `HDML.py` and `main_npair.py` put
# them together as J_gen = (1 - _lambda) * (squared error summed over the batch) + Softmax_factor * _lambda * J_soft.
# Here the squared error is a mean over samples, so that B does not decide the balance; the factor is that of the
# released batch of 128.
HDML_RECONSTRUCTION = (1 - 0.5) * 128
HDML_CLASSIFICATION = 1e4 * 0.5

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GeneratorFactors:
    """Factors of J_recon and J_soft in J_gen."""

    reconstruction: float = HDML_RECONSTRUCTION
    classification: float = HDML_CLASSIFICATION


@dataclass(frozen=True)
class GeneratorLoss:
    """Scalars: J_recon and J_soft, each without its factor, and J_gen."""

    reconstruction: Tensor
    classification: Tensor
    total: Tensor


def generated_synthetic_loss(
    z: Tensor,
    synthesis: Synthesis,
    to_embeddings: RowMap,
    *,
    share: tuple[int, int] = (0, 1),
    reduce: Reduce = identity,
) -> Tensor:
    """J_syn of generated negatives: `synthetic_n_pair_loss` of z and to_embeddings(interpolated).

    As GCA-HNG has it: anchors and positives are the real embeddings, the negatives alone are synthetic. (HDML sends all
    three through the generator.)

    Args:
        z: (B, D), group-major.
        synthesis: The metric pass's.
        to_embeddings: (R, D) interpolated embeddings to (R, D) embeddings of generated features.
        share: (rank, W) says which anchors are this process's.
        reduce: Differentiable sum over processes.
    Returns:
        A scalar, of the whole batch.
    """
    pull = SinglePull(z, synthesis)
    batch, num_classes = z.shape[0], pull.num_classes
    own_class = torch.arange(batch, device=z.device) % num_classes
    own_score = (z * positives(z, synthesis.num_samples)).sum(1)

    def part(anchors: slice) -> Tensor:
        negatives = pull.negatives(anchors)
        generated = to_embeddings(negatives.flatten(0, 1)).view_as(negatives)
        is_own = own_class[anchors, None] == torch.arange(num_classes, device=z.device)
        own = own_score[anchors]
        scores = torch.einsum("ad,apd->ap", z[anchors], generated)
        entropy = torch.logsumexp(torch.where(is_own, own[:, None], scores), 1) - own
        return torch.stack([entropy.sum(), (generated.square().sum(-1) * ~is_own).sum()])

    entropy, squares = reduce(pull.sum_over(part, to_embeddings.width, share)).unbind()
    length = z.square().sum()  # of the anchors, and of the positives
    return entropy / batch + LENGTH_WEIGHT * (length / batch + (squares + length) / (batch * num_classes))


def generator_loss(
    z: Tensor,
    features: Tensor,
    labels: Tensor,
    synthesis: Synthesis,
    to_features: RowMap,
    to_classified: RowMap,
    classifier: ConstantClassifier,
    factors: GeneratorFactors,
    *,
    share: tuple[int, int] = (0, 1),
    reduce: Reduce = identity,
) -> GeneratorLoss:
    """J_gen of HDML: generated features lie where real ones lie, and keep their class.

    J_recon: squared distance of the real samples' features to what the generator makes of their embeddings, mean over
    samples. J_soft: cross-entropy of a constant classifier on what it makes of the B * P interpolated embeddings,
    against the class that they come from, and on what it makes of the B real ones; a mean each, added up (released
    code, `genSoftmax`).

    Args:
        z: (B, D), group-major.
        features: (B, C) of the same samples.
        labels: (B,) int64 training labels.
        synthesis: The generation pass's.
        to_features: The generator, (R, D) to (R, C).
        to_classified: From generated features to what the classifier takes.
        classifier: Of N training classes.
        factors: Of the two terms.
        share, reduce: As for `generated_synthetic_loss`.
    """
    pull = SinglePull(z, synthesis)
    num_classes = pull.num_classes
    rebuilt = to_features(z)
    reconstruction = (rebuilt - features).square().sum(1).mean()
    lowered, class_labels = classifier.lowered(), labels[:num_classes]

    def part(anchors: slice) -> Tensor:
        negatives = pull.negatives(anchors).flatten(0, 1)
        wanted = class_labels.repeat(anchors.stop - anchors.start)
        return _entropy(to_classified(to_features(negatives)), wanted, lowered)

    width = max(to_features.width, to_classified.width)
    pulled = reduce(pull.sum_over(part, width, share)) / (z.shape[0] * num_classes)
    classification = pulled + _entropy(to_classified(rebuilt), labels, lowered) / z.shape[0]
    total = factors.reconstruction * reconstruction + factors.classification * classification
    return GeneratorLoss(reconstruction, classification, total)


def _entropy(x: Tensor, labels: Tensor, classifier: ConstantClassifier) -> Tensor:
    total: Tensor = _ConstantEntropy.apply(x, labels, classifier)
    return total


class _ConstantEntropy(torch.autograd.Function):
    """Summed cross-entropy of a constant classifier: logits of a slice of rows at a time, N may be large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, classifier: ConstantClassifier) -> Tensor:
        total, gradient = classifier.cross_entropy(x, labels, None, gradient=ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None
