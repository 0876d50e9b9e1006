"""Who is ranked where: a deterministic top-k, the references of a query, the first hit.

One order everywhere: higher score first, among equal scores the lower gallery index first.

Shapes: q some queries, Q all queries, G gallery items, T ranks looked at.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of a working table (q, T): about 100 MB of values, indices and masks.
_TABLE_ENTRIES = 1 << 22


def rows_per_table(width: int) -> int:
    """Queries to rank together so that a table of that width stays small."""
    return max(1, _TABLE_ENTRIES // max(1, width))


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Gallery indices of each query's `count` best scores, best first.

    Args:
        scores: (q, G).
        count: 1 <= count <= G.

    Returns:
        (q, count) int64.
    """
    num_columns = scores.shape[1]
    # One rank more than asked for tells whether equal scores lie on both sides of the cut.
    values, indices = scores.topk(min(count + 1, num_columns), dim=1)
    chosen = indices[:, :count]
    if count < num_columns:
        crowded = (values[:, count - 1] == values[:, count]).nonzero().flatten()
        for rows in crowded.split(rows_per_table(num_columns)):
            chosen[rows] = _lowest_indices(scores[rows], values[rows, count - 1 : count], count)
    # torch.topk promises no order among equal scores; a stable sort of ascending indices does.
    chosen = chosen.sort(dim=1).values
    order = scores.gather(1, chosen).sort(dim=1, descending=True, stable=True).indices
    return chosen.gather(1, order)


def _lowest_indices(scores: Tensor, cut: Tensor, count: int) -> Tensor:
    """The `count` best indices, ascending, where the lowest indices at the cut are kept.

    Args:
        scores: (q, G).
        cut: (q, 1), the `count`-th best score of each row.
        count: Indices kept per row.
    """
    above = scores > cut
    level = scores == cut
    missing = count - above.sum(dim=1, keepdim=True)
    kept = above | (level & (level.cumsum(dim=1, dtype=torch.int32) <= missing))
    return kept.nonzero()[:, 1].view(len(scores), count)


@dataclass(frozen=True, kw_only=True)
class References:
    """The same-class gallery items of every query, without a Q x G table.

    `by_class` lists the gallery by class, ascending inside a class; query i's class is
    `by_class[start[i] : start[i] + size[i]]`. In self-retrieval that includes the query.
    """

    by_class: Tensor  # (G,) int64
    start: Tensor  # (Q,) int64
    size: Tensor  # (Q,) int64

    @classmethod
    def build(cls, query_labels: Tensor, gallery_labels: Tensor) -> "References":
        """Group the gallery by class: (Q,) and (G,) int64 labels."""
        sorted_labels, by_class = gallery_labels.sort(stable=True)
        start = torch.searchsorted(sorted_labels, query_labels)
        stop = torch.searchsorted(sorted_labels, query_labels, right=True)
        return cls(by_class=by_class, start=start, size=stop - start)

    def best(self, queries: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Score and gallery index of the best-ranked reference of some queries.

        Args:
            queries: (q,) indices of queries, each with at least one reference.
            scores: (q, G) their scores; the query itself at minus infinity.

        Returns:
            (q, 1) scores and (q, 1) int64 indices.
        """
        size = self.size[queries].unsqueeze(1)
        offset = torch.arange(int(size.max()), device=queries.device)
        # Beyond its class a query looks at its own first item again, which changes no maximum.
        offset = torch.where(offset < size, offset, 0)
        members = self.by_class[self.start[queries].unsqueeze(1) + offset]
        member_scores = scores.gather(1, members)
        score = member_scores.amax(dim=1, keepdim=True)
        index = torch.where(member_scores == score, members, scores.shape[1])
        return score, index.amin(dim=1, keepdim=True)


def rank_of(scores: Tensor, score: Tensor, index: Tensor) -> Tensor:
    """Rank, from 1, of one gallery item per query, by counting the items ahead of it.

    Args:
        scores: (q, G).
        score: (q, 1) score of the item.
        index: (q, 1) gallery index of the item.

    Returns:
        (q,) int64.
    """
    ahead = _count(scores > score)
    # Ties are rare: the second pass over the row is spared where there is none.
    tied = (_count(scores >= score) > ahead + 1).nonzero().flatten()
    if len(tied):
        columns = torch.arange(scores.shape[1], device=scores.device)
        level = (scores[tied] == score[tied]) & (columns < index[tied])
        ahead[tied] += _count(level)
    return ahead + 1


def _count(mask: Tensor) -> Tensor:
    """True entries per row; several times faster than summing booleans to int64."""
    return mask.view(torch.uint8).sum(dim=1, dtype=torch.int32).to(torch.int64)
