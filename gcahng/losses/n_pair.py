"""N-pair losses (Sohn, NeurIPS 2016), the original and the paper's generalisation to K samples per class."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.errors import InputError
from gcahng.layout import BatchLayout, check_embeddings, check_labels, check_same_width, group_major

# The weight of the squared embedding lengths, 0.02-scale in Sohn's paper; this is the released code's value.
LENGTH_WEIGHT = 3e-3 * 0.25


class NPairPlusLoss(nn.Module):
    """NP+: the first sample of every class against each further group of samples.

    Softmax cross-entropy of z_0 z_gᵀ (P x P) against the diagonal for g = 1..K-1, averaged over g, plus
    3e-3 * 0.25 * sum_g ‖z_g‖² / P over all K groups (GCA-HNG's released code). With K = 2 it is the original N-pair.
    """

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        candidates: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        *,
        layout: BatchLayout | None = None,
    ) -> Tensor:
        """
        Args:
            embeddings: (B, D), not normalised; every class K >= 2 times, in any order.
            labels: (B,) int64.
            candidates: (C, D): the groups to compare with. Then every embedding is an anchor, the candidates hold
                each class the same number of times, and the anchors' classes must be among them.
            candidate_labels: (C,) int64.
            layout: How the embeddings are grouped, from a caller who has checked them and their labels: their values
                are then not looked at, which would wait for the device. Not with `candidates`.
        Returns:
            Scalar loss.
        Raises:
            InputError: Shapes, dtypes or class counts do not fit (offending classes are listed).
        """
        check_embeddings(embeddings, values=layout is None)
        check_labels(labels, embeddings.shape[0])
        if candidates is None:
            return self._within(embeddings, layout or group_major(labels))
        if candidate_labels is None:
            raise InputError("`candidate_labels` is missing: expected (C,) labels beside `candidates`.")
        check_embeddings(candidates, "candidates")
        check_same_width(embeddings, candidates, "embeddings", "candidates")
        check_labels(candidate_labels, candidates.shape[0], "candidate_labels")
        layout = group_major(candidate_labels)
        groups = candidates[layout.order].view(layout.num_samples, layout.num_classes, -1)
        return self._compare(embeddings, _columns(labels, layout.class_labels), groups)

    def _within(self, embeddings: Tensor, layout: BatchLayout) -> Tensor:
        self._check_samples(layout.num_samples)
        groups = embeddings[layout.order].view(layout.num_samples, layout.num_classes, -1)
        own = torch.arange(layout.num_classes, device=embeddings.device)
        return self._compare(groups[0], own, groups[1:])

    def _check_samples(self, num_samples: int) -> None:
        if num_samples < 2:
            raise InputError("`labels` must hold every class at least twice: got K = 1, so no anchor has a positive.")

    def _compare(self, anchors: Tensor, own: Tensor, groups: Tensor) -> Tensor:
        logits = torch.einsum("ad,gpd->gap", anchors, groups)
        targets = own.expand(logits.shape[:2])
        pairs = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        lengths = anchors.square().sum() / anchors.shape[0] + groups.square().sum() / groups.shape[1]
        return pairs + LENGTH_WEIGHT * lengths


class NPairLoss(NPairPlusLoss):
    """NP: one anchor and one positive per class (K = 2), the original N-pair loss."""

    def _check_samples(self, num_samples: int) -> None:
        if num_samples != 2:
            raise InputError(
                f"`labels` must hold every class exactly twice for the original N-pair loss: got K = {num_samples}. "
                "Use NPairPlusLoss (loss.metric: n_pair_plus) for more samples per class."
            )


def _columns(labels: Tensor, class_labels: Tensor) -> Tensor:
    """Position of each label in `class_labels`."""
    match = labels[:, None] == class_labels[None, :]
    missing = ~match.any(1)
    if bool(missing.any()):
        raise InputError(
            f"`candidate_labels` must hold the class of every anchor: missing {labels[missing].unique().tolist()[:10]}."
        )
    return match.int().argmax(1)
