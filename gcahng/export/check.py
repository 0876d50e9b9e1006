"""Whether an exported file computes what the model computes."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.errors import InputError

TOLERANCE = 1e-4
"""Largest difference of an entry, as a share of the largest entry of its embedding.

Two runtimes add up the same float32 products in other orders: a sum of n products is then off by about sqrt(n) 2**-24,
4e-6 for the 4,608 products of a 3 x 3 convolution over 512 channels, and the errors of some 50 layers add up like
random steps to 3e-5. A graph that is wrong (another pooling, BatchNorm by the statistics of the batch, a missing
normalisation) is off by a hundred times more.
"""


@dataclass(frozen=True)
class Agreement:
    """How far embeddings of a file are from those of the model.

    Attributes:
        what: Which images, in words.
        difference: Largest difference of an entry, as a share of the largest entry of its embedding.
        cosine: Smallest cosine between the two embeddings of an image.
    """

    what: str
    difference: float
    cosine: float

    def __str__(self) -> str:
        return f"{self.what}: largest difference {self.difference:.1e} of the largest entry, cosine {self.cosine:.7f}"


def agreement(what: str, expected: Tensor, got: Tensor, tolerance: float = TOLERANCE) -> Agreement:
    """Compare embeddings.

    Args:
        what: Which images, in words.
        expected: (B, D) of the model.
        got: Of the file.
        tolerance: See `TOLERANCE`.
    Raises:
        InputError: They differ by more, are of another shape or type, or the model's are not finite.
    """
    if not bool(torch.isfinite(expected).all()):
        raise InputError(f"Embeddings of {what} are not finite: the checkpoint diverged. Use another one.")
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise InputError(
            f"The exported file must give embeddings of {what} as the model does: expected {tuple(expected.shape)} "
            f"{expected.dtype}, got {tuple(got.shape)} {got.dtype}. Export with another --format."
        )
    want, have = expected.double(), got.double()
    largest = want.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    found = Agreement(
        what,
        float(((have - want).abs().amax(dim=1) / largest).amax()),
        float(F.cosine_similarity(have, want, dim=1).amin()),
    )
    if not found.difference <= tolerance:  # written so that NaN is refused
        raise InputError(
            f"The exported file differs from the model by more than the tolerance {tolerance:.1e}. {found}. Nothing "
            "was written. Export with another --format, or accept it with --tolerance."
        )
    return found
