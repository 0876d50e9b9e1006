"""Who searches what: protocols over embedded sets of images, on one rank or several.

A set (a split, some tars) lies over the ranks in contiguous parts; labels of all images are known to every rank.

- `self`: every image of a set searches the others, itself left out by its index.
- query and gallery: one set searches another (In-Shop; Hotels-50K, whose test images search the training images), or
  several others, each alone (VehicleID).
- distractors: more images to search, of none of the queries' classes; nothing counts as found among them.
- a coarser label (the chain of a hotel): the share of queries with that label among their k nearest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gcahng.data.ranks import rank_part
from gcahng.distributed import Ranks
from gcahng.distributed.retrieval import retrieval_over_ranks
from gcahng.distributed.rows import contiguous_rows
from gcahng.metrics import RetrievalResult
from gcahng.training.config import EvalConfig

NO_COARSE_LABEL = -1


@dataclass(frozen=True, eq=False)
class EmbeddedSet:
    """Images of one name, embedded.

    Attributes:
        embeddings: (n_r, D) float32 on the CPU: this rank's contiguous part.
        labels: (n,) int64 class ids of all of them.
        key: Key of an image, by its place among all.
        shard: Its tar, by the same.
        coarse: (n,) int64 coarser labels, `NO_COARSE_LABEL` for images without; None where they are not asked for.
    """

    embeddings: Tensor
    labels: Tensor
    key: Callable[[int], str]
    shard: Callable[[int], str]
    coarse: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class CoarseAccuracy:
    """Retrieval by a coarser label than the class."""

    recall_at_k: dict[int, float]
    """Share of queries with an image of their coarser label among the k nearest."""
    num_queries: int
    """Queries that have a coarser label which another image of the gallery has too; the others are left out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What an evaluation found; the same on every rank but for `embeddings`."""

    results: Mapping[str, RetrievalResult]
    """By gallery; the first is that of the run. The index of a neighbour counts gallery, then distractors."""
    coarse: Mapping[str, CoarseAccuracy]
    """By gallery, where a coarser label was asked for; else empty."""
    query: EmbeddedSet
    """The images that search."""
    galleries: Mapping[str, EmbeddedSet | None]
    """By gallery, without distractors; None where the queries search each other."""
    class_name: Callable[[int], str]
    """Name of a class id."""
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    """On rank 0, where they were to be kept: (n, D) of `query`, and of `gallery` (the first) where there is one."""

    @property
    def result(self) -> RetrievalResult:
        """Of the first gallery."""
        return next(iter(self.results.values()))


def search_sets(
    query: EmbeddedSet,
    galleries: Mapping[str, EmbeddedSet | None],
    distractors: Sequence[EmbeddedSet],
    config: EvalConfig,
    *,
    device: torch.device,
    ranks: Ranks,
    num_neighbours: int = 0,
) -> tuple[dict[str, RetrievalResult], dict[str, CoarseAccuracy]]:
    """Search every gallery with the queries.

    Args:
        query: The images that search.
        galleries: By name; None: they search each other.
        distractors: Searched with each of them.
        config: ks and memory.
        device: Where to rank.
        ranks: All of them call this.
        num_neighbours: Nearest neighbours to return per query.
    Returns:
        Results by gallery, and those by coarser label where the sets have one.
    """
    strangers = _strangers(query, galleries, distractors)
    coarse_ks = config.coarse_ks if query.coarse is not None else ()
    results: dict[str, RetrievalResult] = {}
    coarse: dict[str, CoarseAccuracy] = {}
    for name, gallery in galleries.items():
        base = query if gallery is None else gallery
        searched = _joined([base, *strangers], ranks)
        part, labels = _part(searched if gallery is None else query, device, ranks)
        gallery_part, gallery_labels = (None, None) if gallery is None else _part(searched, device, ranks)
        result = retrieval_over_ranks(
            part,
            labels,
            gallery_part,
            gallery_labels,
            ranks=ranks,
            ks=config.ks,
            precision_ks=config.precision_ks,
            num_neighbours=max(num_neighbours, *coarse_ks, 0),
            memory_mb=config.memory_mb,
        )
        result = _of_first(result, len(query))
        if query.coarse is not None and searched.coarse is not None:
            assert result.neighbours is not None, "they were asked for"
            coarse[name] = coarse_accuracy(
                result.neighbours, query.coarse, searched.coarse, coarse_ks, excluded=int(gallery is None)
            )
        results[name] = _with_neighbours(result, num_neighbours)
    return results, coarse


def coarse_accuracy(
    neighbours: Tensor, query: Tensor, gallery: Tensor, ks: Sequence[int], *, excluded: int
) -> CoarseAccuracy:
    """Share of queries that have an image of their coarser label among the k nearest.

    Args:
        neighbours: (Q, n) int64 gallery indices, nearest first, n at least the largest k.
        query: (Q,) int64 coarser labels; negative: none.
        gallery: (G,) int64 of the gallery.
        ks: Numbers of neighbours.
        excluded: Images of the query's label that it cannot find: 1 where it is in the gallery itself, else 0.
    """
    labels, counts = gallery.unique(return_counts=True)
    place = torch.searchsorted(labels, query).clamp(max=len(labels) - 1)
    found = torch.where(labels[place] == query, counts[place], 0)
    answerable = (query >= 0) & (found > excluded)
    hits = gallery[neighbours[answerable]] == query[answerable, None]
    count = int(answerable.sum())
    recall = {k: float(hits[:, :k].any(1).to(torch.float64).mean()) for k in ks} if count else {}
    return CoarseAccuracy(recall_at_k=recall, num_queries=count)


def unused_labels(labels: Tensor, count: int) -> Tensor:
    """(count,) int64 labels, all different, that `labels` does not hold."""
    taken = labels.unique()
    free = torch.arange(-(count + len(taken)), 0, dtype=torch.int64)
    free = free[torch.isin(free, taken, invert=True)]
    return free[len(free) - count :]


def _strangers(
    query: EmbeddedSet, galleries: Mapping[str, EmbeddedSet | None], distractors: Sequence[EmbeddedSet]
) -> list[EmbeddedSet]:
    """The distractors, each image of a class of its own."""
    known = torch.cat([query.labels, *(gallery.labels for gallery in galleries.values() if gallery is not None)])
    labels = unused_labels(known, sum(map(len, distractors))).split(list(map(len, distractors)))
    return [
        replace(
            images,
            labels=own,
            coarse=None if query.coarse is None else torch.full_like(own, NO_COARSE_LABEL),
        )
        for images, own in zip(distractors, labels, strict=True)
    ]


def _joined(sets: Sequence[EmbeddedSet], ranks: Ranks) -> EmbeddedSet:
    """The sets one after another as one, each rank with its contiguous part of the whole."""
    first = sets[0]
    if len(sets) == 1:
        return first
    places, start = [], 0
    for images in sets:
        part = rank_part(len(images), ranks.rank, ranks.size)
        places.append(torch.arange(start + part.start, start + part.stop))
        start += len(images)
    own = torch.cat([images.embeddings for images in sets])
    coarse = [images.coarse for images in sets if images.coarse is not None]
    return replace(
        first,
        embeddings=contiguous_rows(own, torch.cat(places), start, ranks),
        labels=torch.cat([images.labels for images in sets]),
        coarse=torch.cat(coarse) if len(coarse) == len(sets) else None,
    )


def _part(images: EmbeddedSet, device: torch.device, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """This rank's embeddings and their labels, where they are ranked."""
    part = rank_part(len(images), ranks.rank, ranks.size)
    return images.embeddings.to(device), images.labels[part].to(device)


def _of_first(result: RetrievalResult, count: int) -> RetrievalResult:
    """Only the first `count` queries; the others, distractors that searched too, have no reference and no mean."""
    if result.num_queries == count:
        return result
    without = result.without_reference[result.without_reference < count]
    return replace(
        result,
        num_queries=count,
        num_without_reference=len(without),
        without_reference=without,
        query_labels=result.query_labels[:count],
        num_references=result.num_references[:count],
        first_hit_rank=result.first_hit_rank[:count],
        query_r_precision=result.query_r_precision[:count],
        query_map_at_r=result.query_map_at_r[:count],
        query_precision_at_k=result.query_precision_at_k[:count],
        neighbours=None if result.neighbours is None else result.neighbours[:count],
        neighbour_scores=None if result.neighbour_scores is None else result.neighbour_scores[:count],
    )


def _with_neighbours(result: RetrievalResult, count: int) -> RetrievalResult:
    """As many neighbours as were asked for, where more were needed."""
    if result.neighbours is None or result.neighbours.shape[1] == count:
        return result
    kept = None if count == 0 else result.neighbours[:, :count]
    scores = None if count == 0 or result.neighbour_scores is None else result.neighbour_scores[:, :count]
    return replace(result, neighbours=kept, neighbour_scores=scores)
