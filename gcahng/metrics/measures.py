"""Retrieval metrics of single queries from the ranks of their references.

"A Metric Learning Reality Check" (ECCV 2020) defines R-Precision and MAP@R; both divide by R, not by the hits found.

Letters: q queries, m references of all of them, R references of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryMeasures:
    """Values of single queries: NaN (shares) or 0 (ranks) without a reference.

    Attributes:
        first_hit_rank: (q,) int64, from 1.
        r_precision: (q,) float64.
        map_at_r: (q,) float64.
        precision_at_k: (q, number of ks) float64.
    """

    first_hit_rank: Tensor
    r_precision: Tensor
    map_at_r: Tensor
    precision_at_k: Tensor

    @classmethod
    def joined(cls, parts: Sequence["QueryMeasures"]) -> "QueryMeasures":
        """One after another."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def measure(offset: Tensor, ranks: Tensor, precision_ks: Sequence[int]) -> QueryMeasures:
    """Metrics of queries.

    Args:
        offset: (q + 1,) where the references of each query begin.
        ranks: (m,) ranks from 1, ascending within a query; any larger number for a rank beyond R and all ks.
        precision_ks: Values of k.
    Returns:
        On the CPU.
    """
    # On the CPU, which adds in one order: sums on a GPU differ from run to run in their last bit.
    offset, ranks = offset.cpu(), ranks.cpu()
    num_references = offset.diff()
    query = torch.arange(len(num_references)).repeat_interleave(num_references)
    place = torch.arange(1, len(ranks) + 1) - offset[query]
    zeros = torch.zeros(len(num_references), dtype=torch.float64)
    divisor = num_references.to(torch.float64)  # 0 / 0 = NaN marks the queries without a reference

    def total(values: Tensor) -> Tensor:
        return zeros.index_add(0, query, values.to(torch.float64))

    relevant = ranks <= num_references[query]
    first = torch.zeros_like(num_references)
    answerable = (num_references > 0).nonzero().squeeze(1)
    first[answerable] = ranks[offset[answerable]]
    unanswered = torch.where(num_references > 0, 0.0, torch.nan).to(torch.float64)
    precisions = [total(ranks <= k) / k + unanswered for k in precision_ks]
    return QueryMeasures(
        first_hit_rank=first,
        r_precision=total(relevant) / divisor,
        map_at_r=total(relevant * (place / ranks.to(torch.float64))) / divisor,
        precision_at_k=torch.stack(precisions, 1) if precisions else zeros.new_empty((len(zeros), 0)),
    )
