"""The k nearest gallery items of every query: exact, by tiles.

One order everywhere: higher score first, among equal scores the lower gallery index first.

Shapes: Q queries, G gallery items, D channels, q queries of a block, c candidates.
"""

import torch
from torch import Tensor

from gcahng.metrics import checks
from gcahng.metrics.checks import Precision
from gcahng.metrics.counting import CROWDED, Items, at_least_by_row, slices_of
from gcahng.metrics.references import counts_to_offsets
from gcahng.metrics.tiles import BLOCK, FINER, TileMaker, Vectors, computed_limits, padded, padded_count
from gcahng.metrics.unit_vectors import full_precision, pair_scores, unit_vectors

_MOST_PENDING = 1 << 18
_BYTES_PER_CANDIDATE = 200  # of the pool, and of what sorting it needs


@torch.no_grad()
def nearest(
    query: Tensor,
    gallery: Tensor,
    k: int,
    *,
    exclude: Tensor | None = None,
    precision: Precision = "auto",
    memory_mb: int = 512,
) -> tuple[Tensor, Tensor]:
    """The k gallery items of highest cosine similarity with each query, best first.

    Args:
        query: (Q, D) embeddings, normalised here.
        gallery: (G, D).
        k: 1 <= k <= G, one less where `exclude` is given.
        exclude: (Q,) int64 gallery index that each query must not find, -1 for none.
        precision: Of the tiles, see `gcahng.metrics.retrieval`; the result is the same.
        memory_mb: Working memory beside the normalised embeddings.
    Returns:
        (Q, k) float32 scores and (Q, k) int64 gallery indices. Equal scores: lower index first.
    Raises:
        InputError: An argument breaks the contract above.
    """
    checks.check_embeddings("query", query)
    checks.check_embeddings("gallery", gallery)
    checks.check_pair(query, gallery)
    checks.check_finite("query", query)
    checks.check_finite("gallery", gallery)
    checks.check_memory(memory_mb)
    low = checks.use_low_precision(precision, query.device)
    if exclude is not None:
        exclude = checks.check_labels("exclude", exclude, "query", query)
    checks.check_ranks("k", [k], len(gallery) - (exclude is not None))
    items = padded_items(gallery, torch.zeros(len(gallery), dtype=torch.int64, device=gallery.device), low=low)
    scores, indices = nearest_items(unit_vectors(query), items, k, exclude, memory_mb=memory_mb)
    return scores.float(), indices


def padded_items(embeddings: Tensor, labels: Tensor, first_index: int = 0, *, low: bool) -> Items:
    """Unit vectors of embeddings, ready for tiles."""
    unit = unit_vectors(embeddings, padded_count(len(embeddings)))
    return Items(Vectors.of(unit, low=low), labels, first_index)


def nearest_items(
    unit_queries: Tensor, gallery: Items, k: int, exclude: Tensor | None, *, memory_mb: int
) -> tuple[Tensor, Tensor]:
    """As `nearest`, of unit vectors and of a part of a gallery.

    Args:
        unit_queries: (Q, D) unit vectors.
        gallery: Items; `first_index` counts.
        k: Items to find; where the part has fewer, the rest has score minus infinity and index -1.
        exclude: (Q,) gallery indices.
        memory_mb: Working memory.
    Returns:
        (Q, k) float64 exact scores and (Q, k) int64 gallery indices.
    """
    rows = max(1, min(BLOCK, memory_mb * 2**20 // (_BYTES_PER_CANDIDATE * 4 * k)))
    found = []
    with full_precision():
        maker = TileMaker(unit_queries.device)
        for start in range(0, len(unit_queries), rows):
            part = slice(start, start + rows)
            pool = _Pool(unit_queries[part], gallery, k, None if exclude is None else exclude[part])
            found.append(pool.fill(maker))
    return torch.cat([scores for scores, _ in found]), torch.cat([indices for _, indices in found])


class _Pool:
    """Candidates of up to `BLOCK` queries, with bounds of their scores."""

    def __init__(self, unit_queries: Tensor, gallery: Items, k: int, exclude: Tensor | None) -> None:
        self.dtype = gallery.vectors.coarsest
        self.queries = Vectors.of(padded(unit_queries), low=gallery.vectors.low is not None)
        self.num_queries = len(unit_queries)
        self.gallery, self.k, self.exclude = gallery, k, exclude
        # What a query's k-th best item surely reaches.
        self.least = unit_queries.new_full((self.num_queries,), -torch.inf, dtype=torch.float64)
        none = torch.empty(0, dtype=torch.int64, device=unit_queries.device)
        self.query, self.item = none, none
        self.lower, self.upper = none.double(), none.double()
        self._settled = 0

    def fill(self, maker: TileMaker) -> tuple[Tensor, Tensor]:
        """Look at the whole gallery; returns (q, k) exact scores and indices."""
        for block in range(self.gallery.num_blocks):
            items, tile = self.gallery.block(block), None
            for begin, end in slices_of(len(items.exact), first=block == 0):
                if tile is None or tile.scores.dtype != self.dtype:
                    tile = maker.tile(self.queries, items, self.dtype)
                # What comes later and only scores as much as the k-th best has k before it.
                limits = computed_limits(tile, self.least.nextafter(self.least.new_tensor(torch.inf)), tile.row_error)
                query, item = at_least_by_row(tile.scores[:, begin:end], limits)
                computed = tile.scores[:, begin:end][query, item].double()
                error = tile.row_error[query].double() + tile.stored_roundoff * computed.abs()
                self._add(query, item + (block * BLOCK + begin), computed, error)
                if block == 0 or len(self.query) > self._settled + _MOST_PENDING or block & (block - 1) == 0:
                    self._settle()
        self._settle()
        return self._sorted()

    def _add(self, query: Tensor, item: Tensor, score: Tensor, error: Tensor) -> None:
        inside = item < len(self.gallery)
        if self.exclude is not None:
            inside &= item + self.gallery.first_index != self.exclude[query]
        kept = inside.nonzero().squeeze(1)
        query, item, score, error = query[kept], item[kept], score[kept], error[kept]
        self.query, self.item = torch.cat([self.query, query]), torch.cat([self.item, item])
        self.lower, self.upper = torch.cat([self.lower, score - error]), torch.cat([self.upper, score + error])

    def _settle(self) -> None:
        """Raise what the k-th best surely reaches, and leave out what surely stays below."""
        order = self.lower.argsort(descending=True)
        order = order[self.query[order].argsort(stable=True)]
        sizes = torch.bincount(self.query, minlength=self.num_queries)
        kth = (counts_to_offsets(sizes)[:-1] + self.k - 1).clamp_max(max(0, len(order) - 1))
        if len(order):
            reached = self.lower[order][kth]
            self.least = torch.where(sizes >= self.k, torch.maximum(self.least, reached), self.least)
        kept = (self.upper >= self.least[self.query]).nonzero().squeeze(1)
        self.query, self.item = self.query[kept], self.item[kept]
        self.lower, self.upper = self.lower[kept], self.upper[kept]
        self._settled = len(kept)
        wanted = self.k * self.num_queries
        if self.dtype != torch.float64 and len(kept) > 2 * wanted + CROWDED:
            self.dtype = FINER[self.dtype]
        if len(kept) > 4 * wanted + CROWDED:
            self._keep_best()

    def _keep_best(self) -> None:
        """Leave only the k best of every query, by their exact scores."""
        scores, indices = self._sorted()
        self.query, place = (indices >= 0).nonzero(as_tuple=True)
        self.item = indices[self.query, place] - self.gallery.first_index
        self.lower = self.upper = scores[self.query, place]
        self.least = torch.maximum(self.least, scores[:, -1])
        self._settled = len(self.query)

    def _sorted(self) -> tuple[Tensor, Tensor]:
        exact = pair_scores(self.queries.exact, self.gallery.vectors.exact, self.query, self.item)
        return best_of(self.query, exact, self.item + self.gallery.first_index, self.num_queries, self.k)


def best_of(query: Tensor, score: Tensor, index: Tensor, num_queries: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best of listed items of each query, in order.

    Args:
        query, score, index: (c,) position of the query, exact score, gallery index.
        num_queries: q.
        k: Items wanted.
    Returns:
        (q, k) float64 scores and (q, k) int64 indices; minus infinity and -1 where a query has fewer.
    """
    order = index.argsort(stable=True)
    order = order[score[order].argsort(descending=True, stable=True)]
    order = order[query[order].argsort(stable=True)]
    query = query[order]
    place = torch.arange(len(query), device=query.device)
    place -= counts_to_offsets(torch.bincount(query, minlength=num_queries))[query]
    kept = place < k
    scores = score.new_full((num_queries, k), -torch.inf)
    indices = index.new_full((num_queries, k), -1)
    scores[query[kept], place[kept]] = score[order][kept]
    indices[query[kept], place[kept]] = index[order][kept]
    return scores, indices
