"""Recall@k, R-Precision and MAP@R by exact cosine search, never with a Q x G table.

Shapes: Q queries, q the queries of a chunk, G gallery items, D embedding channels, R references of
a query (same-class gallery items, itself excluded), T ranks looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.metrics import checks, ranking, scores


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Shares in [0, 1], averaged over the queries that have a reference; tensors on the CPU.

    Values of single queries that have no reference are NaN (shares) or 0 (ranks); no mean contains
    them.
    """

    recall_at_k: dict[int, float]
    """Share of queries with at least one same-class item among the k nearest."""
    r_precision: float
    """Share of same-class items among the R nearest."""
    map_at_r: float
    """Sum of the precision at each rank r <= R that holds a same-class item, divided by R."""
    num_queries: int
    """All queries, those without a reference included."""
    num_without_reference: int
    """Queries that no gallery item can answer."""
    without_reference: Tensor
    """(num_without_reference,) int64, their indices, ascending."""
    num_references: Tensor
    """(Q,) int64, R of each query."""
    first_hit_rank: Tensor
    """(Q,) int64, rank (from 1) of the best-ranked reference; 0 without a reference."""
    query_r_precision: Tensor
    """(Q,) float64."""
    query_map_at_r: Tensor
    """(Q,) float64."""
    neighbours: Tensor | None = None
    """(Q, num_neighbours) int64 gallery indices, nearest first, where asked for."""


@torch.no_grad()
def retrieval(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    num_neighbours: int = 0,
    chunk_size: int = scores.TILE_ROWS,
) -> RetrievalResult:
    """Rank a gallery for every query by cosine similarity and average the benchmark's metrics.

    Without a gallery every query searches all the other queries: it is left out by its index, so
    other images with the same embedding stay. Equal scores: the lower gallery index comes first.
    Queries without a reference are counted, listed and left out of every mean.

    R-Precision and MAP@R follow "A Metric Learning Reality Check" (ECCV 2020): both divide by R,
    not by the hits found. Memory is `chunk_size` times G scores beside one normalised copy of the
    embeddings; results do not depend on `chunk_size`.

    Args:
        query: (Q, D) embeddings, normalised here. Scores are float64 for float64 embeddings and
            full float32 otherwise, whatever autocast or TF32 setting is active.
        query_labels: (Q,) integer classes.
        gallery: (G, D) embeddings, or None for self-retrieval.
        gallery_labels: (G,) integer classes, exactly when there is a gallery.
        ks: Ranks for `recall_at_k`.
        num_neighbours: Gallery indices to return per query; 0 for none.
        chunk_size: Queries scored at a time, rounded up to a multiple of 192.

    Returns:
        The means, and the values of each query.

    Raises:
        InputError: an argument breaks the contract above, a k exceeds the candidates of a query,
            or no query has a reference.
    """
    search = _Search.prepare(query, query_labels, gallery, gallery_labels)
    ks = checks.check_ranks("ks", ks, search.num_candidates)
    if num_neighbours != 0:
        checks.check_ranks("num_neighbours", [num_neighbours], search.num_candidates)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise InputError(
            f"`chunk_size` must be a positive integer: got {chunk_size!r}. "
            f"Leave it at {scores.TILE_ROWS} or raise it where memory allows."
        )
    table = _QueryTable.empty(len(query), num_neighbours, query.device)
    with scores.full_precision():
        for queries, row_scores in search.chunks(chunk_size, everything=num_neighbours > 0):
            _rank_chunk(search, queries, row_scores, num_neighbours, table)
    return _average(search, table, ks)


@dataclass(frozen=True, kw_only=True)
class _Search:
    """Checked, normalised inputs of one evaluation."""

    unit_queries: Tensor  # (Q or more, D); the tensor `unit_gallery` itself in self-retrieval
    unit_gallery: Tensor  # (G rounded up to tiles, D)
    query_labels: Tensor  # (Q,)
    gallery_labels: Tensor  # (G,)
    references: ranking.References
    num_references: Tensor  # (Q,)
    is_self: bool

    @property
    def num_candidates(self) -> int:
        """Gallery items that a query can find."""
        return len(self.gallery_labels) - int(self.is_self)

    @classmethod
    def prepare(
        cls,
        query: Tensor,
        query_labels: Tensor,
        gallery: Tensor | None,
        gallery_labels: Tensor | None,
    ) -> "_Search":
        checks.check_embeddings("query", query)
        query_labels = checks.check_labels("query_labels", query_labels, "query", query)
        if (gallery is None) != (gallery_labels is None):
            given, missing = ("gallery", "gallery_labels")[:: 1 if gallery_labels is None else -1]
            raise InputError(
                f"`gallery` and `gallery_labels` go together: got `{given}` without `{missing}`. "
                "Pass both, or neither for self-retrieval."
            )
        checks.check_finite("query", query)
        if gallery is None or gallery_labels is None:
            gallery_labels = query_labels
            num_rows = scores.round_up(len(query), scores.TILE_COLUMNS)
            unit_queries = unit_gallery = scores.normalise(query, num_rows)
        else:
            checks.check_embeddings("gallery", gallery)
            checks.check_pair(query, gallery)
            checks.check_finite("gallery", gallery)
            gallery_labels = checks.check_labels("gallery_labels", gallery_labels, "gallery", gallery)
            num_rows = scores.round_up(len(gallery), scores.TILE_COLUMNS)
            dtype = torch.promote_types(query.dtype, gallery.dtype)
            unit_queries = scores.normalise(query.to(dtype), len(query))
            unit_gallery = scores.normalise(gallery.to(dtype), num_rows)
        references = ranking.References.build(query_labels, gallery_labels)
        is_self = unit_queries is unit_gallery
        num_references = references.size - int(is_self)
        if not bool((num_references > 0).any()):
            raise InputError(
                f"no query has a same-class item to find: got {len(query)} queries and "
                f"{len(gallery_labels)} gallery items without a pair of one class. Check that "
                "both sides number the classes alike."
            )
        return cls(
            unit_queries=unit_queries,
            unit_gallery=unit_gallery,
            query_labels=query_labels,
            gallery_labels=gallery_labels,
            references=references,
            num_references=num_references,
            is_self=is_self,
        )

    def chunks(self, chunk_size: int, *, everything: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield query indices (q,) and their scores (q, G), the buffer being used again.

        Queries come by ascending R, so that the few queries of a very large class are ranked
        together and do not make the tables of all the others wide. Queries without a reference
        are left out unless `everything` is set.
        """
        size = scores.round_up(chunk_size, scores.TILE_ROWS)
        size = min(size, scores.round_up(len(self.query_labels), scores.TILE_ROWS))
        rows = self.unit_queries.new_zeros((size, self.unit_queries.shape[1]))
        buffer = rows.new_empty((size, len(self.unit_gallery)))
        order = self.num_references.argsort(stable=True)
        if not everything:
            order = order[self.num_references[order] > 0]
        for queries in order.split(size):
            # A short last chunk scores old rows behind its own; they are not looked at.
            rows[: len(queries)] = self.unit_queries[queries]
            height = scores.round_up(len(queries), scores.TILE_ROWS)
            scores.score_rows(rows[:height], self.unit_gallery, buffer[:height])
            chunk = buffer[: len(queries), : len(self.gallery_labels)]
            if self.is_self:
                chunk[torch.arange(len(queries), device=queries.device), queries] = -torch.inf
            yield queries, chunk


@dataclass(frozen=True, kw_only=True)
class _QueryTable:
    """Values of single queries, filled chunk by chunk."""

    first_hit_rank: Tensor
    r_precision: Tensor
    map_at_r: Tensor
    neighbours: Tensor

    @classmethod
    def empty(cls, num_queries: int, num_neighbours: int, device: torch.device) -> "_QueryTable":
        share = torch.full((num_queries,), torch.nan, dtype=torch.float64, device=device)
        return cls(
            first_hit_rank=torch.zeros(num_queries, dtype=torch.int64, device=device),
            r_precision=share,
            map_at_r=share.clone(),
            neighbours=torch.zeros((num_queries, num_neighbours), dtype=torch.int64, device=device),
        )


def _rank_chunk(search: _Search, queries: Tensor, row_scores: Tensor, num_neighbours: int, table: _QueryTable) -> None:
    """Rank one chunk, (q,) queries by ascending R with (q, G) scores, into the table."""
    widest = max(int(search.num_references[queries[-1]]), num_neighbours)
    step = ranking.rows_per_table(widest)
    for part, part_scores in zip(queries.split(step), row_scores.split(step), strict=True):
        _rank_slice(search, part, part_scores, num_neighbours, table)


def _rank_slice(search: _Search, queries: Tensor, row_scores: Tensor, num_neighbours: int, table: _QueryTable) -> None:
    """Rank queries whose tables fit into memory together; arguments as in `_rank_chunk`."""
    num_references = search.num_references[queries].unsqueeze(1)
    depth = max(int(num_references.max()), num_neighbours)
    nearest = ranking.top_indices(row_scores, depth)
    table.neighbours[queries] = nearest[:, :num_neighbours]
    hits = search.gallery_labels[nearest] == search.query_labels[queries].unsqueeze(1)

    table.first_hit_rank[queries] = hits.to(torch.uint8).argmax(dim=1) + 1
    # A first hit beyond the list is placed by counting, so k may be as large as the gallery.
    beyond = (~hits.any(dim=1) & (num_references.squeeze(1) > 0)).nonzero().flatten()
    if len(beyond):
        score, index = search.references.best(queries[beyond], row_scores[beyond])
        table.first_hit_rank[queries[beyond]] = ranking.rank_of(row_scores[beyond], score, index)
    table.first_hit_rank[queries] *= num_references.squeeze(1) > 0

    rank = torch.arange(1, depth + 1, device=queries.device)
    relevant = hits & (rank <= num_references)
    precision = relevant.cumsum(dim=1).to(torch.float64) / rank
    # 0 / 0 = NaN marks the queries without a reference.
    divisor = num_references.squeeze(1).to(torch.float64)
    table.r_precision[queries] = relevant.sum(dim=1) / divisor
    table.map_at_r[queries] = (precision * relevant).sum(dim=1) / divisor


def _average(search: _Search, table: _QueryTable, ks: tuple[int, ...]) -> RetrievalResult:
    """Means over the queries with a reference."""
    answerable = search.num_references > 0
    first_hit = table.first_hit_rank[answerable]
    without = answerable.logical_not().nonzero().flatten().cpu()
    has_neighbours = table.neighbours.shape[1] > 0
    return RetrievalResult(
        recall_at_k={k: float((first_hit <= k).to(torch.float64).mean()) for k in ks},
        r_precision=float(table.r_precision[answerable].mean()),
        map_at_r=float(table.map_at_r[answerable].mean()),
        num_queries=len(answerable),
        num_without_reference=len(without),
        without_reference=without,
        num_references=search.num_references.cpu(),
        first_hit_rank=table.first_hit_rank.cpu(),
        query_r_precision=table.r_precision.cpu(),
        query_map_at_r=table.map_at_r.cpu(),
        neighbours=table.neighbours.cpu() if has_neighbours else None,
    )
