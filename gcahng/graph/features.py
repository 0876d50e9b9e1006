"""What the graph makes of embeddings before the first layer."""

import torch
from torch import Tensor


def unit_centred(z: Tensor) -> Tensor:
    """Embeddings (B, D) centred over their channels and scaled to unit length.

    An embedding that is constant but for rounding (length at most 1e-12, or a few roundings of its own length) becomes
    zero with zero gradient; the released code divides 0, or noise, by 0 there.
    """
    centred = z - z.mean(1, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    rounding = 4 * torch.finfo(z.dtype).eps * torch.linalg.vector_norm(z.detach(), dim=1, keepdim=True)
    usable = length > rounding.clamp_min(1e-12)
    return torch.where(usable, centred / torch.where(usable, length, torch.ones_like(length)), 0.0)
