"""Retrieval metrics by exact cosine search, never with a Q x G table.

Shapes: Q queries, G gallery items, D embedding channels, R references of a query (same-class gallery items, itself
excluded).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.metrics import checks
from gcahng.metrics.checks import Precision
from gcahng.metrics.exchange import ALONE, Exchange
from gcahng.metrics.measures import QueryMeasures
from gcahng.metrics.nearest import padded_items
from gcahng.metrics.search import Search
from gcahng.metrics.threads import on_threads
from gcahng.metrics.tiles import BLOCK
from gcahng.metrics.unit_vectors import full_precision, unit_vectors

_BLOCKS_PER_THREAD = 4


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Shares in [0, 1], averaged over the queries that have a reference; tensors on the CPU.

    Values of single queries that have no reference are NaN (shares) or 0 (ranks); no mean contains
    them.
    """

    recall_at_k: dict[int, float]
    """Share of queries with at least one same-class item among the k nearest."""
    precision_at_k: dict[int, float]
    """Share of same-class items among the k nearest."""
    r_precision: float
    """Share of same-class items among the R nearest."""
    map_at_r: float
    """Sum of the precision at each rank r <= R that holds a same-class item, divided by R."""
    mrr: float
    """Mean of 1 / rank of the best-ranked reference, however far down that is."""
    num_queries: int
    """All queries, those without a reference included."""
    num_without_reference: int
    """Queries that no gallery item can answer."""
    without_reference: Tensor
    """(num_without_reference,) int64, their indices, ascending."""
    num_references: Tensor
    """(Q,) int64, R of each query."""
    query_labels: Tensor
    """(Q,) int64."""
    first_hit_rank: Tensor
    """(Q,) int64, rank (from 1) of the best-ranked reference; 0 without a reference."""
    query_r_precision: Tensor
    """(Q,) float64."""
    query_map_at_r: Tensor
    """(Q,) float64."""
    query_precision_at_k: Tensor
    """(Q, number of precision_ks) float64."""
    neighbours: Tensor | None = None
    """(Q, num_neighbours) int64 gallery indices, nearest first, where asked for."""
    neighbour_scores: Tensor | None = None
    """(Q, num_neighbours) float32 cosine similarities of the neighbours."""


@torch.no_grad()
def retrieval(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    precision_ks: Sequence[int] = (),
    num_neighbours: int = 0,
    precision: Precision = "auto",
    memory_mb: int = 512,
    exchange: Exchange = ALONE,
) -> RetrievalResult:
    """Rank a gallery for every query by cosine similarity and average the benchmark's metrics.

    Without a gallery every query searches all the other queries: it is left out by its index, so
    other images with the same embedding stay. Equal scores: the lower gallery index comes first.
    Queries without a reference are counted, listed and left out of every mean.

    Scores are exact inner products of unit vectors on a grid of 2^-26 (`gcahng.metrics.unit_vectors`): results do not
    depend on `precision`, `memory_mb`, threads, device, or how the items are split into parts.

    R-Precision and MAP@R follow "A Metric Learning Reality Check" (ECCV 2020): both divide by R,
    not by the hits found.

    Args:
        query: (Q, D) embeddings, normalised here; with several parts, this part's.
        query_labels: (Q,) integer classes.
        gallery: (G, D) embeddings, or None for self-retrieval.
        gallery_labels: (G,) integer classes, exactly when there is a gallery.
        ks: Ranks for `recall_at_k`.
        precision_ks: Ranks for `precision_at_k`. Large ones cost time: every reference is ranked up to the largest.
        num_neighbours: Gallery indices to return per query; 0 for none. They cost a second search.
        precision: Of the tiles that find which pairs are to be scored exactly: "bf16", "fp32", or "auto": bf16 where
            the hardware is faster with it.
        memory_mb: Working memory beside the normalised embeddings and a few numbers per query.
        exchange: With other parts, each of which calls this with its stretch of queries and gallery; all get the
            result of the whole. A part may be empty. See `gcahng.distributed.retrieval`.

    Returns:
        The means, and the values of each query.

    Raises:
        InputError: an argument breaks the contract above, a k exceeds the candidates of a query,
            or no query has a reference.
    """
    inputs = exchange.agree(lambda: _check_own(query, query_labels, gallery, gallery_labels, exchange.parts > 1))
    checks.check_memory(memory_mb)
    low = checks.use_low_precision(precision, query.device)

    parts = _num_threads(inputs) if exchange.parts == 1 else 1

    def search(inputs: _Inputs, exchange: Exchange) -> RetrievalResult:
        found = _prepare(inputs, exchange, low=low, memory_mb=max(1, memory_mb // parts))
        return _searched(found, tuple(ks), tuple(precision_ks), num_neighbours)

    with full_precision():
        if parts == 1:
            return search(inputs, exchange)
        return on_threads(parts, lambda others: search(inputs.part(others.part, parts), others))


@dataclass(frozen=True)
class _Inputs:
    """Checked arguments of one part."""

    query: Tensor
    query_labels: Tensor
    gallery: Tensor | None
    gallery_labels: Tensor

    def part(self, part: int, parts: int) -> "_Inputs":
        """A stretch of whole blocks of queries and of gallery."""
        queries, items = (_stretch(len(labels), part, parts) for labels in (self.query_labels, self.gallery_labels))
        gallery = None if self.gallery is None else self.gallery[items]
        return _Inputs(self.query[queries], self.query_labels[queries], gallery, self.gallery_labels[items])


def _stretch(count: int, part: int, parts: int) -> slice:
    """Part `part` of `count` items, in whole blocks but for the end."""
    blocks = -(-count // BLOCK)
    return slice(blocks * part // parts * BLOCK, blocks * (part + 1) // parts * BLOCK)


def _num_threads(inputs: _Inputs) -> int:
    """Threads that search parts of their own: of a few blocks each."""
    if inputs.query.device.type != "cpu":
        return 1
    blocks = -(-len(inputs.gallery_labels) // BLOCK)
    return max(1, min(torch.get_num_threads(), blocks // _BLOCKS_PER_THREAD))


def _check_own(
    query: Tensor, query_labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None, may_be_empty: bool
) -> _Inputs:
    checks.check_embeddings("query", query, may_be_empty=may_be_empty)
    query_labels = checks.check_labels("query_labels", query_labels, "query", query)
    if (gallery is None) != (gallery_labels is None):
        given, missing = ("gallery", "gallery_labels")[:: 1 if gallery_labels is None else -1]
        raise InputError(
            f"`gallery` and `gallery_labels` go together: got `{given}` without `{missing}`. "
            "Pass both, or neither for self-retrieval."
        )
    checks.check_finite("query", query)
    if gallery is None or gallery_labels is None:
        return _Inputs(query, query_labels, None, query_labels)
    checks.check_embeddings("gallery", gallery, may_be_empty=may_be_empty)
    checks.check_pair(query, gallery)
    checks.check_finite("gallery", gallery)
    return _Inputs(
        query, query_labels, gallery, checks.check_labels("gallery_labels", gallery_labels, "gallery", gallery)
    )


def _prepare(inputs: _Inputs, exchange: Exchange, *, low: bool, memory_mb: int) -> Search:
    """The search of all parts, from one part's checked arguments."""
    is_self = inputs.gallery is None
    label_parts = exchange.everyone(inputs.query_labels)
    gallery_parts = label_parts if is_self else exchange.everyone(inputs.gallery_labels)
    if not any(map(len, label_parts)) or not any(map(len, gallery_parts)):
        raise InputError("`query` and `gallery` must not be empty in all parts. Check how they were collected.")
    first = sum(len(part) for part in gallery_parts[: exchange.part])
    own = inputs.query if inputs.gallery is None else inputs.gallery
    items = padded_items(own, inputs.gallery_labels, first, low=low)
    unit = items.vectors.exact[: len(inputs.query)] if is_self else unit_vectors(inputs.query)
    search = Search(exchange, unit, label_parts, items, gallery_parts, is_self=is_self, memory_mb=memory_mb)
    if not any(bool((counts > 0).any()) for counts in search.num_references):
        raise InputError(
            f"no query has a same-class item to find: got {sum(map(len, label_parts))} queries and "
            f"{search.num_items} gallery items without a pair of one class. Check that both sides number the classes "
            "alike."
        )
    return search


def _searched(
    search: Search, ks: tuple[int, ...], precision_ks: tuple[int, ...], num_neighbours: int
) -> RetrievalResult:
    candidates = search.num_items - search.is_self
    ks = checks.check_ranks("ks", ks, candidates)
    precision_ks = checks.check_ranks("precision_ks", precision_ks, candidates)
    if num_neighbours != 0:
        checks.check_ranks("num_neighbours", [num_neighbours], candidates)
    measures = search.measures(precision_ks)
    nearest = search.nearest(num_neighbours) if num_neighbours else None
    return _average(search, measures, ks, precision_ks, nearest)


def _average(
    search: Search,
    measures: QueryMeasures,
    ks: tuple[int, ...],
    precision_ks: tuple[int, ...],
    nearest: tuple[Tensor, Tensor] | None,
) -> RetrievalResult:
    """Means over the queries with a reference."""
    num_references = torch.cat(search.num_references).cpu()
    answerable = num_references > 0
    first_hit = measures.first_hit_rank[answerable]
    without = answerable.logical_not().nonzero().flatten()
    precisions = measures.precision_at_k[answerable].unbind(1)
    return RetrievalResult(
        recall_at_k={k: _mean(first_hit <= k) for k in ks},
        precision_at_k={k: _mean(shares) for k, shares in zip(precision_ks, precisions, strict=True)},
        r_precision=_mean(measures.r_precision[answerable]),
        map_at_r=_mean(measures.map_at_r[answerable]),
        mrr=_mean(1 / first_hit.to(torch.float64)),
        num_queries=len(answerable),
        num_without_reference=len(without),
        without_reference=without,
        num_references=num_references,
        query_labels=torch.cat(list(search.query_labels)).cpu(),
        first_hit_rank=measures.first_hit_rank,
        query_r_precision=measures.r_precision,
        query_map_at_r=measures.map_at_r,
        query_precision_at_k=measures.precision_at_k,
        neighbours=None if nearest is None else nearest[1].cpu(),
        neighbour_scores=None if nearest is None else nearest[0].float().cpu(),
    )


def _mean(values: Tensor) -> float:
    """Of the exact sum: torch's depends on the number of threads."""
    return math.fsum(values.tolist()) / len(values)
