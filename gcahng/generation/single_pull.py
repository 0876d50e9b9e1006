"""Single-coefficient interpolation for some anchors at a time: lambda = 1, the pull is exp(-alpha / mean metric loss).

One number per pair takes the place of D: with r_ij the share of the way and s_g the fusion share of the negative's
group, synthetic_{i,p} = (1 - sum_g s_g r_{i,gp}) z_i + sum_g s_g r_{i,gp} z_gp, a product of matrices. It is what
`gcahng.generation.generate_negatives` makes without coefficients.

Letters: B = P * K samples group-major, P classes, K samples per class, D channels, a anchors at a time.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gcahng.generation.fusion import fusion_shares
from gcahng.generation.interpolation import distance, positive_distances, way_shares
from gcahng.generation.synthesis import Synthesis

# Numbers in the largest tensor that a chunk of anchors makes; one anchor at a time where one alone makes more. Our
# choice: 64 MB in float32. The batches of the papers (B * P <= 3200 entries of 2048 channels) are one chunk.
CHUNK_NUMBERS = 1 << 24


class SinglePull:
    """The synthetic negatives of a batch, for any range of its anchors; gradient flows to the embeddings.

    Args:
        z: (B, D), group-major.
        synthesis: The pass's.
    """

    def __init__(self, z: Tensor, synthesis: Synthesis) -> None:
        self.z = z
        self.num_samples = synthesis.num_samples
        self.num_classes = z.shape[0] // synthesis.num_samples
        self._rule = synthesis.rule
        self._points = synthesis.rule.distance_space(z)
        self._near = positive_distances(self._points, self.num_samples)
        self._shares = fusion_shares(synthesis.weights.to(z))

    def negatives(self, anchors: slice) -> Tensor:
        """(a, P, D) synthetic negatives of a range of anchors, the own class's entry included."""
        z, num_classes = self.z, self.num_classes
        far = distance(self._points[anchors, None] - self._points)
        pull = z.new_full((1,), self._rule.factor)
        way = way_shares(self._near[anchors, None], far, pull)[..., 0]
        group = torch.arange(anchors.start, anchors.stop, device=z.device) // num_classes
        weights = self._shares[group][:, :, None] * way.view(-1, self.num_samples, num_classes)
        fused = torch.einsum("agp,gpd->apd", weights, z.view(self.num_samples, num_classes, -1))
        return torch.addcmul(fused, 1 - weights.sum(1)[..., None], z[anchors, None])

    def sum_over(self, part: Callable[[slice], Tensor], width: int, share: tuple[int, int]) -> Tensor:
        """The sum of `part` over ranges of the anchors of one process, none of them larger than memory bears.

        Several ranges are computed again in the backward pass, one after the other, instead of being kept.

        Args:
            part: From a range of anchors to a tensor of one shape, without drawing random numbers.
            width: Most channels of an entry (anchor, class) in `part`.
            share: (rank, W).
        """
        ranges = list(self._ranges(max(width, self.z.shape[1]), share))
        if len(ranges) == 1:
            return part(ranges[0])
        parts = [checkpoint(part, some, use_reentrant=False, preserve_rng_state=False) for some in ranges]
        return torch.stack(parts).sum(0)

    def _ranges(self, width: int, share: tuple[int, int]) -> Iterator[slice]:
        """Ranges of anchors; a process has at least one anchor, for it holds a class or more of the batch."""
        rank, size = share
        batch, dim = self.z.shape
        start, stop = batch * rank // size, batch * (rank + 1) // size
        count = max(1, CHUNK_NUMBERS // max(self.num_classes * width, batch * dim))
        pieces = -(-(stop - start) // count)
        for piece in range(pieces):
            yield slice(
                start + (stop - start) * piece // pieces,
                start + (stop - start) * (piece + 1) // pieces,
            )
