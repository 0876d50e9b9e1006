"""How much of the exact answer an approximate index finds, and how thoroughly it must search for a wanted share.

Shapes: Q queries, G gallery items, D embedding channels.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.metrics import nearest
from gcahng.metrics.unit_vectors import pair_scores, unit_vectors


@dataclass(frozen=True, kw_only=True)
class MeasuredRecall:
    """How much of the exact answer an index finds.

    Attributes:
        effort: Lists visited (ivf) or candidates kept (hnsw) per query; 0 for flat, which is exact.
        recall_at_k: Share of the k nearest that were found, mean over queries. What scores as much as the k-th nearest
            counts as found. None if nothing was measured at this effort.
        k: Neighbours asked for.
        num_queries: Queries it was measured on.
    """

    effort: int
    recall_at_k: float | None = None
    k: int = 0
    num_queries: int = 0


@dataclass(frozen=True, kw_only=True)
class ApproximateNeighbours:
    """Answer of an approximate search.

    Attributes:
        scores: (Q, k) float32 cosine similarities, best first; minus infinity where nothing was found.
        indices: (Q, k) int64 gallery indices, -1 where nothing was found. Equal scores: lower index first.
        measured: What the index was measured to find; its k may be another one.
    """

    scores: Tensor
    indices: Tensor
    measured: MeasuredRecall


class Searchable(Protocol):
    """What is measured: see `gcahng.search.approximate.ApproximateIndex`."""

    kind: str
    num_items: int
    dim: int
    measured: MeasuredRecall

    @property
    def effort(self) -> int: ...

    @property
    def most_effort(self) -> int: ...

    def set_effort(self, effort: int) -> None: ...

    def search(self, queries: Tensor, k: int, *, exclude: Tensor | None = None) -> ApproximateNeighbours: ...


def measured_recall(
    index: Searchable,
    queries: Tensor,
    gallery: Tensor,
    k: int = 10,
    *,
    exclude: Tensor | None = None,
    effort: int | None = None,
) -> MeasuredRecall:
    """Compare an index with exact search on queries that matter, and let its answers carry the result from now on.

    Args:
        index: Of `gallery`.
        queries: (Q, D).
        gallery: (G, D), what was indexed.
        k: Neighbours that have to be found.
        exclude: (Q,) int64, the gallery item that a query must not find, -1 for none.
        effort: To be set before; as it is by default.

    Raises:
        InputError: Shapes do not fit each other or the index, or k or the effort is out of range.
    """
    if effort is not None:
        index.set_effort(effort)
    index.measured = measure(index, queries, gallery, k, exclude=exclude)
    return index.measured


def measure(
    index: Searchable, queries: Tensor, gallery: Tensor, k: int, *, exclude: Tensor | None = None
) -> MeasuredRecall:
    """The same; the index keeps what it had. Arguments and errors as for `measured_recall`."""
    return _Exact.of(index, queries, gallery, k, exclude).compare(index)


def tune(
    index: Searchable,
    queries: Tensor,
    gallery: Tensor,
    k: int = 10,
    *,
    recall: float = 0.95,
    exclude: Tensor | None = None,
) -> MeasuredRecall:
    """Set the least effort that finds the wanted share of the k nearest of some queries.

    Args:
        index: Of `gallery`; its effort and what was measured change.
        queries: (Q, D), a sample: a few hundred are enough.
        gallery: (G, D), what was indexed.
        k: Neighbours that have to be found.
        recall: Wanted recall at k, above 0, at most 1.
        exclude: (Q,) int64, the gallery item that a query must not find, -1 for none.

    Returns:
        What was measured at the chosen effort.

    Raises:
        InputError: As for `measured_recall`; or the wanted recall is out of reach, and the effort is left as it was.
    """
    if not 0 < recall <= 1:
        raise InputError(f"`recall` must lie above 0 and be at most 1: got {recall!r}.")
    exact = _Exact.of(index, queries, gallery, k, exclude)
    if index.kind == "flat":
        index.measured = exact.compare(index)
        return index.measured
    before, measured_before = index.effort, index.measured
    missed, tried = 0, 1
    while (found := exact.share_at(index, tried)) < recall:
        if tried == index.most_effort:
            index.set_effort(before)
            index.measured = measured_before
            raise InputError(
                f"`recall` is out of reach for kind {index.kind!r}: expected {recall} at k = {k}, got {found:.4f} with "
                f"the largest effort, {tried}. Ask for less, or use kind 'ivf' or 'flat'."
            )
        missed, tried = tried, min(2 * tried, index.most_effort)
    while tried - missed > 1:
        middle = (missed + tried) // 2
        if exact.share_at(index, middle) < recall:
            missed = middle
        else:
            tried = middle
    index.set_effort(tried)
    index.measured = exact.compare(index)
    return index.measured


@dataclass(frozen=True)
class _Exact:
    """The exact answer to some queries.

    Attributes:
        queries: (Q, D) as given.
        gallery: (G, D) as given.
        k: Neighbours.
        exclude: (Q,) or None.
        last: (Q,) int64, the k-th nearest item of each query.
    """

    queries: Tensor
    gallery: Tensor
    k: int
    exclude: Tensor | None
    last: Tensor

    @classmethod
    def of(cls, index: Searchable, queries: Tensor, gallery: Tensor, k: int, exclude: Tensor | None) -> "_Exact":
        if tuple(gallery.shape) != (index.num_items, index.dim):
            raise InputError(
                f"`gallery` must be what was indexed: expected shape ({index.num_items}, {index.dim}), got "
                f"{tuple(gallery.shape)}. Pass the same embeddings."
            )
        _, indices = nearest(queries, gallery, k, exclude=exclude)
        return cls(queries, gallery, k, exclude, indices[:, -1].cpu().contiguous())

    def compare(self, index: Searchable) -> MeasuredRecall:
        """What the index finds of it at its effort."""
        share = self._share_found(index)
        return MeasuredRecall(effort=index.effort, recall_at_k=share, k=self.k, num_queries=len(self.queries))

    def share_at(self, index: Searchable, effort: int) -> float:
        """Recall at k at another effort, which stays set."""
        index.set_effort(effort)
        return self._share_found(index)

    def _share_found(self, index: Searchable) -> float:
        """Recall at k. Scores are compared exactly, so that equal ones count alike."""
        found = index.search(self.queries, self.k, exclude=self.exclude).indices
        rows, places = (found >= 0).nonzero(as_tuple=True)
        columns = found[rows, places]
        needed = torch.cat([columns, self.last]).unique()
        unit_queries = unit_vectors(self.queries.cpu())
        unit_gallery = unit_vectors(self.gallery[needed.to(self.gallery.device)].cpu())

        def scores(of: Tensor, items: Tensor) -> Tensor:
            return pair_scores(unit_queries, unit_gallery, of, torch.searchsorted(needed, items))

        least = scores(torch.arange(len(self.last)), self.last)
        hits = int((scores(rows, columns) >= least[rows]).sum())
        return hits / (len(self.queries) * self.k)
