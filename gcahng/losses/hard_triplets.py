"""Losses on the hardest triplet of every anchor (SCT: "Hard negative examples are hard, but useful", ECCV 2020).

An anchor's triplet is its most similar sample of the same class and its most similar sample of another class, by cosine
similarity, out of the whole batch. `HardNegativeLoss` (hn) learns from all of them, `SemiHardNegativeLoss` (shn) takes
the most similar negative that is not more similar than the positive, and `SelectivelyContrastiveLoss` (sct) only pushes
the negative away where it is more similar than the positive, instead of pulling at the positive, too.

The batch may be shared out: each process takes some anchors (`share`) and compares them with all samples; counts and
sums are added up (`reduce`), so that all have the loss of the whole batch. No similarity of all pairs is kept.

Letters: B samples, D channels, A anchors of this process (A = B for one), s_p and s_n similarities of an anchor and its
positive and negative.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.errors import InputError
from gcahng.layout import BatchLayout, check_embeddings, check_labels

# The released code's values.
TEMPERATURE = 0.1
HARD_SIMILARITY = 0.8
DUPLICATE_SIMILARITY = 0.9999
# A vector no longer than this has no direction (torch.nn.functional.normalize has the same bound).
SMALLEST_LENGTH = 1e-12
# Similarities of so many pairs are there at once (our choice: 64 MB in float32, some four times that with what is
# made of them).
SIMILARITIES = 1 << 24
NEVER = float("-inf")

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Triplets:
    """The triplet of every anchor; positions are those of the batch, all tensors (A,).

    Attributes:
        anchor: int64.
        positive: int64, the most similar sample of the same class that is no duplicate; of equally similar ones the
            first; 0 if there is none.
        negative: int64, the chosen sample of another class, in the same way.
        positive_similarity, negative_similarity: s_p and s_n, with a gradient to the embeddings; of an invalid
            triplet too, where they say nothing.
        valid: bool, whether there are both.
        hard: bool, valid and s_n > s_p. Never for semi-hard negatives.
    """

    anchor: Tensor
    positive: Tensor
    negative: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    valid: Tensor
    hard: Tensor


def select_triplets(
    embeddings: Tensor,
    labels: Tensor,
    *,
    semi_hard: bool = False,
    duplicate_similarity: float = DUPLICATE_SIMILARITY,
    share: tuple[int, int] = (0, 1),
    check_values: bool = True,
) -> Triplets:
    """Choose the positive and the negative of every anchor.

    Differs from the released code in what it cannot take: a similarity of exactly -1 counts there as "no such sample",
    and a negative of similarity 1 (or more, by rounding) makes the triplet invalid; here it is the hardest one.
    A vector of length 0 has no direction, hence no similarity: it is in no triplet.

    Args:
        embeddings: (B, D), of any length; compared in float32 at least.
        labels: (B,) integers, in any order; a sample that is alone in its class is nobody's positive.
        semi_hard: Take the most similar negative that is not more similar than the positive.
        duplicate_similarity: A more similar sample of the same class is taken as the same image, and skipped.
        share: (r, W): the anchors from r B / W to (r + 1) B / W, rounded down; all B are candidates.
        check_values: False leaves it to the caller that the embeddings are finite: a look waits for the device.
    Raises:
        InputError: Shapes, dtypes or `share` do not fit, or an embedding is not finite.
    """
    check_embeddings(embeddings, values=check_values)
    check_labels(labels, embeddings.shape[0])
    own = _part(embeddings.shape[0], share)
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = _unit(embeddings)
        chosen = _choose(unit.detach(), labels, own, semi_hard, duplicate_similarity)
        positive, negative, valid = chosen
        # Not the products of the search, whose last bits depend on how many rows it takes at once: two samples that are
        # alike are equally similar here.
        anchors = unit[own]
        to_positive = (anchors * unit[positive]).sum(1)
        to_negative = (anchors * unit[negative]).sum(1)
    hard = torch.zeros_like(valid) if semi_hard else valid & (to_negative.detach() > to_positive.detach())
    numbers = torch.arange(own.start, own.stop, device=embeddings.device)
    return Triplets(numbers, positive, negative, to_positive, to_negative, valid, hard)


def _part(count: int, share: tuple[int, int]) -> slice:
    part, parts = share
    if not 0 <= part < parts:
        raise InputError(f"`share` must be (r, W) with 0 <= r < W: got {share}.")
    return slice(count * part // parts, count * (part + 1) // parts)


def _unit(embeddings: Tensor) -> Tensor:
    """Vectors of length 1; of length 0, with no gradient, where there is no direction."""
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return wide / length.masked_fill(length <= SMALLEST_LENGTH, math.inf)


@torch.no_grad()
def _choose(
    unit: Tensor, labels: Tensor, own: slice, semi_hard: bool, duplicate_similarity: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(A,) positions of the positive and of the negative, and whether there are both."""
    number = torch.arange(len(unit), device=unit.device)
    nowhere = ~unit.any(1)
    positives, negatives, valid = [], [], []
    for rows in number[own].split(max(1, SIMILARITIES // max(1, len(unit)))) if len(unit) else ():
        similarity = (unit[rows] @ unit.t()).masked_fill_(nowhere, NEVER)
        same = labels[rows][:, None] == labels
        unusable = ~same | (rows[:, None] == number) | (similarity > duplicate_similarity)
        to_positive, positive = similarity.masked_fill(unusable, NEVER).max(1)
        similarity.masked_fill_(same, NEVER)
        if semi_hard:
            similarity.masked_fill_(similarity > to_positive[:, None], NEVER)
        to_negative, negative = similarity.max(1)
        positives.append(positive)
        negatives.append(negative)
        valid.append((to_positive > NEVER) & (to_negative > NEVER) & ~nowhere[rows])
    if not positives:
        return number, number, nowhere
    return torch.cat(positives), torch.cat(negatives), torch.cat(valid)


class HardNegativeLoss(nn.Module):
    """hn: -log softmax([s_p, s_n] / temperature)[0], mean over the valid triplets.

    Where s_n > s_p, the way that an anchor is pulled to its positive may bring it nearer to its negative, too: training
    can end with all embeddings alike, which sct prevents (the paper's argument).

    Attributes:
        measured: After a forward pass, detached scalars of the whole batch: "hard_negative_ratio", the share of valid
            triplets with s_n > s_p (0 without a valid one), and "valid_triplets", the share of anchors that have one.
    """

    semi_hard = False

    def __init__(self, temperature: float = TEMPERATURE, *, duplicate_similarity: float = DUPLICATE_SIMILARITY) -> None:
        """
        Args:
            temperature: Divides the similarities.
            duplicate_similarity: As in `select_triplets`.
        Raises:
            InputError: `temperature` is not above 0, or `duplicate_similarity` not in [-1, 1].
        """
        super().__init__()
        self.temperature = _number("temperature", temperature, 0.0, math.inf)
        if not self.temperature:
            raise InputError("`temperature` must be above 0: got 0.")
        self.duplicate_similarity = _number("duplicate_similarity", duplicate_similarity, -1.0, 1.0)
        self.measured: dict[str, Tensor] = {}

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        layout: BatchLayout | None = None,
        share: tuple[int, int] = (0, 1),
        reduce: Reduce | None = None,
    ) -> Tensor:
        """
        Args:
            embeddings: (B, D), normalised or not; all samples, also those whose anchors others take.
            labels: (B,) integers, in any order.
            layout: Anything but None says that the caller has checked the numbers: they are then not looked at, which
                would wait for the device. The layout itself does not matter.
            share: Which anchors are taken here, see `select_triplets`.
            reduce: Differentiable sum over those who take the others; None: nobody does.
        Returns:
            Scalar loss of all anchors; 0, with a gradient of 0, if none has a valid triplet.
        Raises:
            InputError: Shapes, dtypes or `share` do not fit, an embedding is not finite, or `reduce` is missing.
        """
        if reduce is None and share[1] != 1:
            raise InputError(f"`reduce` is missing: expected the sum over {share[1]} parts beside share={share}.")
        found = select_triplets(
            embeddings,
            labels,
            semi_hard=self.semi_hard,
            duplicate_similarity=self.duplicate_similarity,
            share=share,
            check_values=layout is None,
        )
        total, counted = self._terms(found)
        counts = torch.stack([counted, found.valid, found.hard]).sum(1).to(total.dtype)
        sums = torch.cat([total.sum()[None], counts])
        total, counted, valid, hard = (sums if reduce is None else reduce(sums)).unbind()
        self.measured = {
            "hard_negative_ratio": (hard / valid.clamp(min=1)).detach(),
            "valid_triplets": (valid / max(1, len(embeddings))).detach(),
        }
        return total / counted.detach().clamp(min=1)

    def _terms(self, found: Triplets) -> tuple[Tensor, Tensor]:
        """(A,) terms of the loss, and which of them count; the others are 0 and have no gradient."""
        return self._triplet_terms(found).where(found.valid, 0.0), found.valid

    def _triplet_terms(self, found: Triplets) -> Tensor:
        scores = torch.stack([found.positive_similarity, found.negative_similarity], 1) / self.temperature
        return F.cross_entropy(scores, torch.zeros_like(found.anchor), reduction="none")

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, duplicate_similarity={self.duplicate_similarity:g}"


class SemiHardNegativeLoss(HardNegativeLoss):
    """shn: the loss of `HardNegativeLoss` on the most similar negative that is not more similar than the positive.

    An anchor without such a negative is invalid. The measured "hard_negative_ratio" is that of the chosen triplets,
    hence always 0.
    """

    semi_hard = True


class SelectivelyContrastiveLoss(HardNegativeLoss):
    """sct: triplets whose negative is too similar contribute lam * s_n alone, the others what they do in `hn`.

    Too similar: s_n > s_p or s_n > hard_similarity. The others: s_n < s_p and s_n < hard_similarity. The loss is the
    sum of both kinds over their number; what is equal (s_n = s_p, say) falls into neither and is not counted. It can be
    below 0, where negatives of more similarity than the positive point away from the anchor.
    """

    def __init__(
        self,
        lam: float = 1.0,
        temperature: float = TEMPERATURE,
        *,
        hard_similarity: float = HARD_SIMILARITY,
        duplicate_similarity: float = DUPLICATE_SIMILARITY,
    ) -> None:
        """
        Args:
            lam: Factor of s_n where it is too similar.
            temperature, duplicate_similarity: As in `HardNegativeLoss`.
            hard_similarity: A negative that is more similar than this is too similar, whatever the positive.
        Raises:
            InputError: `lam` is below 0 or not finite, `hard_similarity` not in [-1, 1], or as in `HardNegativeLoss`.
        """
        super().__init__(temperature, duplicate_similarity=duplicate_similarity)
        self.lam = _number("lam", lam, 0.0, math.inf)
        self.hard_similarity = _number("hard_similarity", hard_similarity, -1.0, 1.0)

    def _terms(self, found: Triplets) -> tuple[Tensor, Tensor]:
        s_p, s_n = found.positive_similarity.detach(), found.negative_similarity.detach()
        pushed = found.valid & (found.hard | (s_n > self.hard_similarity))
        ranked = found.valid & (s_n < s_p) & (s_n < self.hard_similarity)
        terms = (self.lam * found.negative_similarity).where(pushed, 0.0)
        return self._triplet_terms(found).where(ranked, terms), pushed | ranked

    def extra_repr(self) -> str:
        return f"lam={self.lam:g}, hard_similarity={self.hard_similarity:g}, {super().extra_repr()}"


def _number(name: str, value: float, low: float, high: float) -> float:
    """A finite number of at least `low` and at most `high`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:
        bounds = f"of at least {low:g}" + (f" and at most {high:g}" if math.isfinite(high) else "")
        raise InputError(f"`{name}` must be a finite number {bounds}: got {value!r}.")
    return float(value)
