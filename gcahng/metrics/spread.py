"""How far the embeddings of a batch are spread out: what a collapse to a point, or to few directions, shows in.

All is of L2-normalised embeddings, which retrieval compares.

Letters: B samples, D channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Samples that the effective rank is taken of: the eigenvalues of a larger matrix would take longer than a step. It
# matters where both B and D are larger.
MOST_SAMPLES = 1024


def relative_std(z: Tensor) -> Tensor:
    """Standard deviation of unit embeddings over the batch, mean over channels, times sqrt(D): a scalar.

    1 for a uniform sphere, where a channel's is 1 / sqrt(D); 0 where all embeddings point the same way.

    Args:
        z: (B, D).
    """
    return F.normalize(z, dim=1).std(0, correction=0).mean() * z.shape[1] ** 0.5


def scatter_matrix(z: Tensor) -> Tensor:
    """(m, m) float64, m = min(B, D): products of the centred unit embeddings, between channels or between samples.

    Its eigenvalues are the squared singular values of those embeddings. In float64: rounding in float32 alone would
    look like many small singular values.

    Args:
        z: (B, D); of more than `MOST_SAMPLES` the first ones count.
    """
    unit = F.normalize(z[:MOST_SAMPLES].double(), dim=1)
    centred = unit - unit.mean(0)
    return centred.t() @ centred if centred.shape[0] > centred.shape[1] else centred @ centred.t()


def effective_rank(scatter: Tensor) -> float:
    """exp of the entropy of the singular values, divided by their sum (Roy and Vetterli, EUSIPCO 2007).

    From 1 (all on a line) to min(B - 1, D) (spread alike in as many directions); 0 where all embeddings are the same.

    Args:
        scatter: From `scatter_matrix`, on the CPU: finding eigenvalues makes the host wait for a device.
    """
    singular = torch.linalg.eigvalsh(scatter).clamp_min(0).sqrt()
    total = singular.sum()
    if total == 0:
        return 0.0
    shares = singular / total
    return float(torch.special.entr(shares).sum().exp())
