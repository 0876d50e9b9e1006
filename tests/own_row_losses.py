"""Metric losses of which each rank has rows of its own."""

import torch
from torch import Tensor, nn

from gcahng.distributed import Ranks


class OwnCentres(nn.Module):
    """Centres of its own on each rank, one more on each next."""

    own_rows = True

    def __init__(self, dim: int, ranks: Ranks) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(-1, 1, (2 + ranks.rank) * dim).view(-1, dim))
        self.register_buffer("rank", torch.tensor(float(ranks.rank)))

    def forward(self, z: Tensor) -> Tensor:
        return torch.cdist(z, self.centres).square().mean()


class MixedLoss(nn.Module):
    """A shared centre, one that only the first rank uses, and own ones; they start elsewhere on each rank."""

    def __init__(self, dim: int, ranks: Ranks) -> None:
        super().__init__()
        self.own = OwnCentres(dim, ranks)
        self.shared = nn.Parameter(torch.full((dim,), float(ranks.rank)))
        self.sometimes = nn.Parameter(torch.full((dim,), float(ranks.rank)))
        self.register_buffer("start", torch.tensor(float(ranks.rank)))
        self.ranks = ranks

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        loss = (z - self.shared).square().mean() + self.own(z)
        return loss + (z.detach() - self.sometimes).square().mean() if self.ranks.first else loss


class OnlyOwn(nn.Module):
    """Nothing but own centres."""

    def __init__(self, dim: int, ranks: Ranks) -> None:
        super().__init__()
        self.own = OwnCentres(dim, ranks)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.own(z)
