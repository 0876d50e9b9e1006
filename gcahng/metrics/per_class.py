"""What a retrieval result says of single classes, and of the queries that came out worst.

Shapes: Q queries, C classes that have a query.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.metrics.retrieval import RetrievalResult


@dataclass(frozen=True, kw_only=True)
class PerClass:
    """A table with one row per class that has a query, by ascending class id; tensors on the CPU.

    Means are over the queries of the class that have a reference, as those over all queries are: weighted by
    `num_queries - num_without_reference` they add up to them. A class with a single reference has values like any
    other; only a class of which no query has a reference has none (NaN here, None in `rows`).
    """

    class_id: Tensor
    """(C,) int64."""
    num_queries: Tensor
    """(C,) int64."""
    num_without_reference: Tensor
    """(C,) int64, queries that no gallery item can answer."""
    num_single_reference: Tensor
    """(C,) int64, queries that exactly one gallery item can answer."""
    recall_at_k: dict[int, Tensor]
    """By k (C,) float64."""
    r_precision: Tensor
    """(C,) float64."""
    map_at_r: Tensor
    """(C,) float64."""
    mrr: Tensor
    """(C,) float64, mean of 1 / rank of the first same-class item."""

    def columns(self) -> dict[str, Tensor]:
        """Name -> (C,), in the order in which they are shown."""
        return {
            "class_id": self.class_id,
            "num_queries": self.num_queries,
            "num_without_reference": self.num_without_reference,
            "num_single_reference": self.num_single_reference,
            **{f"recall_at_{k}": values for k, values in self.recall_at_k.items()},
            "r_precision": self.r_precision,
            "map_at_r": self.map_at_r,
            "mrr": self.mrr,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each class as plain values by name; None where none of its queries has a reference."""
        columns = {name: values.tolist() for name, values in self.columns().items()}
        for values in zip(*columns.values(), strict=True):
            yield {name: None if value != value else value for name, value in zip(columns, values, strict=True)}

    def __len__(self) -> int:
        return len(self.class_id)


def per_class(result: RetrievalResult) -> PerClass:
    """The counts and means of each class that has a query.

    Args:
        result: Of `gcahng.metrics.retrieval`; the ks are its own.
    """
    class_id, place = result.query_labels.unique(return_inverse=True)
    references = result.num_references
    answerable = references > 0

    def count(chosen: Tensor) -> Tensor:
        return torch.bincount(place[chosen], minlength=len(class_id))

    answered = count(answerable)

    def mean(values: Tensor) -> Tensor:
        """(C,) means of (Q,) values over the queries with a reference; 0 / 0 = NaN without one."""
        total = torch.zeros(len(class_id), dtype=torch.float64)
        total.index_add_(0, place[answerable], values[answerable].to(torch.float64))
        return total / answered

    first_hit = result.first_hit_rank
    return PerClass(
        class_id=class_id,
        num_queries=count(torch.ones_like(answerable)),
        num_without_reference=count(~answerable),
        num_single_reference=count(references == 1),
        recall_at_k={k: mean(first_hit <= k) for k in result.recall_at_k},
        r_precision=mean(result.query_r_precision),
        map_at_r=mean(result.query_map_at_r),
        mrr=mean(1 / first_hit.to(torch.float64)),
    )


def worst_queries(result: RetrievalResult, count: int) -> Tensor:
    """Indices of the queries that came out worst: lowest MAP@R, then lowest reciprocal rank, then lowest index.

    Queries without a reference, which nothing could answer, are never among them.

    Args:
        result: Of `gcahng.metrics.retrieval`.
        count: At most so many.
    Returns:
        (n,) int64, the worst first; n < count where fewer queries have a reference.
    Raises:
        InputError: `count` is negative.
    """
    if count < 0:
        raise InputError(f"`count` must be at least 0: got {count}. Ask for no queries with 0.")
    queries = (result.num_references > 0).nonzero().flatten()
    # Two stable sorts: by rank of the first hit (the later, the worse), then by MAP@R.
    queries = queries[result.first_hit_rank[queries].argsort(descending=True, stable=True)]
    return queries[result.query_map_at_r[queries].argsort(stable=True)][:count]
