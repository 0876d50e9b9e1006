"""Retrieval metrics over ranks: each rank brings its part of the embeddings, all get the same result.

The gallery stays where it is: a rank holds its part, queries go round in blocks, counts and short lists come back.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gcahng.distributed.agreement import agreed
from gcahng.distributed.ranks import Ranks
from gcahng.metrics import RetrievalResult, retrieval
from gcahng.metrics.exchange import ALONE, Exchange

Found = TypeVar("Found")


def retrieval_over_ranks(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    ranks: Ranks,
    **options: Any,
) -> RetrievalResult:
    """As `gcahng.metrics.retrieval`; each rank passes a stretch of the queries and of the gallery, in order of ranks.

    Args:
        query: (n, D) this rank's embeddings; a rank may have none.
        query_labels: (n,) integer classes.
        gallery: (g, D) this rank's part, or None on all ranks for self-retrieval.
        gallery_labels: (g,) integer classes, exactly when there is a gallery.
        ks: Ranks for `recall_at_k`.
        ranks: Who takes part; all of them call this.
        options: Further arguments of `gcahng.metrics.retrieval`, the same on every rank.
    Returns:
        The result of the whole, bit for bit the same on every rank and for any number of ranks.
    Raises:
        InputError: See `gcahng.metrics.retrieval`; on all ranks, whichever has the fault.
    """
    exchange = exchange_of(ranks)
    return retrieval(query, query_labels, gallery, gallery_labels, ks, exchange=exchange, **options)


def exchange_of(ranks: Ranks) -> Exchange:
    """What a search that is split over ranks needs of them."""
    return ALONE if ranks.size == 1 else _RankExchange(ranks)


class _RankExchange:
    """Collectives of the group that has the embeddings."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.part, self.parts = ranks.rank, ranks.size

    def agree(self, action: Callable[[], Found]) -> Found:
        return agreed(self._ranks, action)

    def share(self, own: Tensor | None, owner: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        sent = torch.empty(shape, dtype=dtype, device=self._device) if own is None else own.contiguous()
        dist.broadcast(sent, group_src=owner, group=self._ranks.group)
        return sent

    def everyone(self, own: Tensor) -> list[Tensor]:
        sizes = [0] * self.parts
        dist.all_gather_object(sizes, len(own), group=self._ranks.host_group)
        padded = own.new_zeros((max(sizes), *own.shape[1:]))
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=self._ranks.group)
        return [values[:size] for values, size in zip(found, sizes, strict=True)]

    def sum(self, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total, group=self._ranks.group)
        return total

    @property
    def _device(self) -> torch.device:
        """Where the group's tensors are."""
        on_device = dist.get_backend(self._ranks.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")
