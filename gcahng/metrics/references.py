"""The same-class gallery items of every query, and how many others are ahead of each.

Letters: q queries, m references of all of them together, R references of one, G gallery items.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.metrics.unit_vectors import all_scores, pair_scores

UNRANKED = 2**62
"""Rank of a reference that lies beyond the depth asked for."""

# Classes from this size on are scored as a product, smaller ones pair by pair.
_LARGE_CLASS = 64
_ENTRIES_AT_ONCE = 1 << 22
# Rank up to which listing what is ahead of a first reference costs less than comparing it with the whole gallery.
_FIRST_DEPTH = 128


def counts_to_offsets(counts: Tensor) -> Tensor:
    """(n,) lengths to (n + 1,) starts of ragged rows."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def ragged_positions(starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Row of each entry, and starts[row], starts[row] + 1, ...: (sum of sizes,) int64 both."""
    rows = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    within = torch.arange(len(rows), device=sizes.device) - counts_to_offsets(sizes)[rows]
    return rows, starts[rows] + within


@dataclass(frozen=True)
class ClassIndex:
    """A gallery by class: class c's items, ascending, are `by_class[start : stop]` where `labels` holds c.

    Attributes:
        labels: (G,) sorted labels.
        by_class: (G,) int64.
    """

    labels: Tensor
    by_class: Tensor

    @classmethod
    def build(cls, labels: Tensor) -> "ClassIndex":
        """Sort (G,) int64 labels."""
        return cls(*labels.sort(stable=True))

    def find(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(q,) start and (q,) size of each label's items."""
        start = torch.searchsorted(self.labels, labels)
        return start, torch.searchsorted(self.labels, labels, right=True) - start


@dataclass(frozen=True)
class ScoredReferences:
    """References found in one part of the gallery, in any order.

    Attributes:
        query: (m,) int64 position of the query.
        score: (m,) float64, exact.
        index: (m,) int64 gallery index.
    """

    query: Tensor
    score: Tensor
    index: Tensor


def score_references(
    queries: Tensor,
    labels: Tensor,
    gallery: Tensor,
    classes: ClassIndex,
    *,
    first_index: int = 0,
    own_index: Tensor | None = None,
) -> ScoredReferences:
    """Exact scores of queries with their references.

    Args:
        queries: (q, D) unit vectors.
        labels: (q,) int64.
        gallery: (G or more, D) unit vectors.
        classes: Of the gallery.
        first_index: Gallery index of the gallery's first item.
        own_index: (q,) gallery index of the query itself, which is no reference; None: none is in the gallery.
    """
    start, size = classes.find(labels)
    large = size >= _LARGE_CLASS
    parts = [_score_pairs(queries, gallery, classes, start, torch.where(large, 0, size))]
    for label in labels[large].unique().tolist():
        parts += _score_class(queries, gallery, classes, (labels == label).nonzero().squeeze(1), start, size)
    query, score, index = (torch.cat(found) for found in zip(*parts, strict=True))
    index = index + first_index
    if own_index is not None:
        others = index != own_index[query]
        query, score, index = query[others], score[others], index[others]
    return ScoredReferences(query, score, index)


Found = tuple[Tensor, Tensor, Tensor]


def _score_pairs(queries: Tensor, gallery: Tensor, classes: ClassIndex, start: Tensor, size: Tensor) -> Found:
    rows, positions = ragged_positions(start, size)
    members = classes.by_class[positions]
    return rows, pair_scores(queries, gallery, rows, members), members


def _score_class(
    queries: Tensor, gallery: Tensor, classes: ClassIndex, rows: Tensor, start: Tensor, size: Tensor
) -> list[Found]:
    """All pairs of the given queries, which are of one class, with its items."""
    begin, count = int(start[rows[0]]), int(size[rows[0]])
    members = classes.by_class[begin : begin + count]
    vectors, found = gallery[members].double(), []
    for part in rows.split(max(1, _ENTRIES_AT_ONCE // count)):
        scores = all_scores(queries[part], vectors)
        found.append((part.repeat_interleave(count), scores.flatten(), members.repeat(len(part))))
    return found


class ReferenceRanks:
    """Counts, for queries and all their references, the items of other classes ahead of each reference.

    Ranks beyond a query's depth are not wanted, except that of its first reference. As counts grow, references that
    are surely beyond are dropped, and fewer and fewer items have to be looked at; a query whose first reference is
    beyond is `far`: it is left to `count_far` of `gcahng.metrics.counting`. Counts of one query taken in several parts
    of the gallery may be added up: what one part dropped lies beyond the depth in the sum too.

    Attributes:
        labels: (q,) int64.
        offset: (q + 1,) where the references of each query begin.
        score: (m,) float64 exact scores, descending within a query.
        index: (m,) gallery indices, ascending among equal scores.
        ahead: (m,) int64: at the reference j of a query, counted items of other classes between j - 1 and j.
        depth: (q,) ranks up to which every reference is wanted.
        far: (q,) whether the first reference is beyond the depth, and not counted to its end.
    """

    def __init__(self, labels: Tensor, found: ScoredReferences, depth: Tensor, wanted: Tensor | None = None) -> None:
        """
        Args:
            labels: (q,) int64.
            found: References of all parts of the gallery.
            depth: (q,) int64.
            wanted: (q,) int64 number of best references to look for; all by default.
        """
        order = found.index.argsort(stable=True)
        order = order[found.score[order].argsort(descending=True, stable=True)]
        order = order[found.query[order].argsort(stable=True)]
        self.labels = labels
        self.offset = counts_to_offsets(torch.bincount(found.query, minlength=len(labels)))
        self.score, self.index = found.score[order], found.index[order]
        self.ahead = torch.zeros_like(self.index)
        self.depth = depth
        self.far = torch.zeros_like(labels, dtype=torch.bool)
        # Of the references still looked for.
        self._end = self.offset[1:].clone() if wanted is None else self.offset[:-1] + wanted

    @property
    def num_references(self) -> Tensor:
        """(q,) int64, R."""
        return self.offset.diff()

    @property
    def wanted(self) -> Tensor:
        """(q,) int64 number of best references that are still looked for."""
        return self._end - self.offset[:-1]

    def part(self, start: int, stop: int) -> "ReferenceRanks":
        """Some of the queries, with nothing counted."""
        part = slice(int(self.offset[start]), int(self.offset[stop]))
        counts = self.num_references[start:stop]
        query = torch.arange(stop - start, device=counts.device).repeat_interleave(counts)
        found = ScoredReferences(query, self.score[part], self.index[part])
        return ReferenceRanks(self.labels[start:stop], found, self.depth[start:stop], self.wanted[start:stop])

    def thresholds(self, start: int, stop: int) -> Tensor:
        """(stop - start,) float64 scores from which on items matter to those queries; infinite where none does."""
        end, begin = self._end[start:stop], self.offset[start:stop]
        if len(self.score) == 0:
            return torch.full_like(end, torch.inf, dtype=torch.float64)
        return torch.where(end > begin, self.score[(end - 1).clamp_min(0)], torch.inf)

    def behind(self, query: Tensor, score: Tensor) -> Tensor:
        """Where an item stands: position of the first reference looked for that scores as much or less.

        Args:
            query: (c,) positions of queries.
            score: (c,) float64.
        Returns:
            (c,) int64 positions in `score`; past the last one looked for where there is none.
        """
        return self._search(query, lambda at: self.score[at] > score)

    def reaches(self, query: Tensor, position: Tensor, score: Tensor) -> Tensor:
        """(c,) whether there is a reference looked for at (c,) positions and it scores as much as (c,) scores."""
        return (position < self._end[query]) & (self.score[position.clamp_max(len(self.score) - 1)] >= score)

    def behind_exactly(self, query: Tensor, score: Tensor, index: Tensor) -> Tensor:
        """The same for exact scores, where (c,) gallery indices decide between equal ones."""
        return self._search(
            query, lambda at: (self.score[at] > score) | ((self.score[at] == score) & (self.index[at] < index))
        )

    def _search(self, query: Tensor, is_ahead: Callable[[Tensor], Tensor]) -> Tensor:
        """Binary search of every query's own stretch."""
        low, high = self.offset[query], self._end[query]
        if len(query) == 0:
            return low
        last = len(self.score) - 1
        for _ in range(int((high - low).amax()).bit_length()):
            at = (low + high) // 2
            ahead = is_ahead(at.clamp_max(last)) & (low < high)
            low, high = torch.where(ahead, at + 1, low), torch.where(ahead, high, at)
        return low

    def add(self, query: Tensor, position: Tensor) -> None:
        """Count items of other classes that stand right before the references at (c,) positions."""
        counted = position[position < self._end[query]]
        self.ahead.index_add_(0, counted, torch.ones_like(counted))

    def drop(self, start: int, stop: int) -> None:
        """Look no longer for references of some queries that are surely beyond the depth."""
        begin, sizes = self.offset[start:stop], self.offset[start + 1 : stop + 1] - self.offset[start:stop]
        ranks = self._ranks(start, stop)
        query = torch.arange(len(sizes), device=ranks.device).repeat_interleave(sizes)
        depth = self.depth[start:stop][query]
        is_first = torch.arange(len(ranks), device=ranks.device) == (begin - self.offset[start])[query]
        depth = torch.where(is_first, depth.clamp_min(_FIRST_DEPTH), depth)
        near = torch.zeros_like(sizes).index_add_(0, query, (ranks <= depth).to(sizes.dtype))
        self._end[start:stop] = torch.minimum(self._end[start:stop], begin + near)
        self.far[start:stop] |= (near == 0) & (sizes > 0)

    def _ranks(self, start: int, stop: int) -> Tensor:
        """Ranks from 1 of the references of some queries, right where all before them was counted."""
        begin, end = int(self.offset[start]), int(self.offset[stop])
        sizes = self.offset[start + 1 : stop + 1] - self.offset[start:stop]
        total = counts_to_offsets(self.ahead[begin:end])
        first = (self.offset[start:stop] - begin).repeat_interleave(sizes)
        place = torch.arange(end - begin, device=first.device)
        return total[1:] - total[first] + place - first + 1

    def ranks(self) -> Tensor:
        """(m,) int64 ranks from 1; `UNRANKED` beyond the depth, the first of each query excepted."""
        ranks = self._ranks(0, len(self.labels))
        sizes = self.num_references
        beyond = ranks > self.depth.repeat_interleave(sizes)
        beyond[self.offset[:-1][sizes > 0]] = False
        return torch.where(beyond, UNRANKED, ranks)
